"""Shards → their files and a receipt each: the inner pipeline of one process, without Ray.

    reader thread → decoding threads → this thread: batches, forward → writer thread: rows, Parquet, publish

Reader and decoders run ahead over the ends of shards, bounded in images and in bytes, so the device does not wait
between two shards. A batch never mixes shards: a row's vector depends on its own shard alone, whatever ran before.
"""

import math
import os
import platform
import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.backbone import Backbone, Vectors
from pipeline.config import Adapt, VectorSet
from pipeline.errors import Reject, StorageError
from pipeline.fetching import fetch
from pipeline.flow import ByteBudget, Flow
from pipeline.images import Decoded, Decoder
from pipeline.isolation import IsolatedDecoder
from pipeline.listing import Shard
from pipeline.lists import ShardFiles
from pipeline.output import Root
from pipeline.rows import NotFinite, ShardWriter
from pipeline.shards import Sample, read_samples
from pipeline.storage import is_local, is_unchanged, redact, resolve
from pipeline.versions import publish, published

LOOKAHEAD_BATCHES = 2  # decoded images that wait: one batch being filled, one ready …
DECODED_BYTES = 256 * 2**20  # … and fewer of large ones
LOOKAHEAD_BYTES = 256 * 2**20  # encoded images between reader and decoders, one larger than that allowed alone
FETCHED_BYTES = 4 * 2**20  # what an image behind a URL is taken to weigh before it is there
FETCHERS = 16  # URL columns: requests under way at once, latency is all they cost
WRITES_WAITING = 4  # batches of vectors between device and writer …
WAITING_BYTES = 128 * 2**20  # … and fewer where tokens or feature maps make them large
STAGES = ("read", "decode", "forward", "write")
# Of the workers that had a shard under way. After the first its images are decoded apart, so what goes on dying is not
# due to them; several, as machines may be taken away under a shard that is sound.
MAX_DEATHS = 8
END = object()  # closes a shard's events
MARK = secrets.token_hex(2)  # of this process


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an embedding process needs besides its shards."""

    vectors: VectorSet
    labels: tuple[str, ...]  # one a class, or empty
    weights: str  # the staged safetensors file on this node
    adapt: Adapt  # the architecture that they fit
    output: str
    device: str
    batch_size: int | None
    decode_threads: int
    torch_threads: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of one shard. `files` is None exactly when `error` says why it was left uncommitted."""

    shard: str
    files: ShardFiles | None
    error: str | None
    embedded: bool  # False: another run's files were already there
    bytes_read: int
    seconds: dict[str, float]  # by stage; decode sums over its threads
    started: float  # Unix time
    ended: float
    worker: str  # host and process


@dataclass
class Activity:
    """What the process is at, for progress and the stall watchdog; written by one thread, read by others."""

    steps: int = 0  # samples and batches so far: it stands still when nothing moves
    images: int = 0  # of the shard under way
    rejects: int = 0
    stage: str = "start"
    shard: str = ""


@dataclass
class Work:
    """One shard under way."""

    shard: Shard
    started: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    samples: int = 0  # that the reader gave, counted apart from what was written
    bytes_read: int = 0
    error: str | None = None
    files: ShardFiles | None = None  # found published: nothing to do
    is_isolated: bool = False  # it took a worker down: its images are decoded in processes apart


class Outcome(NamedTuple):
    """One sample after decoding."""

    result: Decoded | Reject
    size: int  # bytes as stored
    fetch_s: float  # waited for, where the image lay behind a URL
    decode_s: float


class Batch(NamedTuple):
    samples: list[Sample]
    sizes: list[tuple[int, int]]
    vectors: Vectors


class Refused(NamedTuple):
    sample: Sample
    why: Reject
    size: int


class Embedder:
    """Embeds shards one after the other with one backbone; call it again and again from one thread."""

    def __init__(self, job: Job, backbone: Backbone, deaths: Callable[[str], int] = lambda shard: 0):
        """`deaths`: asked when a shard is begun; how many workers died with it under way."""
        self.job, self.backbone, self.activity = job, backbone, Activity()
        self._root, self._deaths = Root(job.output), deaths
        preprocessing, upright = job.vectors.preprocessing, job.vectors.exif_orientation
        self._decoder = Decoder(preprocessing, exif_orientation=upright)
        self._isolated = IsolatedDecoder(preprocessing, exif_orientation=upright)

    def __call__(self, shards: Iterable[Shard]) -> Iterator[Receipt]:
        """One receipt a shard, in order, as each is published. Raises what is nobody's fault but ours."""
        flow = Flow()
        image_bytes = math.prod(self.backbone.preprocessing.input_size)
        ahead = max(1, min(LOOKAHEAD_BATCHES * self.backbone.batch_size, DECODED_BYTES // image_bytes))
        feed: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        to_write: queue.Queue[Any] = queue.Queue(maxsize=self._writes_waiting())
        receipts: queue.Queue[Receipt] = queue.Queue()
        with ThreadPoolExecutor(self.job.decode_threads) as decoders, ThreadPoolExecutor(FETCHERS) as fetchers:
            reader = flow.start(lambda: self._read(shards, flow, feed, decoders, fetchers), then=feed)
            writer = flow.start(lambda: self._write(flow, to_write, receipts))
            try:
                for _ in self._forward(flow, feed, to_write):
                    while not receipts.empty():
                        yield receipts.get()
                self.activity.stage = "write"
                flow.put(to_write, None)
                writer.join()
                flow.check()
                while not receipts.empty():
                    yield receipts.get()
            finally:
                flow.stop()
                decoders.shutdown(wait=False, cancel_futures=True)
                fetchers.shutdown(wait=False, cancel_futures=True)
                reader.join()
                writer.join()
                self._isolated.close()

    def _writes_waiting(self) -> int:
        row_bytes = sum(f.size * np.dtype(f.dtype).itemsize for f in self.job.vectors.tensors)
        return max(1, min(WRITES_WAITING, WAITING_BYTES // max(1, row_bytes * self.backbone.batch_size)))

    # reader thread

    def _read(
        self,
        shards: Iterable[Shard],
        flow: Flow,
        feed: queue.Queue[Any],
        decoders: ThreadPoolExecutor,
        fetchers: ThreadPoolExecutor,
    ) -> None:
        budget = ByteBudget(LOOKAHEAD_BYTES)
        for shard in shards:
            work = Work(shard)
            try:
                work.files = published(self._root, self.job.vectors.folder, shard)
                if work.files is None:
                    self._look_at_deaths(work)
                    for sample in _timed(read_samples(shard), work, "read"):
                        size = _weight(sample)
                        work.samples += 1
                        work.bytes_read += len(sample.image)
                        budget.take(size, flow)
                        fetched = fetchers.submit(fetch, sample) if sample.url and not sample.reject else None
                        decoded = decoders.submit(self._decode, work, sample, fetched, budget, size)
                        flow.put(feed, (work, sample, decoded))
                    if _has_changed(shard):
                        raise StorageError(f"{redact(shard.url)} changed while it was read: run again")
            except (StorageError, OSError) as e:
                work.error = f"read: {e}"
            flow.put(feed, (work, None, None))

    def _look_at_deaths(self, work: Work) -> None:
        deaths = self._deaths(work.shard.name)
        work.is_isolated = deaths > 0
        if deaths >= MAX_DEATHS:
            raise StorageError(
                f"{deaths} workers died with this shard under way, and not by decoding its images: is there enough "
                "memory? Else its file breaks what reads it"
            )

    def _decode(
        self, work: Work, sample: Sample, fetched: Future[bytes] | None, budget: ByteBudget, size: int
    ) -> Outcome:
        started = time.perf_counter()
        fetch_s = 0.0
        data = sample.image
        try:
            if sample.reject:
                raise sample.reject
            if fetched:
                data = fetched.result()
                fetch_s = time.perf_counter() - started
            decode = self._isolated if work.is_isolated else self._decoder
            return Outcome(decode(data), len(data), fetch_s, time.perf_counter() - started - fetch_s)
        except Reject as why:
            return Outcome(why, len(data) or sample.size, fetch_s, time.perf_counter() - started - fetch_s)
        finally:
            sample.image = b""
            budget.give(size)

    # this thread

    def _forward(self, flow: Flow, feed: queue.Queue[Any], to_write: queue.Queue[Any]) -> Iterator[None]:
        """Fills batches in the shard's order and sends them through the backbone; steps once an event."""
        samples: list[Sample] = []
        decoded: list[Decoded] = []
        current: Work | None = None
        while True:
            self.activity.stage = "read"
            event = flow.get(feed)
            if event is None:
                return
            self.activity.steps += 1
            work, sample, future = event
            if work is not current:
                current = work
                self.activity.shard = work.shard.name
                self.activity.images = self.activity.rejects = 0
                flow.put(to_write, (work, None))
            if sample is not None and work.error is None:
                self.activity.stage = "fetch" if sample.url else "decode"
                try:
                    outcome: Outcome = flow.wait(future)
                except (StorageError, OSError) as e:
                    work.error = f"{self.activity.stage}: {e}"
                    continue
                work.seconds["read"] += outcome.fetch_s
                work.seconds["decode"] += outcome.decode_s
                work.bytes_read += outcome.size if sample.url else 0
                if isinstance(outcome.result, Reject):
                    self.activity.stage = "write"
                    flow.put(to_write, (work, Refused(sample, outcome.result, outcome.size)))
                    self.activity.rejects += 1
                else:
                    samples.append(sample)
                    decoded.append(outcome.result)
            # `>=`: an out-of-memory may have made the batch smaller than what has gathered.
            if samples and (len(samples) >= self.backbone.batch_size or sample is None):
                if work.error is None:
                    batch = self._batch(work, samples, decoded)
                    self.activity.stage = "write"
                    flow.put(to_write, (work, batch))
                    self.activity.images += len(samples)
                samples, decoded = [], []
            if sample is None:
                self.activity.stage = "write"
                flow.put(to_write, (work, END))
            yield

    def _batch(self, work: Work, samples: list[Sample], decoded: list[Decoded]) -> Batch:
        self.activity.stage = "forward"
        started = time.perf_counter()
        images = torch.from_numpy(np.stack([d.pixels for d in decoded]))
        if self.backbone.device.type == "cuda":
            images = images.pin_memory()
        vectors = self.backbone(images)
        work.seconds["forward"] += time.perf_counter() - started
        return Batch(samples, [(d.width, d.height) for d in decoded], vectors)

    # writer thread

    def _write(self, flow: Flow, to_write: queue.Queue[Any], receipts: queue.Queue[Receipt]) -> None:
        while (event := flow.get(to_write)) is not None:
            work: Work = event[0]  # the first event of a shard only opens it
            events = _until_end(work, flow, to_write)
            files, embedded = work.files, False
            try:
                if files is None:
                    files, embedded = self._write_shard(work, events)
            except (StorageError, OSError) as e:
                work.error = work.error or f"write: {e}"
            for _ in events:
                pass
            receipts.put(_receipt(work, None if work.error else files, embedded))

    def _write_shard(self, work: Work, events: Iterator["Batch | Refused"]) -> tuple[ShardFiles | None, bool]:
        """The shard's files, and whether it was us who published them; None where something went wrong with it."""
        with ShardWriter(self.job.vectors, work.shard, self.job.labels, self._root.scratch()) as writer:
            for event in events:
                self._write_event(writer, event, work)
            if work.error is not None:
                return None, False
            if writer.counts.samples != work.samples:
                raise RuntimeError(f"{work.shard.name}: {work.samples} samples read, {writer.counts.samples} written")
            started = time.perf_counter()
            files, embedded = publish(self._root, self.job.vectors.folder, work.shard, writer)
            work.seconds["write"] += time.perf_counter() - started
            return files, embedded

    def _write_event(self, writer: ShardWriter, event: Batch | Refused, work: Work) -> None:
        if work.error is not None:
            return
        if isinstance(event, Refused):
            writer.reject(event.sample, event.why, event.size)
            return
        started = time.perf_counter()
        arrays = event.vectors.to_numpy()  # on CUDA this is where the device is waited for
        work.seconds["forward"] += time.perf_counter() - started
        started = time.perf_counter()
        try:
            writer.rows(event.samples, event.sizes, arrays)
        except NotFinite as e:
            work.error = f"forward: {e}"
        work.seconds["write"] += time.perf_counter() - started


def _weight(sample: Sample) -> int:
    if sample.url:
        return sample.listed.size if sample.listed else FETCHED_BYTES
    return len(sample.image)


def _until_end(work: Work, flow: Flow, to_write: queue.Queue[Any]) -> Iterator[Batch | Refused]:
    while (event := flow.get(to_write)[1]) is not END:
        yield event


def worker_name() -> str:
    """Host, process and a mark of its own: a container that is started again has the same first two."""
    return f"{platform.node()}:{os.getpid()}:{MARK}"


def _receipt(work: Work, files: ShardFiles | None, embedded: bool) -> Receipt:
    return Receipt(
        shard=work.shard.name,
        files=files,
        error=work.error,
        embedded=embedded,
        bytes_read=work.bytes_read,
        seconds=work.seconds,
        started=work.started,
        ended=time.time(),
        worker=worker_name(),
    )


def _has_changed(shard: Shard) -> bool:
    if not shard.members:
        return shard.source is not None and not is_unchanged(shard.source)
    # One request a member is nothing on a local disk and the whole job on a remote store.
    return is_local(resolve(shard.url)[0]) and not all(map(is_unchanged, shard.members))


def _timed(samples: Iterator[Sample], work: Work, stage: str) -> Iterator[Sample]:
    """The same samples; the time that each took to come is the stage's."""
    while True:
        started = time.perf_counter()
        sample = next(samples, None)
        work.seconds[stage] += time.perf_counter() - started
        if sample is None:
            return
        yield sample
