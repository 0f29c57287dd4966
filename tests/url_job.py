"""What every store is held to by its URLs alone: etags that move, and a small job through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import oracle
import safetensors.torch

from pipeline import open_dataset, versions
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.storage import is_unchanged, list_files, read_bytes
from pipeline.verify import verify

REPOSITORY = Path(__file__).resolve().parent.parent
INPUTS = ("a/one.tar", "a/two.tar", "three.tar.gz")  # of oracle.write_shards


def put(url: str, content: bytes) -> None:
    folder, _, name = url.rpartition("/")
    assert Root(folder).put_new(name, content)


def check_etags(bucket: str) -> None:
    """A listing and a look at the object agree; another content of the same size is another etag."""
    put(f"{bucket}/in/x.tar", b"abc")
    (before,) = list_files(f"{bucket}/in")
    assert is_unchanged(before) and list_files(before.url) == [before]
    Root(f"{bucket}/in").overwrite("x.tar", b"abd")
    assert not is_unchanged(before)
    (after,) = list_files(f"{bucket}/in/*.tar")
    assert (after.url, after.size) == (before.url, before.size) and after.etag != before.etag
    Root(f"{bucket}/in").delete("x.tar")
    assert not is_unchanged(after)


def call(*args: str, secrets: Sequence[str]) -> dict[str, Any]:
    """What a verb says with `--json`; it ends with 0 and shows no secret."""
    command = [sys.executable, "-m", "jobs", *args]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not shown(secrets, done.stderr + done.stdout)
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def shown(secrets: Sequence[str], text: str) -> list[str]:
    return [secret for secret in secrets if secret in text]


def embed_by_urls(root: str, shards: Path, secrets: Sequence[str]) -> None:
    """Puts input, weights, labels and job file below `root`, runs the job and proves its promises on what it wrote.

    Every sample once, by `verify`, in this process, which spares an import of torch; the right vectors and labels; no
    secret in any byte below the output or in the log.
    """
    for path in INPUTS:
        put(f"{root}/in/{path}", (shards / path).read_bytes())
    put(f"{root}/w/model.safetensors", safetensors.torch.save(oracle.module("test_vit", 3).state_dict()))
    put(f"{root}/labels.txt", "".join(f"thing {i}\n" for i in range(1000)).encode())
    job = {
        "input": [f"{root}/in"],
        "output": f"{root}/out",
        "model": "test_vit",
        "weights": f"{root}/w/model.safetensors",
        "labels": f"{root}/labels.txt",
        "precision": "fp32",
        "decode": "exact",
        "actors": 1,
        "max-reject-rate": 0.2,
        "json": True,
    }
    put(f"{root}/job.yaml", json.dumps(job).encode())
    told = call("embed", "--config", f"{root}/job.yaml", secrets=secrets)
    assert (told["version"], told["rows"], told["rejects"]) == (1, 21, oracle.REJECTS)
    out = Root(f"{root}/out")
    checked = verify(out, versions.current(out), list_shards([f"{root}/in"]))
    assert checked.clean and checked.ids == 24
    images = oracle.images_by_id(shards)
    found = {row["id"]: row for row in open_dataset(f"{root}/out").to_table().to_pylist()}
    want = oracle.expected("test_vit", list(images.values()), seed=3).embedding
    assert oracle.relative(np.array([found[i]["embedding"] for i in images]), want) < 1e-5
    assert all(row["topk_label"][0] == f"thing {row['topk_index'][0]}" for row in found.values())
    for entry in list_files(f"{root}/out"):
        content = read_bytes(entry.url)
        assert not [secret for secret in secrets if secret.encode() in content], entry.url
