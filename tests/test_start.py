"""What a schedule runs in Kubernetes: a copy of the one RayJob, asked of an API server."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_kubernetes import ApiServer
from test_deploy import KUBERAY, built, check, one

START = KUBERAY / "components" / "cronjob" / "start.py"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("account"), namespace="shard2vec", token="the-token") as server:
        yield server


def start(api: ApiServer, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = api.environment() | {"JOB_NAME": "shard2vec-29404935", "JOB_UID": "6d1f"} | changes
    return subprocess.run([sys.executable, "-I", START, "shard2vec"], env=environment, capture_output=True, text=True)


def test_the_start_creates_a_valid_run(api: ApiServer) -> None:
    """A copy that runs, under the name of the Job, which owns it; a pod that is tried again makes no second one."""
    template = one(built(("overlays/s3", "components/cronjob")), "RayJob")
    api.objects = {"shard2vec": template | {"status": {"jobStatus": ""}}}
    assert (done := start(api)).returncode == 0, done.stderr
    run = api.objects["shard2vec-29404935"]
    assert run["spec"] == template["spec"] | {"suspend": False}
    assert run["metadata"]["ownerReferences"][0] == {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": "shard2vec-29404935",
        "uid": "6d1f",
    }
    check(run)
    assert {request.headers["Authorization"] for request in api.requests} == {"Bearer the-token"}
    again = start(api)
    assert again.returncode == 0 and "is there already" in again.stdout
    assert len(api.objects) == 2


def test_a_long_name_keeps_what_tells_the_ticks_apart(api: ApiServer) -> None:
    """KubeRay takes RayJobs of up to 47 characters, which must begin with a letter."""
    api.objects = {"shard2vec": one(built(("base",)), "RayJob")}
    assert start(api, JOB_NAME="a-very-long-name-for-a-schedule-of-one-team-29404935").returncode == 0
    (name,) = set(api.objects) - {"shard2vec"}
    assert len(name) <= 47 and name.startswith("run-") and name.endswith("-29404935")


def test_what_the_api_server_refuses_is_told(api: ApiServer) -> None:
    """One sentence, and exit 1 so that the Job tries again."""
    api.objects = {}
    missing = start(api)
    assert missing.returncode == 1 and "404 rayjobs.ray.io shard2vec not found" in missing.stderr
    stranger = start(api, ACCOUNT_FOLDER=str(api.other_account()))
    assert stranger.returncode == 1 and "403 forbidden" in stranger.stderr
    nobody = start(api, KUBERNETES_SERVICE_PORT="1")
    assert nobody.returncode == 1 and "does not answer" in nobody.stderr
    assert all(len(done.stderr.strip().splitlines()) == 1 for done in (missing, stranger, nobody))


# Machines without Kubernetes
