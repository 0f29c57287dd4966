"""Runs on real clusters of several nodes: the same code on each, weights once a node, nodes that come and go."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_job import REPOSITORY, ended
from cluster_job import IMAGES, SHARDS, published
from clusters import Nodes, autoscaling, processes, until
from containers import write_tar
from pictures import jpeg

from pipeline import readers
from pipeline.build import build_id
from pipeline.errors import UsageError
from pipeline.reach import check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `cluster_job.py` saw."""
    script = [sys.executable, str(Path(__file__).with_name("cluster_job.py")), str(tmp_path_factory.mktemp("c"))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_node_that_is_killed_costs_no_sample(found: dict[str, Any]) -> None:
    """The run goes on with what there is, and every id is there once, in the bits of the set that it named."""
    first = found["first"]
    assert first["exit_code"] == 0, first["message"]
    assert first["json"]["samples"] == first["json"]["rows"] == SHARDS * IMAGES and first["json"]["version"] == 1
    assert 2 <= found["seen"]["published"] < SHARDS and found["verify"]
    assert f"shard2vec {build_id()['source']} on each, as installed" in first["said"][0]
    assert "2 nodes, 2 CPUs, 1 GPUs" in first["said"][0]


def test_a_node_gets_the_weights_from_the_driver(found: dict[str, Any]) -> None:
    """Under their SHA-256 in its own cache, and nothing else is left there."""
    described = found["seen"]["files"]
    assert found["seen"]["staged"] and len(described) == 1 and len(described[0].partition(".")[0]) == 64


def test_a_node_of_another_day_gets_our_code_or_is_refused(found: dict[str, Any]) -> None:
    """Sent by runtime environment where the connection is ours to make; else the node and the difference are named."""
    ours = build_id()["source"]
    assert "shard2vec's source" in found["fixed"] and f"here {ours}" in found["fixed"] and "node " in found["fixed"]
    halves = found["halves"]  # on that node
    assert f"shard2vec {ours} on each, shipped by runtime environment" in halves["said"][0]
    assert halves["errors"] == [] and halves["samples"] == SHARDS * IMAGES


def test_packages_that_decide_a_vector_must_be_the_drivers(found: dict[str, Any]) -> None:
    """The node and both versions are named, before any work."""
    assert f"timm 0.9.1, here {build_id()['versions']['timm']}" in found["versions"]


def test_a_gpu_that_torch_does_not_know_is_no_device(found: dict[str, Any]) -> None:
    """Ray says that a node has one; torch there, asked by a task, does not: nothing is begun."""
    assert "--device cuda: no CUDA device is here" in found["device"] and "node " in found["device"]


def test_fractions_of_a_gpu_are_shared(found: dict[str, Any]) -> None:
    """Two workers of a half take it; a third finds no room, and nobody waits for it."""
    halves = found["halves"]
    assert halves["layout"] == [1, 3, 0.5] and halves["left"] == 0.0
    assert halves["started"] <= 2
    assert halves["cores"] == 3, "the head's one, and the node's two"


def test_a_wrong_token_and_none_are_told(found: dict[str, Any]) -> None:
    """At once, where Ray's own client tries for half a minute and gives no reason."""
    assert "the cluster refuses this token" in found["tokens"]["wrong"]
    assert "the cluster asks for a token: set RAY_AUTH_MODE=token" in found["tokens"]["none"]


@pytest.fixture(scope="module")
def growing() -> Iterator[tuple[Nodes, Any]]:
    assert os.environ["RAY_AUTH_MODE"] == "token"  # this process's own, which a Ray that it uses already has too
    with autoscaling(most=2, idle_s=3, CPU=1) as (nodes, count):
        yield nodes, count


def started(folder: Path, address: str, *more: object) -> "subprocess.Popen[str]":
    asked = ["embed", "--input", folder / "in", "--output", folder / "out", "--model", "pit_ti_224"]
    asked += ["--weights", "random:0", "--precision", "fp32", "--batch-size", 2, "--ray-address", address, "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, [*asked, *more])],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_pool_grows_the_cluster_and_lets_it_shrink(growing: tuple[Nodes, Any], tmp_path: Path) -> None:
    """Ray's autoscaler starts nodes for the workers that wait, and takes them down when the run is over.

    A driver that is killed takes its workers along; the same command goes on.
    """
    nodes, count = growing
    for s in range(SHARDS):
        write_tar(tmp_path / "in" / f"s{s:02d}.tar", {f"{i:03d}.jpg": jpeg(60, 50, seed=i % 5) for i in range(IMAGES)})
    run = started(tmp_path, nodes.address, "--actors", "1:3")
    assert until(lambda: published(tmp_path / "out") >= 1 or run.poll() is not None)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert until(lambda: not processes(str(nodes.address.rpartition(":")[2]), "ray::EmbedShards"), 60)
    run = started(tmp_path, nodes.address, "--actors", "1:3")
    assert until(lambda: count() == 2 or run.poll() is not None) and count() == 2
    code, told, said = ended(run)
    assert code == 0, said
    assert told["rows"] == SHARDS * IMAGES and told["shards_unchanged"] >= 1
    assert len(readers.open_dataset(str(tmp_path / "out")).to_table(["id"])) == SHARDS * IMAGES
    assert until(lambda: count() == 0, 60), "the nodes are idle"


def test_nobody_there_is_told_at_once() -> None:
    """Ray's own client gives up after three minutes, and ends the process."""
    with pytest.raises(UsageError, match=r"--ray-address 127.0.0.1:1: nobody answers there: .*refused"):
        check("127.0.0.1:1")
