"""What a run asks of a cluster before it names its set, and before it works: with nodes that are yet to come, or go.

The cluster's answers are written down here: when a node goes between two questions no real one can be told.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from pipeline import cluster, site
from pipeline.config import RunConfig
from pipeline.errors import Stalled, UsageError
from pipeline.layout import Node


@dataclass
class Told:
    """`nodes`: at each look, the last one for ever; `able`: node → what it says, unless it has gone."""

    nodes: list[list[Node]]
    able: dict[str, str] = field(default_factory=dict)
    can_grow: bool = True
    brought: list[str] = field(default_factory=list)  # devices that a node was waited for with


def gpu_node(name: str) -> Node:
    return Node(id=name, name=name, cpus=16, gpus=1, memory=2**36, lendable=2**35)


HEAD = Node(id="head", name="head", cpus=0, gpus=0, memory=2**34, lendable=2**33)


def told(patch: pytest.MonkeyPatch, *nodes: list[Node], **more: Any) -> Told:
    known = Told(list(nodes), **more)

    def bring(ask: Any, device: str, *_: Any) -> str:
        known.brought.append(device)
        return "bf16"

    patch.setattr(cluster, "is_shared", lambda: True)
    patch.setattr(cluster, "nodes", lambda: known.nodes.pop(0) if len(known.nodes) > 1 else known.nodes[0])
    patch.setattr(cluster, "can_grow", lambda: known.can_grow)
    patch.setattr(cluster, "on_nodes", lambda ask, ids, **_: {n: known.able[n] for n in ids if n in known.able})
    patch.setattr(site, "_anywhere", bring)
    return known


def precision(asked: str, device: str = "cuda") -> str:
    return site.resolve_precision(config(precision=asked), device, lambda line: None)


def config(**asked: Any) -> RunConfig:
    return RunConfig(inputs=("x",), output="y", model="z", **asked)


def test_a_named_precision_needs_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a scheduled run that finds nothing to do brings none up; `auto` has to ask one."""
    known = told(monkeypatch, [HEAD])
    assert [precision("bf16"), precision("fp32", "cpu"), known.brought] == ["bf16", "fp32", []]
    assert precision("auto") == "bf16" and known.brought == ["cuda"]
    known.can_grow = False
    with pytest.raises(UsageError, match="no node of the cluster has a GPU that Ray could give, and no autoscaler"):
        precision("bf16")


def test_auto_is_what_all_nodes_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named one is asked of each too: torch there may know of no GPU."""
    known = told(monkeypatch, [HEAD, gpu_node("a"), gpu_node("b")], able={"a": "bf16", "b": "bf16"})
    assert precision("auto") == "bf16"
    known.able["b"] = "fp32"
    assert precision("auto") == "fp32" and known.brought == []


def test_nodes_that_go_while_they_are_asked_name_no_other_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a spot node that went nobody concludes fp32: another is asked, or the run can be resumed."""
    known = told(monkeypatch, [HEAD, gpu_node("a")])
    assert precision("bf16") == precision("auto") == "bf16" and known.brought == ["cuda", "cuda"]
    known.can_grow = False
    with pytest.raises(Stalled, match="no node with a GPU is left"):
        precision("bf16")


def test_work_waits_for_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """That was there when it was planned and has gone, or is yet to come; again where that one goes too."""
    there = [HEAD, gpu_node("b")]
    known = told(monkeypatch, [HEAD], [HEAD], there)
    assert site.nodes_for(config(), "cuda", lambda line: None) == there and known.brought == ["cuda", "cuda"]
    known = told(monkeypatch, [HEAD])
    clock = itertools.count(0.0, 400.0)
    with monkeypatch.context() as patch, pytest.raises(Stalled, match="no node with a GPU is left"):
        patch.setattr("pipeline.site.time.monotonic", lambda: next(clock))
        site.nodes_for(config(stall_timeout_s=600.0), "cuda", lambda line: None)
    assert known.brought == ["cuda"], "each goes as soon as it has come"
    known = told(monkeypatch, [HEAD], can_grow=False)
    with pytest.raises(Stalled, match="no node with a GPU is left"):
        site.nodes_for(config(), "cuda", lambda line: None)
    assert known.brought == []


def test_what_ray_raises_is_a_sentence() -> None:
    """As where a node dies or Ray's store is full: exit 1 with the reason, no traceback."""
    with pytest.raises(OSError, match="Ray failed: ObjectStoreFullError: no room"), cluster.plainly("Ray failed"):
        raise ray.exceptions.ObjectStoreFullError("no room")
    with pytest.raises(UsageError, match="as it is"), cluster.plainly("Ray failed"):
        raise UsageError("as it is")
