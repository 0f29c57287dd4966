"""The Ray adapters: a local Ray, the actors that embed shards, and the pool of them that takes its work off a board."""

import io
import logging
import math
import os
import pickle
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import head

# isort: split
# After `head`, whose settings are read when Ray is imported.
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import machine
from pipeline.board import Board, Told
from pipeline.config import RunConfig
from pipeline.embed import Embedder, Feed, Job, Receipt, backbone_of, worker_name
from pipeline.errors import UsageError
from pipeline.feed import LocalFeed
from pipeline.feeders import RemoteFeed
from pipeline.listing import Shard
from pipeline.machine import cpu_workers, memory_bytes

# On a GPU, Python's lock is what one process cannot get past: 0.10 ms an image with the fast decode, 0.40 with Pillow's
# (9,700 and 2,500 images/s at most), beside batching and the forward pass's launches. A core decodes 790 and 375
# images/s of 500x375 pixels, so five threads keep the lock two fifths and three quarters busy. More than four actors
# a GPU only take turns on it. 16 cores: three actors of five threads. Arithmetic on figures of the CPU: not yet
# measured beside a GPU.
CUDA_ACTOR_THREADS = 5
CUDA_ACTORS = 4
CUDA_ACTOR_BYTES = 6 * 2**30  # of the host: CUDA's libraries, the model, a pinned ring, images that wait
GPU_UNITS = 10_000  # Ray counts in these parts of a GPU
# Ray starts dead workers again and again; what bounds it is ours: MAX_DEATHS a shard, and so many workers that died
# before they were ready.
RESTARTS = -1
MAX_FALSE_STARTS = 4
TICK_S = 1.0
BOARD_SHARDS = 10_000  # that wait on the board at most, some 5 MB
ENDING_S = 10.0  # for workers that have nothing more to do
BOARD_TIMEOUT_S = 5.0


@contextmanager
def local_ray(feeders: int = 0) -> Iterator[None]:
    """A Ray of this machine alone, quiet; one that runs in this process already is used, and left running."""
    ours = not ray.is_initialized()
    terminated = signal.getsignal(signal.SIGTERM)
    # Ray reports dead workers on stdout, which belongs to results; the run says so itself.
    with (
        head.starting(feeders=feeders),
        _native_stderr_silenced(),
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
    ):
        try:
            start_ray()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts its own there, which exits with 15
            yield
        finally:
            if ours:
                ray.shutdown()


def start_ray() -> None:
    """Connects to the Ray that `head` starts, unless there is one here already."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    if not ray.is_initialized():
        ray.init(address=head.address(), log_to_driver=False, logging_level=logging.ERROR)


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


class EmbedShards:
    """The worker: takes shards off the board until that is over."""

    def __init__(self, job: Job, board: Any, slot: int):
        self._board, self._name = board, worker_name()
        self._deaths: dict[str, int] = {}
        _asked(board.start.remote(slot, self._name), None)  # first: loading the model may be what kills it
        # Of its compiler, whose processes would stay beside each worker for what the driver has compiled already.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        import torch

        torch.set_num_threads(job.torch_threads)
        backbone = backbone_of(job)
        self._embedder = Embedder(job, backbone, self._feed(job, backbone.batch_size))
        threading.Thread(target=self._tick, daemon=True).start()

    def _feed(self, job: Job, batch_size: int) -> Feed:
        def deaths(shard: str) -> int:
            return self._deaths.pop(shard, 0)

        if job.feeders:
            return RemoteFeed(job.vectors, job.feeders, deaths)
        return LocalFeed(job.vectors, job.decode_threads, batch_size, deaths)

    def run(self) -> None:
        self._embedder(self._shards(), self._done)

    def _shards(self) -> Iterator[Shard | None]:
        while True:
            lent = _asked(self._board.take.remote(self._name), False)
            if lent is True:
                return
            if lent is False:
                yield None
            else:
                shard = pickle.loads(lent[0])
                self._deaths[shard.name] = lent[1]
                yield shard

    def _done(self, receipt: Receipt) -> None:
        self._board.done.remote(receipt.shard, pickle.dumps(receipt))

    def _tick(self) -> None:
        while True:
            self._board.say.remote(self._name, self._embedder.activity.said())
            time.sleep(TICK_S)


@dataclass
class News:
    """What has happened since the driver looked last."""

    receipts: list[Receipt]
    started: int = 0
    ready: int = 0
    said: dict[str, dict[str, Any]] = field(default_factory=dict)


class Pool:
    """Actors that embed the shards of a board: a context that ends them. `read` tells what came of it."""

    def __init__(self, job: Job, shards: Sequence[Shard], actors: int, gpus: float):
        """`gpus`: of each actor; it may be a fraction."""
        self._shards, self._given = shards, 0
        self._open = {shard.name for shard in shards}
        self._board = ray.remote(num_cpus=0, max_restarts=RESTARTS, scheduling_strategy=_here())(Board).remote()
        self._epoch, self._taken_in = "", 0
        free = ray.cluster_resources().get("CPU", 1.0) - job.feeders * actors
        cpus = max(0.0, free) / (actors + 1)  # room for what else runs on Ray
        worker = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",
        )(EmbedShards)
        self._actors = [worker.remote(job, self._board, slot) for slot in range(actors)]
        self._runs = [actor.run.remote() for actor in self._actors]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error the workers are killed; else they end by themselves, which leaves no scratch file."""
        if kind is None:
            self._board.end.remote()
            ray.wait(self._runs, num_returns=len(self._runs), timeout=ENDING_S)
        for actor in (*self._actors, self._board):
            ray.kill(actor)

    @property
    def is_done(self) -> bool:
        return not self._open

    def read(self) -> News:
        """Receipts, one a shard, and how the workers are. Raises what ended a worker for good."""
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        for run in ended:
            ray.get(run)
        told: Told | None = _asked(self._board.read.remote(self._epoch, self._taken_in), None)
        if told is None:  # not up yet, or again
            return News([])
        if told.epoch != self._epoch:
            self._epoch, self._taken_in, self._given = told.epoch, 0, 0
        self._taken_in += len(told.receipts)
        receipts = [pickle.loads(r) for r in told.receipts]
        receipts = [r for r in receipts if r.shard in self._open]
        self._open -= {r.shard for r in receipts}
        if told.waiting < BOARD_SHARDS // 2:
            self._give(BOARD_SHARDS - told.waiting)
        return News(receipts, told.started, told.ready, told.said)

    def _give(self, count: int) -> None:
        more: list[tuple[str, bytes]] = []
        while self._given < len(self._shards) and len(more) < count:
            shard = self._shards[self._given]
            self._given += 1
            if shard.name in self._open:
                more.append((shard.name, pickle.dumps(shard)))
        if more:
            self._board.add.remote(more)


def _here() -> Any:
    """On this node, which lives as long as the run."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def kill(workers: Iterable[str]) -> None:
    """Those of this machine, by name: Ray only asks a worker to end, and one that hangs may not hear it."""
    for worker in workers:
        host, pid, _ = worker.rsplit(":", 2)
        with suppress(OSError):  # it has ended
            if host == platform.node() and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                os.kill(int(pid), signal.SIGKILL)


def _asked(answer: Any, otherwise: Any) -> Any:
    try:
        return ray.get(answer, timeout=BOARD_TIMEOUT_S)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return otherwise


def cause(error: BaseException) -> str:
    """The first line that helps, out of what Ray wraps around a worker's error."""
    while isinstance(error, ray.exceptions.RayTaskError) or error.__cause__ is not None:
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None or inner is error:
            break
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"


def cores() -> int:
    """Of all machines that Ray has."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _nodes() -> int:
    """Machines that Ray has, taken to be like this one."""
    return max(1, sum(node["Alive"] for node in ray.nodes()))


def size(config: RunConfig, device: str, shards: int, todo: int) -> tuple[tuple[int, int], float, int]:
    """(least, most) actors, GPUs of each, threads of each, on this machine.

    Threads go by all shards of the listing, not by those to do: a resumed run computes with as many as the first, so
    that its vectors have the same bits.
    """
    resources, cpus = ray.cluster_resources(), cores()
    if device == "cuda":
        gpus, default = _on_gpus(config, int(resources.get("GPU", 0)), cpus, int(resources.get("memory", 0)))
    else:
        gpus, default = 0.0, cpu_workers(cpus, memory_bytes() * _nodes())
    least, most = config.actors or (default, default)
    if gpus and least * gpus > resources.get("GPU", 0):
        raise UsageError(f"--actors {least} with {gpus:g} GPUs each: this machine has {resources.get('GPU', 0):.0f}")
    if config.feeders > cpus:
        raise UsageError(f"--feeders {config.feeders}: there are {cpus} CPUs, and each takes one")
    threads = _threads_each(cpus, most, shards)
    most = max(1, min(most, todo))
    return (min(least, most), most), gpus, threads


def _on_gpus(config: RunConfig, gpus: int, cpus: int, memory: int) -> tuple[float, int]:
    """GPUs of each actor, and how many actors there are unless `--actors` says it."""
    if config.gpus_per_actor is not None:
        each = config.gpus_per_actor
        return each, max(1, int(gpus / each + 1e-9)) if each else 1
    if config.actors is not None:
        on_each = -(-config.actors[1] // max(1, gpus))
    else:
        room = memory // max(1, gpus) // CUDA_ACTOR_BYTES
        on_each = max(1, min(cpus // max(1, gpus) // CUDA_ACTOR_THREADS, CUDA_ACTORS, room))
    return math.floor(GPU_UNITS / on_each) / GPU_UNITS, on_each * max(1, gpus)


def likely_threads(config: RunConfig, shards: int) -> int:
    """The threads of `size` on this machine alone, before there is a Ray to ask."""
    cpus = machine.cores()
    return _threads_each(cpus, config.actors[1] if config.actors else cpu_workers(cpus, memory_bytes()), shards)


def _threads_each(cpus: int, most: int, shards: int) -> int:
    return max(1, cpus // max(1, min(most, shards)))
