"""Where the vectors of a run are computed, and what that place can do: this machine, or the nodes of a cluster.

The driver's machine may have no GPU, or another processor than the nodes: what depends on it is asked there.
"""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline import backbone, cluster, cuda_images, engines, machine, weights
from pipeline.cluster import ray
from pipeline.config import RunConfig, VectorSet
from pipeline.errors import Stalled, UsageError
from pipeline.layout import Node, device_word, suits

A_BIT = 0.01  # of a GPU, for a task that asks what it can do
SAY_S = 5.0  # a wait of so long is told


def resolve_device(config: RunConfig) -> str:
    """cpu or cuda. On a cluster `auto` is cuda where Ray has GPUs to give, whatever the driver's machine has."""
    if not cluster.is_shared():
        return backbone.resolve_device(config.device)
    has_gpus = any(node.gpus for node in cluster.nodes())
    if config.device == "cuda" and not has_gpus and not cluster.can_grow():
        raise UsageError("--device cuda: no node of the cluster has a GPU, and no autoscaler could bring one")
    return ("cuda" if has_gpus else "cpu") if config.device == "auto" else config.device


def resolve_precision(config: RunConfig, device: str, say: Callable[[str], None]) -> str:
    """`auto` is bf16 where every node that may compute has it; on a cluster one is brought for it where none is there.

    One that is named is that one, and where no node is there none need come to name the set: a run may find nothing to
    do. Raises `Stalled` where none comes or all have gone meanwhile, and `UsageError` where none could come.
    """
    if not cluster.is_shared():
        return backbone.resolve_precision(config.precision, device)
    asked, ids = config.precision, [n.id for n in cluster.nodes() if suits(n, device)]
    if not ids and not cluster.can_grow():
        kind = device_word(device)
        raise UsageError(f"no node of the cluster has a {kind} that Ray could give, and no autoscaler could bring one")
    if asked != "auto" and (device == "cpu" or not ids):
        return asked

    def ask() -> str:
        backbone.resolve_device(device)  # torch there may know of no GPU, whatever Ray says
        return backbone.resolve_precision(asked, device)

    found = set(cluster.on_nodes(ask, ids, **({"num_gpus": A_BIT} if device == "cuda" else {})).values())
    if not found:  # none was there, or all have gone since
        if not cluster.can_grow():
            raise _none_left(device)
        return str(_anywhere(ask, device, config, say))
    return str(found.pop()) if len(found) == 1 else "fp32"


def check_decoding(config: RunConfig, device: str) -> None:
    """Raises `UsageError` where `--decode cuda` finds no decoder, on this machine or a node that is there now."""
    if config.decode != "cuda":
        return

    def ask() -> None:
        cuda_images.check_decoder(torch.device(device))

    if cluster.is_shared():
        cluster.on_nodes(ask, [node.id for node in cluster.nodes() if node.gpus], num_gpus=A_BIT)
    else:
        ask()
        torch.cuda.empty_cache()


def here() -> Node:
    """This machine, as Ray will find it."""
    memory = machine.memory_bytes()
    return Node(
        id="here",
        name=platform.node(),
        cpus=machine.cores(),
        gpus=torch.cuda.device_count(),
        memory=memory,
        lendable=memory,
    )


def nodes_for(config: RunConfig, device: str, say: Callable[[str], None]) -> list[Node]:
    """The nodes, one that has the device among them, which an autoscaler may have to bring.

    Raises `Stalled` where none comes or is left, and `UsageError` where torch there knows of no such device.
    """
    give_up = time.monotonic() + config.stall_timeout_s

    def ask() -> None:
        backbone.resolve_device(device)

    while True:
        nodes = cluster.nodes()
        if not cluster.is_shared() or any(suits(n, device) for n in nodes):
            return nodes
        if not cluster.can_grow() or time.monotonic() > give_up:  # as when each goes as soon as it has come
            raise _none_left(device)
        _anywhere(ask, device, config, say)


def resolve_engine(
    config: RunConfig,
    module: torch.nn.Module,
    vectors: VectorSet,
    device: str,
    threads: int,
    share_of_gpu: float,
    say: Callable[[str], None],
) -> tuple[str, str]:
    """`engines.resolve_engine` on a machine of the kind that computes; on a cluster the weights travel there."""
    settings: dict[str, Any] = {
        "precision": vectors.precision,
        "device": device,
        "batch_size": config.batch_size,
        "threads": threads,
        "weights_sha256": vectors.weights_sha256,
        "tensors": vectors.tensors,
        "classes": bool(vectors.top_k),
        "top_k": vectors.top_k,
        "share": share_of_gpu,
    }
    if not cluster.is_shared() or config.engine == "eager":
        return engines.resolve_engine(config.engine, module, **settings)
    digest, engine, model = vectors.weights_sha256, config.engine, config.model
    adapt = config.adapt.of_classes(vectors.classes)

    def ask(content: Any) -> tuple[str, str]:
        staged = weights.receive(digest, lambda: memoryview(content))
        return engines.resolve_engine(engine, weights.load_staged(model, staged, adapt), **settings)

    found: tuple[str, str] = _anywhere(ask, device, config, say, share(weights.stage(module, digest)))
    return found


def share(staged: Any) -> Any:
    """The bytes of a file in Ray's store, for nodes that lack it: neither a hub nor a shared disk is needed there."""
    import numpy as np

    with cluster.plainly("Ray's store does not take the weights"):
        return ray.put(np.fromfile(staged, np.uint8))


def _none_left(device: str) -> Stalled:
    return Stalled(f"no node with a {device_word(device)} is left, in stage look at the nodes")


def _anywhere(ask: Callable[..., Any], device: str, config: RunConfig, say: Callable[[str], None], *given: Any) -> Any:
    """What `ask` gives on any node that has the device, one that the autoscaler has yet to bring included.

    Raises `Stalled` where none comes in time, `UsageError` where `ask` does, and `OSError` where the node fails.
    """
    task = ray.remote(num_cpus=0, max_retries=3)(ask)
    answer = task.options(**({"num_gpus": A_BIT} if device == "cuda" else {"num_cpus": A_BIT})).remote(*given)
    started = time.monotonic()
    if not ray.wait([answer], timeout=SAY_S)[0]:
        say(f"waiting for a node with a {device_word(device)}")
    if not ray.wait([answer], timeout=max(0.0, config.stall_timeout_s - (time.monotonic() - started)))[0]:
        ray.cancel(answer, force=True)
        raise Stalled(f"no progress for {config.stall_timeout_s:.0f} s in stage wait for a node that has the device")
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UsageError):
            raise UsageError(str(e.cause)) from e
        raise _untold(e) from e
    except ray.exceptions.RayError as e:
        raise _untold(e) from e


def _untold(error: BaseException) -> OSError:
    return OSError(f"a node could not tell what it can do: {cluster.cause(error)}")
