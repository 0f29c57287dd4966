"""Starts a run: copies a suspended RayJob under the name of this pod's Job, and lets the copy run.

    python start.py NAME

Reads `JOB_NAME` and `JOB_UID` of the Job that this pod belongs to, which then owns the copy, and the pod's account. A
copy that is there already is this tick's own, by a pod before this one: that is a success. Exit 1 with one sentence for
what the API server refuses; the Job tries again. Needs Python alone.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path(os.environ.get("ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount"))
TIMEOUT_S = 30
MAX_NAME = 47  # KubeRay's for a RayJob: it makes longer names of it
CONFLICT = 409


def main(name: str) -> int:
    namespace = (ACCOUNT / "namespace").read_text().strip()
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    try:
        run = copy_of(ask("GET", f"{path}/{name}"), os.environ["JOB_NAME"], os.environ["JOB_UID"])
        ask("POST", path, run)
    except urllib.error.HTTPError as e:
        if e.code == CONFLICT:
            print(f"rayjob {os.environ['JOB_NAME']} is there already")
            return 0
        print(f"rayjob {name} in {namespace}: {e.code} {message(e)}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"the API server does not answer: {e}", file=sys.stderr)
        return 1
    print(f"rayjob {run['metadata']['name']} created")
    return 0


def copy_of(template: dict[str, Any], name: str, uid: str) -> dict[str, Any]:
    """A RayJob with the template's labels and spec, not suspended, owned by the Job of this name and uid."""
    kept = {"app.kubernetes.io/name": "shard2vec"} | template["metadata"].get("labels", {})
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {"name": short(name), "labels": kept, "ownerReferences": [owner]},
        "spec": template["spec"] | {"suspend": False},
    }


def short(name: str) -> str:
    """The name, or where KubeRay takes none so long, its end, which tells one tick from another."""
    return name if len(name) <= MAX_NAME else "run-" + name[4 - MAX_NAME :].strip("-.")


def ask(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The API server's answer, an object. Raises `HTTPError` for a refusal, `OSError` where nobody answers."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    request = urllib.request.Request(
        f"https://{f'[{host}]' if ':' in host else host}:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/json",
        },
        method=method,
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
    )  # no proxy stands between a pod and its API server
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        return dict(json.load(answer))


def message(e: urllib.error.HTTPError) -> str:
    """What the API server says of its refusal, in one line."""
    try:
        return str(json.load(e)["message"]).replace("\n", " ")
    except (ValueError, KeyError, TypeError):
        return str(e.reason)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: start.py NAME")
    sys.exit(main(sys.argv[1]))
