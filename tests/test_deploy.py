"""deploy/kuberay and deploy/vms: what Kustomize builds is valid, restricted, complete, and does what it says."""

import copy
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kuberay_schemas
import kubernetes_validate
import pytest
import typer
import yaml

from jobs import job_file
from jobs.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
KUBERNETES = "1.33"
STORES = ("s3", "gcs", "azure")
WAYS = ("now", "cronjob", "raycronjob")
CUSTOM = {"RayJob", "RayCronJob", "PodMonitor"}  # of which kubernetes-validate has no schema
BUILDS = [
    ("base",),
    ("example",),
    *((f"overlays/{store}", f"components/{way}") for store in STORES for way in WAYS),
    ("overlays/gcs", "components/gcs-ft", "components/metrics", "components/now"),
    ("overlays/azure", "components/gcs-ft", "components/metrics", "components/raycronjob"),
]
IDS = ["+".join(part.rpartition("/")[2] for part in build) for build in BUILDS]
Manifest = dict[str, Any]


@functools.cache
def _built(build: tuple[str, ...]) -> str:
    """The YAML of the first folder with the others as its components. Skips where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, whose `kustomize` builds the overlays")
    with tempfile.TemporaryDirectory() as folder:
        resource, *components = (os.path.relpath(KUBERAY / part, os.path.realpath(folder)) for part in build)
        top = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "shard2vec",
            "resources": [resource],
            "components": components,
        }
        Path(folder, "kustomization.yaml").write_text(json.dumps(top))
        done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built(build: tuple[str, ...]) -> list[Manifest]:
    return [m for m in yaml.load_all(_built(build), yaml.CSafeLoader) if m]


def one(manifests: list[Manifest], kind: str, name: str = "shard2vec") -> Manifest:
    (found,) = (m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))
    return found


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every pod template in a manifest, by where it stands."""

    def below(node: Any, path: str) -> Iterator[tuple[str, Manifest]]:
        if isinstance(node, dict):
            if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
                yield path, node
                return
            for key, value in node.items():
                yield from below(value, f"{path}.{key}")
        elif isinstance(node, list):
            for i, value in enumerate(node):
                yield from below(value, f"{path}[{i}]")

    yield from below(manifest.get("spec"), "spec")


def check(manifest: Manifest) -> None:
    """Raises for what Kubernetes would refuse or drop: of plain kinds, and of the pods in custom ones."""
    if manifest["kind"] not in CUSTOM:
        _check(json.dumps(manifest))
        return
    for _, template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        _check(json.dumps(pod))


@functools.cache  # it reads a megabyte of definitions each time, and most builds share most manifests
def _check(manifest: str) -> None:
    kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_what_is_built_is_valid(build: tuple[str, ...]) -> None:
    """Against Kubernetes' own schemas, with no field that they do not name; pods of Ray too."""
    for manifest in built(build):
        check(manifest)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_rays_resources_are_valid(build: tuple[str, ...]) -> None:
    """Against KubeRay's own schemas, with no field that they do not name."""
    known = _schemas()
    for manifest in built(build):
        if manifest["kind"] in CUSTOM - {"PodMonitor"}:
            known[manifest["apiVersion"], manifest["kind"]].validate(manifest)


@functools.cache
def _schemas() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    return kuberay_schemas.validators()


def mutated(manifest: Manifest, path: str, value: Any) -> Manifest:
    changed = copy.deepcopy(manifest)
    *way, last = path.split(".")
    node: Any = changed
    for key in way:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    return changed


POD = "spec.rayClusterSpec.workerGroupSpecs.0.template.spec"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("CronJob", "spec.concurrencyPolice", "Forbid"),
        ("CronJob", "spec.concurrencyPolicy", 1),
        ("NetworkPolicy", "spec.podSelector", "shard2vec"),
        ("Namespace", "spec", {"finalizer": []}),
        ("RayJob", f"{POD}.containers.0.livenessProb", {}),
        ("RayJob", f"{POD}.containers.0.resources.limits", "16"),
        ("RayJob", f"{POD}.securityContext.runAsNonRoot", "true"),
        ("RayJob", f"{POD}.volumes.0.emptydir", {}),
    ],
)
def test_a_wrong_manifest_is_caught(kind: str, path: str, value: Any) -> None:
    """A misspelt field or a wrong type does not pass the checks above."""
    right = one(built(("overlays/s3", "components/cronjob")), kind)
    check(right)
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check(mutated(right, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backofLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.submissionMode", 5),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "none"),
        ("spec.rayClusterSpec.gcsFaultTolerance", {}),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeout", 60),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        (f"{POD}.containers.0.readinessprobe", {}),
    ],
)
def test_a_wrong_rayjob_is_caught(path: str, value: Any) -> None:
    validator = _schemas()["ray.io/v1", "RayJob"]
    right = one(built(("base",)), "RayJob")
    validator.validate(right)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(mutated(right, path, value))


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_no_container_may_more_than_it_must(build: tuple[str, ...]) -> None:
    """No root, no capability, no writable root file system; bounded processor, memory and volumes; no API token."""
    for manifest in built(build):
        for where, template in pod_templates(manifest):
            spec, at = template["spec"], f"{manifest['kind']} {where}"
            assert spec["securityContext"]["runAsNonRoot"] is True, at
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, at
            assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"] > 0, at
            starts = manifest["kind"] == "CronJob"  # only this one talks to Kubernetes
            assert spec["automountServiceAccountToken"] is starts, at
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                _is_bounded(container, at)
        if manifest["kind"] == "RayJob":
            _is_bounded(manifest["spec"]["rayClusterSpec"]["autoscalerOptions"], "autoscaler")


def _is_bounded(container: Manifest, at: str) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }, at
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(container["resources"][kind]), at


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_all_that_is_named_is_there(build: tuple[str, ...]) -> None:
    """Accounts, ConfigMaps, volumes; and what policies and budgets select are pods that exist."""
    manifests = built(build)
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    templates = [template for m in manifests for _, template in pod_templates(m)]
    for template in templates:
        spec = template["spec"]
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in names
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "emptyDir" in volume:
                assert volume["emptyDir"]["sizeLimit"]
        claimed = {"data"}  # of the StatefulSet
        for container in spec["containers"]:
            assert {m["name"] for m in container.get("volumeMounts", [])} <= set(volumes) | claimed
    labels = [template["metadata"]["labels"] for template in templates]
    for manifest in manifests:
        selector = manifest.get("spec", {}).get("podSelector") or (
            manifest["spec"]["selector"] if manifest["kind"] in ("PodDisruptionBudget", "PodMonitor") else None
        )
        if selector:
            given = {k: v for k, v in selector["matchLabels"].items() if not k.startswith("ray.io/")}  # KubeRay's own
            assert any(given.items() <= of.items() for of in labels), manifest["metadata"]["name"]
    assert not any(m["kind"] in ("Secret", "ClusterRole", "ClusterRoleBinding") for m in manifests)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_images_are_of_this_version(build: tuple[str, ...]) -> None:
    """By short names: where they are kept is for an overlay to say."""
    version = _version()
    images = {c["image"] for m in built(build) for _, t in pod_templates(m) for c in t["spec"]["containers"]}
    assert images - {"redis:7.4"} == {f"shard2vec:{version}-cuda"}


def _version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def test_ones_own_image_takes_the_place_of_all(tmp_path: Path) -> None:
    """`kustomize edit set image` in an overlay reaches the pods of RayJob, RayCronJob and CronJob."""
    folder = KUBERAY / "example"
    top = yaml.safe_load((folder / "kustomization.yaml").read_text())
    top["images"] = [{"name": "shard2vec", "newName": "mine/embedder", "newTag": "7"}]
    for key in ("resources", "components"):
        top[key] = [os.path.relpath(folder / part, os.path.realpath(tmp_path)) for part in top[key]]
    top["components"].append(os.path.relpath(KUBERAY / "components/raycronjob", os.path.realpath(tmp_path)))
    (tmp_path / "kustomization.yaml").write_text(json.dumps(top))
    manifests = built((os.path.relpath(tmp_path, KUBERAY),))
    images = [c["image"] for m in manifests for _, t in pod_templates(m) for c in t["spec"]["containers"]]
    assert images.count("mine/embedder:7") == 9 and set(images) == {"mine/embedder:7", "redis:7.4"}


def test_the_ray_of_the_cluster_is_the_locks() -> None:
    """KubeRay decides by `rayVersion` how it asks for health and for a token."""
    cluster = one(built(("base",)), "RayJob")["spec"]["rayClusterSpec"]
    assert f"\nray=={cluster['rayVersion']} " in (ROOT / "requirements.lock").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    health = {"path": "/api/healthz", "port": 52365}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ray = group["template"]["spec"]["containers"][0]
        assert ray["livenessProbe"]["httpGet"] == ray["readinessProbe"]["httpGet"] == health
        shm = next(v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")["emptyDir"]
        store = int(group["rayStartParams"]["object-store-memory"])
        assert shm["medium"] == "Memory" and store < int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_a_run_ends_and_is_tried_again() -> None:
    spec = one(built(("base",)), "RayJob")["spec"]
    assert spec["suspend"] and spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0 and spec["ttlSecondsAfterFinished"] >= 0
    assert not one(built(("overlays/s3", "components/now")), "RayJob")["spec"]["suspend"]


def test_the_entrypoint_outlives_both_shells() -> None:
    """KubeRay writes it into a script of the submitter, unquoted; Ray puts the words together again for the head's."""
    spec = one(built(("base",)), "RayJob")["spec"]
    shown = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    done = subprocess.run(
        ["bash", "-ce", f"{shown} {spec['entrypoint']} ;"], capture_output=True, text=True, check=True
    )
    words = json.loads(done.stdout)
    command = shlex.join(words)  # as `ray job submit` does
    assert shlex.split(command) == words == ["sh", "-c", words[2]]
    wait, run = words[2].split(" && exec ")
    assert run.startswith("shard2vec reembed ") and "--ray-address auto" in run
    lease = yaml.safe_load((KUBERAY / "base" / "job.yaml").read_text())["lease-timeout"]
    assert wait == f"sleep {lease}"  # so long after a killed attempt nobody holds it


def test_both_kinds_of_workers_scale_from_none() -> None:
    cluster = one(built(("base",)), "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    for name, group in groups.items():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")


def test_only_the_autoscaler_gets_a_token_for_kubernetes() -> None:
    """The container that runs the job has none."""
    cluster = one(built(("base",)), "RayJob")["spec"]["rayClusterSpec"]
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert folder in [m["mountPath"] for m in cluster["autoscalerOptions"]["volumeMounts"]]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert folder not in [m["mountPath"] for m in head["volumeMounts"]]


def test_the_schedule_may_only_copy_the_one_rayjob() -> None:
    manifests = built(("overlays/s3", "components/cronjob"))
    (role,) = (m for m in manifests if m["kind"] == "Role")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "resourceNames": ["shard2vec"], "verbs": ["get"]},
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]},
    ]
    (binding,) = (m for m in manifests if m["kind"] == "RoleBinding")
    account = one(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "shard2vec"}
    assert binding["roleRef"]["name"] == role["metadata"]["name"] and binding["subjects"] == [subject]


def test_both_schedules_run_what_the_rayjob_is() -> None:
    """KubeRay's has the base's spec to the last field, with the overlay's credentials and Redis."""
    manifests = built(("overlays/azure", "components/gcs-ft", "components/metrics", "components/raycronjob"))
    spec = one(manifests, "RayJob")["spec"]
    assert spec["rayClusterSpec"]["gcsFaultToleranceOptions"]["redisAddress"] == "shard2vec-redis:6379"
    assert one(manifests, "RayCronJob")["spec"]["jobTemplate"] == {k: v for k, v in spec.items() if k != "suspend"}


@pytest.mark.parametrize("store", STORES)
def test_credentials_are_identities(store: str) -> None:
    """Both of Ray's accounts are bound to one of the cloud's; nowhere is there a key."""
    manifests = built((f"overlays/{store}", "components/now"))
    marks = {
        "s3": "eks.amazonaws.com/role-arn",
        "gcs": "iam.gke.io/gcp-service-account",
        "azure": "azure.workload.identity/client-id",
    }
    for account in ("shard2vec-head", "shard2vec-worker"):
        assert marks[store] in one(manifests, "ServiceAccount", account)["metadata"]["annotations"]
    cluster = one(manifests, "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = group["template"]
        names = {v["name"] for v in template["spec"]["containers"][0].get("env", [])}
        assert names <= {"AWS_REGION", "AWS_DEFAULT_REGION", "AZURE_STORAGE_ACCOUNT_NAME"}
        assert ("azure.workload.identity/use" in template["metadata"]["labels"]) == (store == "azure")
    scheme = {"s3": "s3://", "gcs": "gs://", "azure": "az://"}[store]
    job = yaml.safe_load(one(manifests, "ConfigMap", "shard2vec-job")["data"]["job.yaml"])
    assert job["output"].startswith(scheme) and job["input"][0].startswith(scheme)


@pytest.mark.parametrize("file", sorted(KUBERAY.rglob("job.yaml")), ids=lambda path: path.parent.name)
def test_job_files_hold_flags_of_the_verb(file: Path) -> None:
    entrypoint = one(built(("base",)), "RayJob")["spec"]["entrypoint"].split()
    verb = entrypoint[entrypoint.index("shard2vec") + 1]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    argv = job_file.expand(["--config", str(file)])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {arg for arg in argv if arg.startswith("--")} <= known
    assert "--precision" in argv, "auto would bring up a GPU node, only to ask it, where nothing is to do"


# What the CronJob's pod does


def test_the_cluster_of_machines_is_what_ray_takes() -> None:
    """By Ray's own preparation and schema, which refuse an unknown field."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = yaml.safe_load((ROOT / "deploy" / "vms" / "cluster.yaml").read_text())
    config = prepare_config(written)
    validate_config(config)
    assert config["max_workers"] == len(written["provider"]["worker_ips"]) == written["min_workers"]
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(written | {"idle_timeout": 5}))
