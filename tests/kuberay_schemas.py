"""KubeRay's own schemas as strict JSON schemas: what its custom resources may hold, and nothing beside it.

They are read from its CustomResourceDefinitions, which this repository does not have: `KUBERAY_SCHEMAS` names a folder
of them, as `helm-chart/kuberay-operator/crds` of KubeRay, or a tar.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

VARIABLE = "KUBERAY_SCHEMAS"


def validators() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    """By (apiVersion, kind). Skips the test, with its reason, where no schemas are at hand."""
    where = os.environ.get(VARIABLE)
    if not where:
        pytest.skip(f"{VARIABLE} names no folder or tar of KubeRay's CRDs")
    found = {}
    for text in _texts(Path(where)):
        crd = yaml.load(text, yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # the API server's own part
            kind = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
            found[kind] = jsonschema.Draft202012Validator(schema)
    assert ("ray.io/v1", "RayJob") in found, f"{VARIABLE}={where} has no schema of RayJob"
    return found


def _texts(where: Path) -> Iterator[bytes]:
    if where.is_dir():
        yield from (path.read_bytes() for path in sorted(where.glob("*.yaml")))
        return
    with tarfile.open(where) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".yaml") else None
            if content is not None:
                yield content.read()


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes with the fields that it does not name refused, as the API server warns of them.

    What has a default need not be there: the server fills it in before it checks.
    """
    own = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    if schema.get("x-kubernetes-int-or-string"):
        own.pop("type", None)
        own.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    elif schema.get("nullable") and "type" in own:
        own["type"] = [own["type"], "null"]
    fields = own.get("properties")
    if fields is not None:
        own["properties"] = {name: _strict(field) for name, field in fields.items()}
        own["required"] = [name for name in own.get("required", ()) if "default" not in fields.get(name, {})]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            own.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(own.get(key), dict):
            own[key] = _strict(own[key])
    return own
