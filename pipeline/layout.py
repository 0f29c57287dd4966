"""The nodes of a cluster → the pool of a run: how many workers, how large each is, and whether others read for them.

Every size is that of one node and not of a sum: a worker has to fit somewhere. No Ray in here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.machine import CPU_WORKER_BYTES, WORKERS_SHARE, cpu_workers

# On a GPU, Python's lock is what one process cannot get past: 0.10 ms an image with the fast decode, 0.40 with Pillow's
# (9,700 and 2,500 images/s at most), beside batching and the forward pass's launches. A core decodes 790 and 375
# images/s of 500x375 pixels, so five threads keep the lock two fifths and three quarters busy. More than four actors
# a GPU only take turns on it. 16 cores: three actors of five threads. Arithmetic on figures of the CPU: not yet
# measured beside a GPU.
CUDA_ACTOR_THREADS = 5
CUDA_ACTORS = 4
CUDA_ACTOR_BYTES = 6 * 2**30  # of the host: CUDA's libraries, the model, a pinned ring, images that wait
UNITS = 10_000  # Ray counts in these parts of a CPU and of a GPU
# Of the CPUs that a worker uses, what it asks Ray for: a node's last CPU is never wholly taken, and no worker more
# than the plan has fits on a node of less than ten.
ASKED = 0.9
FORMER = 1.0  # times the GPU nodes' own CPUs: with fewer elsewhere, feeders lose more by sending pixels than they bring


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine that Ray has."""

    id: str
    name: str
    cpus: int
    gpus: float
    memory: int  # bytes that its processes may use
    lendable: int  # … of which Ray lends so many to those who ask it


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pool of workers that are all alike."""

    actors: tuple[int, int]  # least and most
    cpus: float  # of each, as Ray counts them
    gpus: float  # of each; may be a fraction
    memory: int  # bytes of each that Ray counts; 0: none
    threads: int  # of each, that decode, and on the CPU compute
    feeders: int  # of each: processes that read and decode for it, a CPU each; 0: it does so itself


def lay_out(
    config: RunConfig, device: str, nodes: Sequence[Node], shards: int, todo: int, can_grow: bool = False
) -> Layout:
    """`can_grow`: an autoscaler brings nodes for workers that find no room; `todo`: shards, of all `shards`.

    Sizes go by all shards and not by those to do: on the same nodes a resumed run computes with as many threads as the
    first, so that its vectors have the same bits. On a cluster that has other nodes by then they may differ, by
    float32 rounding. Nodes that come later are taken for such as are there.
    Raises `UsageError` for what this cluster can never give.
    """
    places = [n for n in nodes if suits(n, device)]
    if not places:
        raise UsageError(f"no node has a {device_word(device)} that Ray could give")
    if device == "cuda":
        gpus, default = _on_gpus(config, places, can_grow)
    else:
        gpus, default = 0.0, sum(cpu_workers(n.cpus, n.memory) for n in places)
    least, most = config.actors or (default, default)
    memory = _memory_each(places) if device == "cpu" and (can_grow or len(nodes) > 1) else 0
    room = [_room(n, gpus, memory, most) for n in places]
    if gpus and not can_grow and least > sum(room):
        raise UsageError(f"--actors {least} with {gpus:g} GPUs each: there {_are(sum(n.gpus for n in nodes))}")
    threads = _threads_each([n.cpus for n in places], room, min(most, shards))
    feeders = _feeders(config, device, nodes, places, most, min(most, sum(room)), can_grow)
    least, most = max(1, min(least, todo)), max(1, min(most, todo))
    return Layout(
        actors=(least, most),
        cpus=_cpus_each(places, device, threads, 0 if can_grow else least, most * feeders),
        gpus=gpus,
        memory=memory,
        threads=threads,
        feeders=feeders,
    )


def threads_alone(config: RunConfig, cpus: int, memory: int, shards: int) -> int:
    """The threads that `lay_out` gives each worker on one machine of the CPU, before there is a Ray to ask."""
    most = config.actors[1] if config.actors else cpu_workers(cpus, memory)
    return _threads_each([cpus], [most], min(most, shards))


def suits(node: Node, device: str) -> bool:
    """Whether workers may compute there."""
    return node.gpus > 0 if device == "cuda" else node.cpus > 0


def device_word(device: str) -> str:
    return "GPU" if device == "cuda" else "CPU"


def _are(gpus: float) -> str:
    return f"is {gpus:g}" if gpus == 1 else f"are {gpus:g}"


def _times(whole: float, part: float) -> int:
    """How often it fits, but for rounding."""
    return int(whole / part + 1e-6)


def _room(node: Node, gpus: float, memory: int, most: int) -> int:
    """How many workers Ray puts there, whatever their CPUs: by its GPUs, or by memory where Ray counts that."""
    if gpus:
        return _times(node.gpus, gpus)
    return node.lendable // memory if memory else most


def _on_gpus(config: RunConfig, places: Iterable[Node], can_grow: bool) -> tuple[float, int]:
    """GPUs of each actor, and how many actors there are unless `--actors` says it.

    Where the cluster can grow `--actors` asks for more than the GPUs that are there, which is no reason to crowd them.
    """
    gpus = [(n, max(1, int(n.gpus))) for n in places]
    total = sum(count for _, count in gpus)
    if config.gpus_per_actor is not None:
        each = config.gpus_per_actor
        return each, max(1, sum(_times(n.gpus, each) for n, _ in gpus)) if each else 1
    by_cores = min(n.cpus // count // CUDA_ACTOR_THREADS for n, count in gpus)
    by_memory = min(int(WORKERS_SHARE * n.memory) // count // CUDA_ACTOR_BYTES for n, count in gpus)
    on_each = max(1, min(by_cores, CUDA_ACTORS, by_memory))
    if config.actors is not None:
        even = -(-config.actors[1] // total)
        on_each = min(even, on_each) if can_grow else even
    return math.floor(UNITS / on_each) / UNITS, on_each * total


def _threads_each(cpus: Sequence[int], room: Sequence[int], busy: int) -> int:
    """The most that workers have at once, as many as are ever `busy` and find `room`, each within one node.

    No more of them share these nodes than these have room for, however many others an autoscaler brings.
    """
    workers = max(1, min(busy, sum(room)))
    threads = max(1, sum(cpus) // workers)
    while threads > 1 and sum(min(c // threads, r) for c, r in zip(cpus, room, strict=True)) < workers:
        threads -= 1
    return threads


def _feeders(
    config: RunConfig,
    device: str,
    nodes: Sequence[Node],
    places: Sequence[Node],
    most: int,
    at_once: int,
    can_grow: bool,
) -> int:
    """Of each actor. Left to us: all CPUs, where nodes without a GPU have more of them than those with one.

    `at_once`: actors that these nodes have room for, of `most`.
    """
    cpus = sum(n.cpus for n in nodes)
    if config.feeders is not None:
        if config.feeders > cpus and not can_grow:
            raise UsageError(f"--feeders {config.feeders}: there are {cpus} CPUs, and each takes one")
        return -(-config.feeders // (most if can_grow else max(1, at_once)))
    own, gpus = sum(n.cpus for n in places), sum(n.gpus for n in places)
    if device == "cpu" or config.decode == "cuda" or cpus - own <= FORMER * own:
        return 0
    if own >= gpus * CUDA_ACTOR_THREADS * CUDA_ACTORS:  # they have all that Python's locks can use
        return 0
    return max(0, cpus - 1) // max(1, at_once)


def _cpus_each(places: Sequence[Node], device: str, threads: int, workers: int, feeders: int) -> float:
    """Of each worker, so that as many fit: the CPUs of feeders are set aside first. 0: they need none to start."""
    whole = [n.cpus for n in places if n.cpus]
    if feeders:
        each = 0.0 if device == "cuda" else max(0, sum(whole) - feeders) / (workers + 1)
    else:
        each = float(threads)
        if whole and _fitting(whole, each) < workers:  # more than there are CPUs, as somebody may ask
            shares = (cpus / parts for cpus in set(whole) for parts in range(1, workers + 1))
            each = max(share for share in shares if _fitting(whole, share) >= workers)
        each *= ASKED
    return math.floor(each * UNITS) / UNITS if whole else 0.0


def _fitting(whole: Iterable[int], each: float) -> int:
    return sum(_times(cpus, each) for cpus in whole)


def _memory_each(places: Sequence[Node]) -> int:
    """Where memory binds before cores do, Ray counts it too, or a small node would get a large one's workers."""
    if all(cpu_workers(n.cpus, n.memory) == n.cpus for n in places):
        return 0
    return min(CPU_WORKER_BYTES, *(n.lendable // cpu_workers(n.cpus, n.memory) for n in places))
