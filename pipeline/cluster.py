"""The Ray that a run uses: one started here for it alone, or a running cluster, whose nodes must run this very code.

On a cluster what depends on the machine is asked on its nodes, by small tasks: code and versions, memory, devices, and
whether the engine keeps its promise there.
"""

import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from pipeline import head, reach

# isort: split
# After `head`, whose settings are read when Ray is imported.
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.build import PACKAGES, build_id, differences, package_folder
from pipeline.errors import UsageError
from pipeline.layout import Node
from pipeline.machine import memory_bytes

LOOK_S = 120.0  # for a node's answer: it starts a process, and may have to unpack our code
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the entry process of a job: its runtime environment
SHIPS = ("working_dir", "py_modules")
UNLIKE = 3  # nodes that are named

_memory: dict[str, int] = {}  # by node that was looked at


# connecting


@contextmanager
def used(address: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Within, this process is connected to the cluster at `address`, or to the one that it was connected to already.

    None where there is none: nothing happens then, and `local_ray` starts one. Raises `UsageError` for a cluster that
    cannot be reached, and for nodes that run other code; what Ray raises within becomes an `OSError`.
    """
    is_connected = ray.is_initialized()
    if is_connected and address not in (None, "auto") and _port(address) != _port(_gcs_address()):
        raise UsageError(f"--ray-address {address}: this process is connected to {_gcs_address()} already")
    if head.is_up() or (address is None and not is_connected):
        yield
        return
    with ExitStack() as stack:
        if not is_connected:
            assert address is not None
            stack.enter_context(head.reaching(address))
            reach.check(address)
        stack.enter_context(_quiet())
        stack.enter_context(plainly("Ray failed"))
        stack.callback(_memory.clear)
        if not is_connected:
            stack.callback(ray.shutdown)
            _connect(address)
        say(_same_code(address, is_connected))
        yield


@contextmanager
def local_ray(feeders: int = 0) -> Iterator[None]:
    """A Ray of this machine alone, quiet; one that this process is connected to is used, and left running.

    What Ray raises within becomes an `OSError`.
    """
    ours = not ray.is_initialized()
    with head.starting(feeders=feeders), _quiet(), plainly("Ray failed"):
        try:
            if ours:
                _connect(head.address())
            yield
        finally:
            if ours:
                ray.shutdown()


def is_shared() -> bool:
    """Whether this is a cluster that others use and set up, not the Ray of this run."""
    return ray.is_initialized() and not head.is_up()


def _connect(address: str | None, **more: Any) -> None:
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except SystemExit as e:
        if e.code == signal.SIGTERM:  # Ray puts a handler of its own there, which exits so
            raise KeyboardInterrupt from e
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)


@contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    # Ray reports dead workers on stdout, which belongs to results; the run says so itself.
    with _native_stderr_silenced(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Silences Ray's C++ core, which writes to file descriptor 2 past every Python setting.

    Meanwhile `sys.stderr` and the log handlers write to where descriptor 2 pointed, so Python is heard as before.
    """
    shown = sys.stderr
    if not isinstance(shown, io.TextIOWrapper) or shown is not sys.__stderr__ or shown.fileno() != 2:
        yield  # somebody captures it
        return
    shown.flush()
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    handlers = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is shown]
    for handler in handlers:
        handler.setStream(sys.stderr)  # type: ignore[attr-defined]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        sys.stderr = shown
        for handler in handlers:
            handler.setStream(shown)  # type: ignore[attr-defined]
        os.close(kept)


# its errors


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """What Ray raises, as of a node that went or a store that is full, becomes an `OSError` of one sentence."""
    try:
        yield
    except ray.exceptions.RayError as e:
        raise OSError(f"{what}: {cause(e)}") from e


def cause(error: BaseException) -> str:
    """The first line that helps, out of what Ray wraps around a worker's error."""
    while isinstance(error, ray.exceptions.RayTaskError) or error.__cause__ is not None:
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None or inner is error:
            break
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"


# the same code everywhere


def _same_code(address: str | None, is_fixed: bool) -> str:
    """Makes sure of it, and says how it got there. `is_fixed`: the connection is not ours to make again."""
    shipped = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    seen = _look()
    if is_alike := not _unlike(seen):
        how = "as the runtime environment of this job has it" if any(shipped.get(s) for s in SHIPS) else "as installed"
    elif not is_fixed and not any(shipped.get(s) for s in SHIPS):
        ray.shutdown()
        _connect(address, runtime_env={"py_modules": [str(package_folder(p)) for p in PACKAGES]})
        seen, how = _look(), "shipped by runtime environment"
        is_alike = not _unlike(seen)
    if not is_alike:
        named = "; ".join(f"node {name}: {', '.join(wrong)}" for name, wrong in _unlike(seen)[:UNLIKE])
        raise UsageError(f"the cluster would compute other vectors than this process names: {named}")
    told = sorted({t for _, found in seen.values() for t in differences(build_id(), found["build"])[1]})
    resources = ray.cluster_resources()
    parts = [f"{len(seen)} {'node' if len(seen) == 1 else 'nodes'}", f"{resources.get('CPU', 0):g} CPUs"]
    parts += [f"{resources['GPU']:g} GPUs"] if resources.get("GPU") else []
    code = f"shard2vec {build_id()['source']} on each, {how}"
    return f"cluster {_gcs_address()}: {', '.join(parts)}; {code}" + (f" (there {'; '.join(told)})" if told else "")


def _gcs_address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _port(address: str | None) -> str:
    return str(address).rpartition(":")[2]


def check_build(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises `UsageError` where this process, `theirs`, is not the program of the driver."""
    wrong, _ = differences(ours, theirs)
    if wrong:
        name = ray.util.get_node_ip_address()
        raise UsageError(f"node {name} would compute other vectors than the driver names: {', '.join(wrong)}")


def _look() -> dict[str, tuple[str, dict[str, Any]]]:
    """What each node that is alive says of itself: node → its name, `build` and `memory`, or `missing`."""

    def look() -> dict[str, Any]:  # a local function travels by value: the node may lack our packages
        try:
            from pipeline.build import build_id
            from pipeline.machine import memory_bytes
        except ImportError as e:
            return {"missing": str(e)}
        return {"build": build_id(), "memory": memory_bytes()}

    alive = {node["NodeID"]: _name(node) for node in ray.nodes() if node["Alive"]}
    found = on_nodes(look, alive)
    _memory.update({node: said["memory"] for node, said in found.items() if "memory" in said})
    return {node: (alive[node], said) for node, said in found.items()}


def _unlike(seen: dict[str, tuple[str, dict[str, Any]]]) -> list[tuple[str, list[str]]]:
    """Nodes that would compute something else, by name, with what differs."""
    ours = build_id()
    wrong = [
        (n, [f"it lacks our code: {s['missing']}"] if "missing" in s else differences(ours, s["build"])[0])
        for n, s in seen.values()
    ]
    return [(name, what) for name, what in wrong if what]


def on_nodes(ask: Callable[[], Any], ids: Iterable[str], **resources: float) -> dict[str, Any]:
    """What `ask` gives on each of these nodes, but for those that have gone. Takes no CPU.

    Raises `UsageError` for one that does not answer, or where `ask` raises.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {
        n: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False), **resources).remote()
        for n in ids
    }
    deadline, answers = time.monotonic() + LOOK_S, {}
    for node, answer in asked.items():
        try:
            answers[node] = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.RayTaskError as e:
            raise UsageError(f"node {_named(node)}: {e.cause}") from e
        except ray.exceptions.RayError as e:  # GetTimeoutError is one
            if not _is_alive(node):
                continue
            what = (
                f"no answer in {LOOK_S:.0f} s"
                if isinstance(e, ray.exceptions.GetTimeoutError)
                else str(e).split("\n")[0]
            )
            raise UsageError(f"node {_named(node)} cannot be used: {what}") from e
    return answers


# nodes


def nodes() -> list[Node]:
    """Those that are alive, with what Ray may give of each."""
    return [_node(node) for node in ray.nodes() if node["Alive"]]


def _node(node: dict[str, Any]) -> Node:
    has, name = node["Resources"], node["NodeID"]
    lendable = int(has.get("memory", 0))
    is_here = name == node_id()
    return Node(
        id=name,
        name=_name(node),
        cpus=int(has.get("CPU", 0)),
        gpus=float(has.get("GPU", 0)),
        memory=memory_bytes() if is_here else _memory.get(name, lendable),
        lendable=lendable,
    )


def can_grow() -> bool:
    """Whether the cluster has an autoscaler that could bring nodes; of which kinds, none of them tells (Ray 2.60)."""
    if not is_shared():
        return False
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():
        return False
    if _internal_kv_get(b"__autoscaler_v2_enabled", namespace=b"__autoscaler") == b"1":
        return True
    # The first generation also watches clusters that it cannot change: there each node is a kind of its own.
    report = json.loads(_internal_kv_get(b"__autoscaling_status") or "{}").get("autoscaler_report") or {}
    return any(not kind.startswith("node_") for kind in report.get("active_nodes") or {})


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _named(node_id: str) -> str:
    return next((_name(node) for node in ray.nodes() if node["NodeID"] == node_id), node_id[:8])


def _is_alive(node_id: str) -> bool:
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)


def dead_nodes() -> set[str]:
    return {str(node["NodeID"]) for node in ray.nodes() if not node["Alive"]}


def cores() -> int:
    """CPUs of all nodes that are alive."""
    return sum(node.cpus for node in nodes())


def node_id() -> str:
    """Of this process."""
    return str(ray.get_runtime_context().get_node_id())


def here() -> Any:
    """On this node, which lives as long as the run."""
    return NodeAffinitySchedulingStrategy(node_id(), soft=True)
