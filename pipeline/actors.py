"""The Ray adapters: actors that embed shards, and the pool of them that takes its work off a board."""

import os
import pickle
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.board import Board, Told
from pipeline.build import build_id
from pipeline.cluster import check_build, cores, dead_nodes, here, node_id, ray
from pipeline.embed import Embedder, Feed, Job, Receipt, backbone_of, worker_name
from pipeline.errors import UsageError
from pipeline.feed import LocalFeed
from pipeline.feeders import RemoteFeed
from pipeline.layout import Layout
from pipeline.listing import Shard
from pipeline.process import keep_memory, leave_pandas_out

# Ray starts dead workers again and again; what bounds it is ours: MAX_DEATHS a shard, and so many workers that died
# before they were ready.
RESTARTS = -1
MAX_FALSE_STARTS = 4
TICK_S = 1.0
BOARD_SHARDS = 10_000  # that wait on the board at most, some 5 MB
ENDING_S = 10.0  # for workers that have nothing more to do
BOARD_TIMEOUT_S = 5.0
LOOK_EVERY_S = 5.0  # for nodes that have gone, or have come


class EmbedShards:
    """The worker: takes shards off the board until that is over."""

    def __init__(self, job: Job, board: Any, slot: int, build: dict[str, Any], content: Sequence[Any]):
        """`build`: the driver's; `content`: where to have the weights that this node lacks, or nothing."""
        self._board, self._slot, self._name = board, slot, worker_name()
        self._deaths: dict[str, int] = {}
        self._receipts = deque[tuple[str, bytes]]()  # that the board is to have with the next question
        self._is_idle, self._handed_in = False, None
        self._refused: UsageError | None = None
        _asked(board.start.remote(slot, self._name, node_id()), None)  # first: loading the model may be what kills it
        try:
            check_build(build, build_id())
        except UsageError as e:
            self._refused = e  # `run` raises it: of a constructor Ray would tell a traceback
            return
        keep_memory()
        leave_pandas_out()
        # Of its compiler, whose processes would stay beside each worker for what the driver has compiled already.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        import torch

        torch.set_num_threads(job.torch_threads)
        if content:
            from pipeline import weights  # late: what dies while it is imported has told that it started

            staged = weights.receive(job.vectors.weights_sha256, lambda: memoryview(ray.get(content[0])))
            job = replace(job, weights=str(staged))
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
        if self._refused:
            raise self._refused
        self._embedder(self._shards(), self._done)
        if self._handed_in is not None:
            _asked(self._handed_in, None)  # who has run is killed, and what it was sending may be lost

    def _shards(self) -> Iterator[Shard | None]:
        asked = None
        while True:
            asked = asked or self._board.take.remote(self._name, self._gathered())
            try:
                lent = ray.get(asked, timeout=BOARD_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:  # the same question again: it may have been lent to us meanwhile
                yield None
                continue
            except ray.exceptions.RayActorError:
                lent = False
            asked, self._is_idle = None, isinstance(lent, bool)
            if lent is True:
                self._hand_in()
                return
            if lent is False:
                yield None
            else:
                shard = pickle.loads(lent[0])
                self._deaths[shard.name] = lent[1]
                yield shard

    def _done(self, receipt: Receipt) -> None:
        """A call costs a millisecond here and one of the board: of tiny shards, receipts wait for the next question."""
        self._receipts.append((receipt.shard, pickle.dumps(receipt)))
        if self._is_idle:
            self._hand_in()

    def _hand_in(self) -> None:
        if receipts := self._gathered():
            self._handed_in = self._board.done.remote(receipts)

    def _gathered(self) -> list[tuple[str, bytes]]:
        receipts = []
        with suppress(IndexError):  # several threads take them out
            while True:
                receipts.append(self._receipts.popleft())
        return receipts

    def _tick(self) -> None:
        while True:
            self._hand_in()
            self._board.say.remote(self._slot, self._name, self._embedder.activity.said())
            time.sleep(TICK_S)


@dataclass
class News:
    """What has happened since the driver looked last; but for the receipts see `board.Told`."""

    receipts: list[Receipt]
    waiting: int = 0
    started: int = 0  # slots
    ready: int = 0
    died: int = 0
    false_starts: int = 0
    said: dict[str, dict[str, Any]] = field(default_factory=dict)


class Pool:
    """Actors that embed the shards of a board: a context that ends them. `read` tells what came of it.

    All that may be are asked for at once: those without room wait, and where the cluster can grow that makes it grow.
    When no shard is waiting, workers leave, down to the least number; when one waits again, others are asked for.
    """

    def __init__(self, job: Job, shards: Sequence[Shard], layout: Layout, content: Any = None):
        """`content`: of the weights' file, as Ray keeps it for nodes that lack it; None where all have it."""
        self._shards, self._given = shards, 0
        self._open = {shard.name for shard in shards}
        self._least, self._most = layout.actors
        self._board = ray.remote(num_cpus=0, max_restarts=RESTARTS, scheduling_strategy=here())(Board).remote()
        self._epoch, self._taken_in, self._looked = "", 0, 0.0
        self._seen: set[int] = set()  # slots that a worker has started in
        self.cores = 0  # of all nodes, the most that there were at once
        worker = ray.remote(
            num_cpus=layout.cpus,
            num_gpus=layout.gpus or None,
            memory=layout.memory or None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",
        )(EmbedShards)
        build, boxed = build_id(), () if content is None else (content,)  # a bare reference would be fetched anyway
        self._new = lambda slot: worker.remote(job, self._board, slot, build, boxed)
        self._actors: dict[int, Any] = {}  # by slot
        self._runs: dict[Any, int] = {}  # → slot
        self._slots = 0
        self._grow(self._most)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error the workers are killed; else they end by themselves, which leaves no scratch file."""
        if kind is None:
            self._board.end.remote()
            ray.wait(list(self._runs), num_returns=len(self._runs), timeout=ENDING_S)
        for actor in (*self._actors.values(), self._board):
            ray.kill(actor)

    @property
    def is_done(self) -> bool:
        return not self._open

    def read(self) -> News:
        """Receipts, one a shard, and how the workers are. Raises what ended a worker for good."""
        ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        for run in ended:
            ray.get(run)
            self._drop(self._runs[run])
        told: Told | None = _asked(self._board.read.remote(self._epoch, self._taken_in), None)
        if told is None:  # not up yet, or again
            return News([])
        if told.epoch != self._epoch:
            self._epoch, self._taken_in, self._given = told.epoch, 0, 0
        self._taken_in += len(told.receipts)
        receipts = [pickle.loads(r) for r in told.receipts]
        receipts = [r for r in receipts if r.shard in self._open]
        self._open -= {r.shard for r in receipts}
        self._breathe(told)
        self._look()
        if told.waiting < BOARD_SHARDS // 2:
            self._give(BOARD_SHARDS - told.waiting)
        return News(receipts, told.waiting, len(told.slots), told.ready, told.died, told.false_starts, told.said)

    def _breathe(self, told: Told) -> None:
        self._seen |= told.slots
        pending = [slot for slot in self._actors if slot not in self._seen]
        is_all_given = self._given == len(self._shards)
        more, to_drop = breath(len(self._actors), pending, told.waiting, (self._least, self._most), is_all_given)
        self._grow(more)
        for slot in to_drop:
            self._drop(slot)

    def _look(self) -> None:
        """Of a node that went Ray tells only who asks, and its workers are started again no sooner than one comes."""
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._board.lose.remote(dead_nodes())
            self.cores = max(self.cores, cores())

    def _grow(self, count: int) -> None:
        for slot in range(self._slots, self._slots + count):
            self._actors[slot] = self._new(slot)
            self._runs[self._actors[slot].run.remote()] = slot
            self._slots = slot + 1

    def _drop(self, slot: int) -> None:
        """Its room is free for others, or its node for the autoscaler to take down."""
        ray.kill(self._actors.pop(slot))
        self._runs = {run: of for run, of in self._runs.items() if of != slot}

    def _give(self, count: int) -> None:
        more: list[tuple[str, bytes]] = []
        if self._given == len(self._shards):
            return
        while self._given < len(self._shards) and len(more) < count:
            shard = self._shards[self._given]
            self._given += 1
            if shard.name in self._open:
                more.append((shard.name, pickle.dumps(shard)))
        if more:
            self._board.add.remote(more)
        if self._given == len(self._shards):
            self._board.let_go.remote(self._least)


def breath(
    actors: int, pending: Sequence[int], waiting: int, size: tuple[int, int], is_all_given: bool
) -> tuple[int, Sequence[int]]:
    """How many workers to ask for beside these, and slots of those to let go.

    `pending`: slots that no worker has ever started in. One that has may be at work though the board does not know it,
    which forgets everything when it is started again.
    """
    least, most = size
    if waiting > len(pending):
        return max(0, min(most - actors, waiting - len(pending))), ()
    if not waiting and is_all_given:
        return 0, pending[: max(0, actors - least)]
    return 0, ()


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
