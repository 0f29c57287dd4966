"""The second plan: processes that read and decode anywhere in the cluster, for actors that have too few cores for it.

    feeders: shard → chunks of decoded samples, through Ray's object store → `RemoteFeed` in the actor

An actor's feeders work on a shard each, so it has several under way; each keeps its order, so batches, and with them
every bit of the output, are those of an actor that reads by itself. Only pixels and keys travel, never encoded images.
"""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pipeline.build import build_id
from pipeline.cluster import check_build, ray
from pipeline.config import VectorSet
from pipeline.feed import MAX_DEATHS, NOTHING_S, Ended, Fed, LocalFeed, Outcome
from pipeline.flow import Flow
from pipeline.images import Decoded
from pipeline.listing import Shard
from pipeline.shards import Sample

CHUNK_IMAGES = 32
CHUNK_BYTES = 8 * 2**20  # of pixels, where images are large
CHUNKS_AHEAD = 2  # of each stream: one on its way, one being filled
STREAM = {"num_returns": "streaming", "_generator_backpressure_num_objects": CHUNKS_AHEAD}
STREAMS = 2  # shards under way in a feeder: while one's first bytes are waited for, the other is decoded
# What tells that a feeder is gone: it died, or Ray ended it for want of memory; its node died, and with it the chunk.
GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
ELSEWHERE = np.empty(0, np.uint8)  # in the place of pixels that lie in a chunk's own array


class Chunk(NamedTuple):
    """Consecutive samples of a shard. Pixels of those that were decoded are the next of `pixels`."""

    pixels: np.ndarray  # uint8 (n, C, H, W)
    samples: list[Sample]
    outcomes: list[Outcome]
    ended: Ended | None  # with the last one


class Feeder:
    """A Ray actor that reads and decodes with one core."""

    def __init__(self, vectors: VectorSet, build: dict[str, Any]):
        """`build`: of the worker that it feeds."""
        self._build, self._deaths = build, dict[str, int]()
        self._chunk = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // math.prod(vectors.preprocessing.input_size)))
        self._feed = LocalFeed(vectors, 1, self._chunk, lambda shard: self._deaths.get(shard, 0))

    def ready(self) -> None:
        """Answers once the constructor has run. Raises `UsageError` where this node has other code."""
        check_build(self._build, build_id())

    def feed(self, shard: Shard, seen: int, deaths: int) -> Iterator[Chunk]:
        """The shard's samples but for the first `seen`, whose receiver has them from a feeder that died."""
        self._deaths[shard.name] = deaths
        waiting: list[Fed] = []
        for n, fed in enumerate(self._feed([shard], Flow(), _unwatched)):
            if n >= seen or fed.sample is None:
                waiting.append(fed)
            if fed.sample is None or len(waiting) == self._chunk:
                yield _chunk(waiting)
                waiting = []
        self._deaths.pop(shard.name, None)


def _unwatched(stage: str, shard: str) -> None:
    """The actor that waits for the chunk says so to the watchdog."""


def _chunk(several: list[Fed]) -> Chunk:
    samples, outcomes, pixels, ended = [], [], [], None
    for _, sample, what in several:
        if isinstance(what, Ended) or sample is None:
            ended = what
            continue
        samples.append(sample)
        if isinstance(what.result, Decoded):
            pixels.append(what.result.pixels)
            what = what._replace(result=what.result._replace(pixels=ELSEWHERE))
        outcomes.append(what)
    stacked = np.stack(pixels) if pixels else ELSEWHERE
    return Chunk(stacked, samples, outcomes, ended if isinstance(ended, Ended) else None)


def _unpacked(shard: Shard, chunk: Chunk) -> Iterator[Fed]:
    at = 0
    for sample, outcome in zip(chunk.samples, chunk.outcomes, strict=True):
        if isinstance(outcome.result, Decoded):
            # A copy: a view would keep the whole chunk in Ray's store until its last image has left its batch.
            outcome = outcome._replace(result=outcome.result._replace(pixels=chunk.pixels[at].copy()))
            at += 1
        yield Fed(shard, sample, outcome)
    if chunk.ended is not None:
        yield Fed(shard, None, chunk.ended)


@dataclass(frozen=True)
class Turn:
    """A shard to be fed, from some sample on."""

    shard: Shard
    seen: int = 0
    deaths: int = 0


class RemoteFeed:
    """Gives what `LocalFeed` gives, out of `feeders` actors; they end with the process that this runs in."""

    def __init__(self, vectors: VectorSet, feeders: int, deaths: Callable[[str], int]):
        """Each takes a CPU of the cluster, wherever there is one. `deaths`: as of `LocalFeed`."""
        self._deaths = deaths
        self._remote = ray.remote(num_cpus=1, max_concurrency=STREAMS + 1, scheduling_strategy="SPREAD")(Feeder)
        build = build_id()
        self._new = lambda: self._remote.remote(vectors, build)
        self._feeders = [self._new() for _ in range(feeders)]

    def __call__(
        self, shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]:
        source, waiting = _Source(shards, self._deaths), queue.Queue[Any](maxsize=len(self._feeders))
        pulling = len(self._feeders) * STREAMS
        for i in range(pulling):
            flow.start(lambda slot=i // STREAMS: self._pull(slot, source, flow, waiting), then=waiting)  # type: ignore[misc]
        last = ""
        try:
            while pulling:
                at("feed", last)
                event = flow.get(waiting)
                if event is None:
                    pulling -= 1
                else:
                    last = event[0].name
                    yield from _unpacked(*event)
        except BaseException:  # of the iterating thread too, which closes us
            flow.stop()
            raise

    def _pull(self, slot: int, source: "_Source", flow: Flow, waiting: "queue.Queue[Any]") -> None:
        """One stream after the other out of the feeder in this slot; one that dies has a successor."""
        feeder = None
        while not source.is_finished:
            if feeder is not self._feeders[slot]:
                feeder = self._feeders[slot]
                is_up, is_known = feeder.ready.remote(), False
            if not ray.wait([is_up], timeout=Flow.POLL_S)[0]:  # it may never come, where the cluster is full
                flow.check()
            elif not is_known:
                is_known = True
                with suppress(*GONE):  # it is gone: that is counted against the shard it gets
                    ray.get(is_up)
            elif (turn := source.take()) is None:
                flow.pause(NOTHING_S)
            elif turn.deaths >= MAX_DEATHS:
                source.end(turn.shard)
                flow.put(waiting, (turn.shard, _failed(turn.deaths)))
            elif not self._stream(feeder, turn, source, flow, waiting) and self._feeders[slot] is feeder:
                self._feeders[slot] = self._new()

    def _stream(self, feeder: Any, turn: Turn, source: "_Source", flow: Flow, waiting: "queue.Queue[Any]") -> bool:
        """False: the feeder died, and somebody else goes on with its shard."""
        try:
            stream = feeder.feed.options(**STREAM).remote(turn.shard, turn.seen, turn.deaths)
            while True:
                while not ray.wait([stream], timeout=Flow.POLL_S)[0]:
                    flow.check()
                chunk = ray.get(next(stream))
                flow.put(waiting, (turn.shard, chunk))
                turn = replace(turn, seen=turn.seen + len(chunk.samples))
                if chunk.ended is not None:
                    source.end(turn.shard)
                    return True
        except GONE:
            source.again(replace(turn, deaths=turn.deaths + 1))
            return False


def _failed(deaths: int) -> Chunk:
    error = f"read: {deaths} of the processes that read and decode died with this shard, or none could be started"
    return Chunk(ELSEWHERE, [], [], Ended(0, 0, 0.0, time.time(), error))


class _Source:
    """The shards, for several threads; one whose feeder died comes again, from where it was.

    One that is under way here already is dropped: a board that was started again does not know who has what.
    """

    _END = object()

    def __init__(self, shards: Iterable[Shard | None], deaths: Callable[[str], int]):
        self._shards, self._deaths = iter(shards), deaths
        self._again: deque[Turn] = deque()
        self._one = threading.Lock()
        self._under_way, self._is_over = set[str](), False

    @property
    def is_finished(self) -> bool:
        return self._is_over and not self._under_way

    def take(self) -> Turn | None:
        """None: none for now."""
        with self._one:
            if self._again:
                return self._again.popleft()
            shard = None if self._is_over else next(self._shards, self._END)
            if shard is self._END:
                self._is_over = True
            if not isinstance(shard, Shard) or shard.name in self._under_way:
                return None
            self._under_way.add(shard.name)
            return Turn(shard, deaths=self._deaths(shard.name))

    def again(self, turn: Turn) -> None:
        with self._one:
            self._again.append(turn)

    def end(self, shard: Shard) -> None:
        with self._one:
            self._under_way.discard(shard.name)
