"""The Ray adapters: a local Ray, the actor that embeds shards, and the board on which actors say what they are at."""

import io
import logging
import os
import pickle
import platform
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read when Ray is imported: no telemetry, no chatter, and a token of this run's own. Without it Ray writes one to the
# user's home, which a later `ray start` then asks for; with authentication off any process that reaches its port may
# run code here.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import RunConfig
from pipeline.embed import Embedder, Job, Receipt, worker_name
from pipeline.errors import UsageError
from pipeline.listing import Shard

DATA_SETTINGS = {
    "enable_progress_bars": False,
    "execution_no_progress_timeout_s": -1,  # our own watchdog sees inside a shard, Ray's does not
    "target_max_block_size": 1,  # bytes: each receipt is a block of its own and comes at once
}
OBJECT_STORE_BYTES = 200 * 2**20  # only receipts and shard listings pass through it
# One thread an actor is fastest on the CPU (two actors gave 1.1 to 1.2 of one actor's images/s on two cores), and each
# has a model and an interpreter of its own; 3 GB leave room beside pit_b's whole run of two, 4.8 GB with the driver.
CPU_ACTOR_BYTES = 3 * 2**30
# Ray starts dead workers again and again; what bounds it is ours: MAX_DEATHS a shard, and so many workers that died
# before they were ready.
RESTARTS = -1
MAX_FALSE_STARTS = 4
TICK_S = 1.0
SHARDS_A_CALL = 8  # several, so that reading goes on over shard ends; few, so that a lost actor repeats little
CALLS_AN_ACTOR = 4  # at least so many, so that the last ones even out
BOARD_TIMEOUT_S = 5.0


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this machine alone, quiet; one that runs in this process already is used, and left running."""
    ours = not ray.is_initialized()
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in DATA_SETTINGS}
    terminated = signal.getsignal(signal.SIGTERM)
    # Ray reports dead workers on stdout, which belongs to results; the run says so itself.
    with _native_stderr_silenced(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        try:
            start_ray()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts its own there, which exits with 15
            yield
        finally:
            if ours:
                ray.shutdown()
            for name, value in before.items():
                setattr(context, name, value)


def start_ray() -> None:
    """Starts Ray unless it runs here already, and sets what our one flow needs of Ray Data."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
    if not ray.is_initialized():
        # The workers import the checkout or the installation that this process runs from.
        home = str(Path(__file__).resolve().parent.parent)
        inherited = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (home, inherited) if p)
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    for name, value in DATA_SETTINGS.items():
        setattr(DataContext.get_current(), name, value)
    for logger in ("ray.data", "ray.data._internal.execution"):
        logging.getLogger(logger).setLevel(logging.ERROR)


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


class Board:
    """What each worker is at, and which shards it has under way; a Ray actor, since workers live in other processes.

    A worker is a process: one that was started again is another. So who began a shard and did not end it is dead.
    """

    def __init__(self) -> None:
        self._said: dict[str, dict[str, Any]] = {}
        self._started: set[str] = set()
        self._dead: set[str] = set()
        self._under_way: dict[str, set[str]] = {}  # shard → workers

    def start(self, who: str) -> None:
        self._started.add(who)

    def say(self, who: str, activity: dict[str, Any]) -> None:
        self._said[who] = activity

    def begin(self, who: str, shard: str) -> int:
        """How many others began the shard and did not end it."""
        dead = self._under_way.setdefault(shard, set()) - {who}
        self._under_way[shard].add(who)
        self._dead |= dead
        return len(dead)

    def end(self, shard: str) -> None:
        self._under_way.pop(shard, None)

    def read(self) -> tuple[int, int, dict[str, dict[str, Any]]]:
        """Workers started, how many of them got ready, and what those say that are not known to be dead."""
        alive = {who: activity for who, activity in self._said.items() if who not in self._dead}
        return len(self._started), len(self._said), alive


def make_board() -> Any:
    """On this node, which lives as long as the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=RESTARTS, scheduling_strategy=here)(Board).remote()


class EmbedShards:
    """Ray Data's callable: a batch of pickled shards in, a pickled receipt out for each as it is published."""

    def __init__(self, job: Job, board: Any):
        self._board, self._name = board, worker_name()
        _asked(board.start.remote(self._name), None)  # first: loading the model may be what kills it
        import torch

        from pipeline.backbone import load_backbone

        torch.set_num_threads(job.torch_threads)
        vectors = job.vectors
        backbone = load_backbone(
            vectors.model,
            Path(job.weights),
            job.adapt,
            precision=vectors.precision,
            device=job.device,
            classes=bool(vectors.top_k),
            top_k=vectors.top_k,
            batch_size=job.batch_size,
            tensors=vectors.tensors,
        )
        self._embedder = Embedder(job, backbone, self._deaths)
        threading.Thread(target=self._tick, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        for receipt in self._embedder([pickle.loads(shard) for shard in batch["shard"]]):
            self._board.end.remote(receipt.shard)
            yield {"receipt": [pickle.dumps(receipt)]}

    def _deaths(self, shard: str) -> int:
        return int(_asked(self._board.begin.remote(self._name, shard), 0))

    def _tick(self) -> None:
        while True:
            self._board.say.remote(self._name, asdict(self._embedder.activity))
            time.sleep(TICK_S)


def read_board(board: Any) -> tuple[int, int, dict[str, dict[str, Any]]]:
    """What `Board.read` gives; nothing while the board is not up or out of reach."""
    started, ready, said = _asked(board.read.remote(), (0, 0, {}))
    return int(started), int(ready), dict(said)


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


def pool(config: RunConfig, device: str, shards: int, todo: int) -> tuple[tuple[int, int], float, int]:
    """(least, most) actors, GPUs of each, threads of each, on this machine.

    Threads go by all shards of the listing, not by those to do: a resumed run computes with as many as the first, so
    that its vectors have the same bits.
    """
    resources = ray.cluster_resources()
    cpus = max(1, int(resources.get("CPU", 1)))
    if device == "cuda":
        gpus = 1.0 if config.gpus_per_actor is None else config.gpus_per_actor
        default = max(1, int(resources.get("GPU", 0) / gpus)) if gpus else 1
    else:
        gpus, default = 0.0, max(1, min(cpus, int(resources.get("memory", 0) / CPU_ACTOR_BYTES)))
    least, most = config.actors or (default, default)
    if gpus and least * gpus > resources.get("GPU", 0):
        raise UsageError(f"--actors {least} with {gpus} GPUs each: this machine has {resources.get('GPU', 0):.0f}")
    threads = max(1, cpus // max(1, min(most, shards)))
    most = max(1, min(most, todo))
    return (min(least, most), most), gpus, threads


def embed_on_ray(
    job: Job, shards: Sequence[Shard], board: Any, actors: tuple[int, int], gpus: float
) -> Iterator[Receipt]:
    """Receipts as they come: shards → actor pool → receipts. Vectors never pass through here."""
    cpus = ray.cluster_resources().get("CPU", 1.0) / (actors[1] + 1)  # actors that take all CPUs starve Ray's own
    a_call = max(1, min(SHARDS_A_CALL, len(shards) // (actors[1] * CALLS_AN_ACTOR)))
    receipts = (
        ray.data.from_items([{"shard": pickle.dumps(s)} for s in shards], override_num_blocks=-(-len(shards) // a_call))
        .map_batches(
            EmbedShards,
            fn_constructor_kwargs={"job": job, "board": board},
            compute=ActorPoolStrategy(min_size=actors[0], max_size=actors[1], initial_size=actors[1]),
            batch_size=a_call,
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        # Without prefetching, which would hold each receipt back until the next one is there.
        .iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
    )
    for batch in receipts:
        for receipt in batch["receipt"]:
            yield pickle.loads(receipt)
