"""Shards → their files and a receipt each: the inner pipeline of one process, without Ray.

    feed: samples, decoded → this thread: batches, forward → writer thread: rows, Parquet, publish

All of it runs at once, over the ends of shards too. A batch never mixes shards: a row's vector depends on its own shard
alone, whatever ran before or beside it. A feed may have several shards under way, each in its own order.
"""

import contextlib
import os
import platform
import queue
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from pipeline.backbone import Backbone, load_backbone
from pipeline.config import Adapt, VectorSet
from pipeline.cuda_images import DeviceImages, Jpeg, OnDevice
from pipeline.device import Passed, Staging
from pipeline.errors import Reject, StorageError
from pipeline.feed import Ended, Fed, Outcome
from pipeline.flow import Flow
from pipeline.images import Decoded, Decoder
from pipeline.listing import Shard
from pipeline.lists import ShardFiles
from pipeline.output import Root
from pipeline.rows import NotFinite, ShardWriter
from pipeline.shards import Sample
from pipeline.versions import publish, published

WRITES_WAITING = 4  # batches of vectors between device and writer …
WAITING_BYTES = 128 * 2**20  # … and fewer where tokens or feature maps make them large
ENCODED_BYTES = 128 * 2**20  # of images for the device's decoder: when so many have gathered it need not be a batch
STAGES = ("read", "decode", "transfer", "forward", "write")  # transfer: from images to a batch for the device
# Beside them: images behind URLs; on CUDA what the batching thread has of `forward` and `decode`, and the copies.
PARTS = (*STAGES, "fetch", "launch", "batch_decode", "copy")
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
    gpu_share: float = 1.0  # of a device, that this process may take of its memory
    feeders: int = 0  # processes that read and decode for this one; 0: it does so itself


def backbone_of(job: Job) -> Backbone:
    """The job's model with its weights, on its device."""
    vectors = job.vectors
    return load_backbone(
        vectors.model,
        Path(job.weights),
        job.adapt,
        engine=vectors.engine,
        precision=vectors.precision,
        device=job.device,
        classes=bool(vectors.top_k),
        top_k=vectors.top_k,
        batch_size=job.batch_size,
        tensors=vectors.tensors,
        share=job.gpu_share,
    )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of one shard. `files` is None exactly when `error` says why it was left uncommitted."""

    shard: str
    files: ShardFiles | None
    error: str | None
    embedded: bool  # False: another run's files were already there
    bytes_read: int
    seconds: dict[str, float]  # by `PARTS`; those of several threads are summed
    started: float  # Unix time
    ended: float
    worker: str  # host and process
    cpu_s: dict[str, float] = field(default_factory=dict)  # of `seconds`; `process`: all, since the receipt before
    batches: int = 0  # forward passes


@dataclass
class Activity:
    """What the process is at, for progress and the stall watchdog; read by other threads."""

    steps: int = 0  # samples and batches so far: it stands still when nothing moves
    stage: str = "start"
    shard: str = ""
    under_way: dict[str, tuple[int, int]] = field(default_factory=dict)  # shard → images, rejects so far
    batch_size: int = 0  # of a full forward pass
    forward: tuple[float, float | None] = 0.0, None  # seconds of passes that ended; on the CPU since when one is at it

    def said(self) -> dict[str, Any]:
        forward_s, since = self.forward
        return {
            "steps": self.steps,
            "stage": self.stage,
            "shard": self.shard,
            "under_way": dict(self.under_way),
            "batch_size": self.batch_size,
            "forward_s": forward_s + (time.perf_counter() - since if since else 0.0),  # on CUDA by its own clock
        }

    def add(self, shard: str, images: int = 0, rejects: int = 0) -> None:
        before = self.under_way.get(shard, (0, 0))
        self.under_way[shard] = before[0] + images, before[1] + rejects


class Feed(Protocol):
    """Gives each shard's samples in its order, then its `Ended`; see `pipeline.feed.LocalFeed`."""

    def __call__(
        self, shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]: ...


@dataclass(eq=False)
class Work:
    """One shard under way: what waits for its next batch, and the files that it becomes."""

    shard: Shard
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    samples: list[Sample] = field(default_factory=list)
    images: list[Decoded | Jpeg | OnDevice] = field(default_factory=list)  # of `samples`
    encoded_bytes: int = 0  # of `images`
    batches: int = 0
    writer: ShardWriter | None = None
    # Of the thread that batches or of the one that writes, whichever met one first; a second one tells nothing new.
    error: str | None = None

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds what this thread takes, on the clock and of the processor."""
        started, cpu = time.perf_counter(), time.thread_time()
        yield
        self.seconds[part] += time.perf_counter() - started
        self.cpu_s[part] += time.thread_time() - cpu

    def close(self) -> None:
        """Leaves no scratch file."""
        if self.writer is not None:
            self.writer.close()


class Batch(NamedTuple):
    samples: list[Sample]
    sizes: list[tuple[int, int]]
    passed: Passed


class Refused(NamedTuple):
    sample: Sample
    why: Reject
    size: int


class Embedder:
    """Embeds shards with one backbone; call it again and again from one thread."""

    def __init__(self, job: Job, backbone: Backbone, feed: Feed):
        self.job, self.backbone, self.activity = job, backbone, Activity(batch_size=backbone.batch_size)
        self._root, self._feed = Root(job.output), feed
        self._staging = Staging(backbone, _device_images(job.vectors, backbone))
        self._cpu_s = 0.0  # of the process, at the last receipt

    def __call__(self, shards: Iterable[Shard | None], done: Callable[[Receipt], None]) -> None:
        """`done` gets one receipt a shard as each is published, from a thread of ours.

        `shards` is asked for the next one when there is room for it, and again where it gave None. Raises what is
        nobody's fault but ours.
        """
        flow, self._cpu_s = Flow(), time.process_time()
        to_write: queue.Queue[Any] = queue.Queue(maxsize=self._writes_waiting())
        writer = flow.start(lambda: self._write(flow, to_write, done))
        try:
            with contextlib.closing(self._feed(self._unfinished(shards, done), flow, self._at)) as fed:
                self._forward(flow, fed, to_write)
            self._at("write", self.activity.shard)
            flow.put(to_write, None)
            writer.join()
            flow.check()
        finally:
            flow.stop()
            writer.join()

    def _writes_waiting(self) -> int:
        row_bytes = sum(column.size * np.dtype(column.dtype).itemsize for column in self.job.vectors.tensors)
        return max(1, min(WRITES_WAITING, WAITING_BYTES // max(1, row_bytes * self.backbone.batch_size)))

    def _at(self, stage: str, shard: str) -> None:
        self.activity.stage, self.activity.shard = stage, shard

    # the feed's thread

    def _unfinished(self, shards: Iterable[Shard | None], done: Callable[[Receipt], None]) -> Iterator[Shard | None]:
        """Those that no other run has published meanwhile."""
        for shard in shards:
            if shard is None:
                yield None
                continue
            self.activity.add(shard.name)
            files, error = None, None
            try:
                files = published(self._root, self.job.vectors.folder, shard)
            except (StorageError, OSError) as e:
                error = f"read: {e}"
            if files is None and error is None:
                yield shard
            else:
                ended = Ended(0, 0, 0.0, time.time(), error)
                self.activity.under_way.pop(shard.name, None)
                done(_receipt(Work(shard, error=error), ended, files, embedded=False))

    # this thread

    def _forward(self, flow: Flow, fed: Iterator[Fed], to_write: "queue.Queue[Any]") -> None:
        """Fills each shard's batches in its order and sends them through the backbone."""
        open_works: dict[str, Work] = {}
        for shard, sample, what in fed:
            self.activity.steps += 1
            work = open_works.setdefault(shard.name, Work(shard))
            if isinstance(what, Ended):
                work.error = work.error or what.error
            elif sample is not None:
                self._take(flow, work, sample, what, to_write)
            # `>=`: an out-of-memory may have made the batch smaller than what has gathered.
            if work.samples and (len(work.samples) >= self.backbone.batch_size or isinstance(what, Ended)):
                self._send(flow, work, to_write)
            if isinstance(what, Ended):
                del open_works[shard.name]
                self._at("write", work.shard.name)
                flow.put(to_write, (work, what))

    def _take(self, flow: Flow, work: Work, sample: Sample, outcome: Outcome, to_write: "queue.Queue[Any]") -> None:
        work.seconds["fetch"] += outcome.fetch_s
        work.seconds["decode"] += outcome.decode_s
        work.cpu_s["decode"] += outcome.cpu_s
        if isinstance(outcome.result, Reject):
            self._refuse(flow, work, Refused(sample, outcome.result, outcome.size), to_write)
        elif work.error is None:
            work.samples.append(sample)
            work.images.append(outcome.result)
            if isinstance(outcome.result, Jpeg):
                work.encoded_bytes += len(outcome.result.data)
            if work.encoded_bytes > ENCODED_BYTES:
                self._decode(flow, work, to_write)

    def _decode(self, flow: Flow, work: Work, to_write: "queue.Queue[Any]") -> None:
        """On the device, what has gathered encoded; what it and the CPU fail at is refused."""
        self._at("decode", work.shard.name)
        with work.timed("batch_decode"):
            decoded = self._staging.decoded(work.images)
        gathered = list(zip(work.samples, work.images, decoded, strict=True))
        work.samples, work.images, work.encoded_bytes = [], [], 0
        for sample, given, image in gathered:
            if isinstance(image, Reject):
                self._refuse(flow, work, Refused(sample, image, len(cast(Jpeg, given).data)), to_write)
            else:
                work.samples.append(sample)
                work.images.append(image)

    def _send(self, flow: Flow, work: Work, to_write: "queue.Queue[Any]") -> None:
        if work.encoded_bytes and work.error is None:
            self._decode(flow, work, to_write)
        samples, images = work.samples, cast(list[Decoded | OnDevice], work.images)
        work.samples, work.images, work.encoded_bytes = [], [], 0
        if samples and work.error is None:
            self._at("forward", work.shard.name)
            with self._computing(work):
                passed = self._staging(images, work.timed)
            self.activity.batch_size = self.backbone.batch_size  # an out-of-memory has halved it
            batch = Batch(samples, [(image.width, image.height) for image in images], passed)
            self._at("write", work.shard.name)
            flow.put(to_write, (work, batch))
            self.activity.add(work.shard.name, images=len(samples))

    @contextlib.contextmanager
    def _computing(self, work: Work) -> Iterator[None]:
        """Says so while it lasts, for a pass may take the CPU half a minute; CUDA's own clock is read by the writer."""
        if self.backbone.device.type == "cuda":
            yield
            return
        before, forward_s = work.seconds["forward"], self.activity.forward[0]
        self.activity.forward = forward_s, time.perf_counter()
        yield
        self.activity.forward = forward_s + work.seconds["forward"] - before, None

    def _refuse(self, flow: Flow, work: Work, refused: Refused, to_write: "queue.Queue[Any]") -> None:
        self._at("write", work.shard.name)
        flow.put(to_write, (work, refused))
        self.activity.add(work.shard.name, rejects=1)

    # writer thread

    def _write(self, flow: Flow, to_write: "queue.Queue[Any]", done: Callable[[Receipt], None]) -> None:
        under_way: set[Work] = set()
        try:
            while (event := flow.get(to_write)) is not None:
                work, what = event
                under_way.add(work)
                files, embedded = self._written(work, what)
                if isinstance(what, Ended):
                    under_way.discard(work)
                    work.close()
                    self.activity.under_way.pop(work.shard.name, None)
                    before, self._cpu_s = self._cpu_s, time.process_time()
                    work.cpu_s["process"] = self._cpu_s - before
                    done(_receipt(work, what, files, embedded))
        finally:
            for work in under_way:
                work.close()

    def _written(self, work: Work, what: Batch | Refused | Ended) -> tuple[ShardFiles | None, bool]:
        """What `_publish` gives at the end of the shard; a store's error is the shard's, and ends no other."""
        try:
            if work.error is None and work.writer is None:
                work.writer = ShardWriter(self.job.vectors, work.shard, self.job.labels, self._root.scratch())
            if work.error is None and isinstance(what, Ended):
                return self._publish(work, what)
            if work.error is None and not isinstance(what, Ended):
                self._write_event(work, what)
        except (StorageError, OSError) as e:
            work.error = work.error or f"write: {e}"
        return None, False

    def _publish(self, work: Work, ended: Ended) -> tuple[ShardFiles | None, bool]:
        """The shard's files, and whether it was us who published them."""
        assert work.writer is not None
        if work.writer.counts.samples != ended.samples:
            written = work.writer.counts.samples
            raise RuntimeError(f"{work.shard.name}: {ended.samples} samples read, {written} written")
        with work.timed("write"):
            return publish(self._root, self.job.vectors.folder, work.shard, work.writer)

    def _write_event(self, work: Work, event: Batch | Refused) -> None:
        assert work.writer is not None
        if isinstance(event, Refused):
            work.writer.reject(event.sample, event.why, event.size)
            return
        arrays = event.passed.to_numpy()  # on CUDA this is where the device is waited for
        for part, seconds in event.passed.seconds().items():
            work.seconds[part] += seconds
            if part == "forward":
                self.activity.forward = self.activity.forward[0] + seconds, None
        work.batches += 1
        with work.timed("write"):
            try:
                work.writer.rows(event.samples, event.sizes, arrays)
            except NotFinite as e:
                work.error = f"forward: {e}"


def _device_images(vectors: VectorSet, backbone: Backbone) -> DeviceImages | None:
    if vectors.decode != "cuda":
        return None
    cpu = Decoder(vectors.preprocessing, exif_orientation=vectors.exif_orientation, how=vectors.decode)
    return DeviceImages(vectors.preprocessing, backbone.device, cpu)


def worker_name() -> str:
    """Host, process and a mark of its own: a container that is started again has the same first two."""
    return f"{platform.node()}:{os.getpid()}:{MARK}"


def _receipt(work: Work, ended: Ended, files: ShardFiles | None, embedded: bool) -> Receipt:
    return Receipt(
        shard=work.shard.name,
        files=None if work.error else files,
        error=work.error,
        embedded=embedded,
        bytes_read=ended.bytes_read,
        seconds=work.seconds | {"read": ended.read_s},
        started=ended.started,
        ended=time.time(),
        worker=worker_name(),
        cpu_s=work.cpu_s | {"read": ended.read_cpu_s},
        batches=work.batches,
    )
