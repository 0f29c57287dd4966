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
from pipeline.layout import Node

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
    """`auto` is bf16 where every node that may compute has it; on a cluster there is such a node when this returns.

    Raises `Stalled` where none comes, and `UsageError` where none could.
    """
    if not cluster.is_shared():
        return backbone.resolve_precision(config.precision, device)
    asked, ids = config.precision, [n.id for n in cluster.nodes() if (n.gpus if device == "cuda" else n.cpus)]
    if ids and asked != "auto" and device == "cpu":
        return asked

    def ask() -> str:
        backbone.resolve_device(device)  # torch there may know of no GPU, whatever Ray says
        return backbone.resolve_precision(asked, device)

    if not ids:
        if not cluster.can_grow():
            raise UsageError("no node of the cluster has a CPU that Ray could give, and no autoscaler could bring one")
        return str(_anywhere(ask, device, config, say))
    found = set(cluster.on_nodes(ask, ids, **({"num_gpus": A_BIT} if device == "cuda" else {})).values())
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

    return ray.put(np.fromfile(staged, np.uint8))


def _anywhere(ask: Callable[..., Any], device: str, config: RunConfig, say: Callable[[str], None], *given: Any) -> Any:
    """What `ask` gives on any node that has the device, one that the autoscaler has yet to bring included."""
    task = ray.remote(num_cpus=0, max_retries=3)(ask)
    answer = task.options(**({"num_gpus": A_BIT} if device == "cuda" else {"num_cpus": A_BIT})).remote(*given)
    started = time.monotonic()
    if not ray.wait([answer], timeout=SAY_S)[0]:
        say(f"waiting for a node with a {'GPU' if device == 'cuda' else 'CPU'}")
    if not ray.wait([answer], timeout=max(0.0, config.stall_timeout_s - (time.monotonic() - started)))[0]:
        ray.cancel(answer, force=True)
        raise Stalled(f"no progress for {config.stall_timeout_s:.0f} s in stage wait for a node that has the device")
    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as e:
        if isinstance(e.cause, UsageError):
            raise UsageError(str(e.cause)) from e
        raise
