"""What each stage costs on this machine, measured with the code that a run has for it.

    read → images as stored → decode, each way → pixels → transfer → forward, each way → vectors → write

Each function lasts for the seconds that it is given, or for the least that tells anything. What computes is told in CPU
seconds: they hardly change when others use the machine too.
"""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from pipeline.backbone import Arrays, Backbone, Vectors
from pipeline.config import VectorSet
from pipeline.cuda_images import DeviceImages, Jpeg
from pipeline.device import Staging
from pipeline.errors import Reject, UsageError
from pipeline.feed import FETCHERS
from pipeline.fetching import fetch
from pipeline.images import Decoded, Decoder
from pipeline.listing import Shard
from pipeline.output import Root
from pipeline.rows import ShardWriter
from pipeline.shards import Sample, read_samples
from pipeline.versions import publish

KEPT_IMAGES, KEPT_BYTES = 128, 128 * 2**20  # of the input, for all that comes after reading
QUEUED = 8  # batches before the device
COMPARED = 64  # images whose pixels and embeddings are compared
SHARD_ROWS = 4096  # written into one file: a small shard


class Cost(NamedTuple):
    """What so many images took: seconds on the clock, and of all processors together."""

    images: int
    seconds: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Of one image."""
        return 1000 * self.cpu_s / self.images

    def as_dict(self) -> dict[str, Any]:
        return {"images_per_s": round(self.images_per_s, 1), "cpu_ms": round(self.cpu_ms, 4)}


class Read(NamedTuple):
    cost: Cost  # of one reader
    stored_bytes: int
    images: list[bytes]  # some of them, by chance
    a_shard: int | None  # images, of the middle one of those that were read to their end; None: there was no time


class Difference(NamedTuple):
    """Of images that were decoded otherwise, from `exact`."""

    largest: int  # levels of 255
    mean: float  # levels
    cosine: float  # the smallest, of the embeddings


def read(shards: Sequence[Shard], seconds: float) -> Read:
    """Reads them again and again. Raises `UsageError` where they hold no image.

    In an order by chance, the same one each time: neighbours among shards are often more alike than others.
    """
    kept = _Kept()
    shards = random.Random(0).sample(shards, len(shards))
    read: list[_One] = []
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(FETCHERS) as fetchers:
        for n, shard in enumerate(itertools.cycle(shards), start=1):
            is_new = n <= len(shards)
            read.append(_one(shard, fetchers, kept.offer if is_new else len, started + seconds))
            is_late = time.perf_counter() > started + seconds
            if (kept.images and is_late) or (not kept.images and n == len(shards)):
                break
    if not kept.images:
        raise UsageError("the input holds no image")
    cost = Cost(sum(one.images for one in read), time.perf_counter() - started, time.process_time() - cpu)
    whole = sorted(one.images for one in read if one.is_whole)
    return Read(cost, sum(one.size for one in read), kept.images, whole[len(whole) // 2] if whole else None)


class _One(NamedTuple):
    """What was read of a shard."""

    images: int
    size: int  # bytes
    is_whole: bool


class _Kept:
    """Some of the images, each as likely as any other, within bounds."""

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self._bytes = self._offered = 0
        self._random = random.Random(0)

    def offer(self, image: bytes) -> None:
        self._offered += 1
        place = self._random.randrange(self._offered)
        if not self.images or (len(self.images) < KEPT_IMAGES and self._bytes + len(image) <= KEPT_BYTES):
            self.images.append(image)
            self._bytes += len(image)
        elif place < len(self.images):
            total = self._bytes - len(self.images[place]) + len(image)
            if total <= KEPT_BYTES:
                self.images[place], self._bytes = image, total


def _one(shard: Shard, fetchers: ThreadPoolExecutor, take: Callable[[bytes], object], until: float) -> _One:
    count = size = 0
    for image in _stored(shard, fetchers):
        count, size = count + 1, size + len(image)
        take(image)
        if time.perf_counter() > until:
            return _One(count, size, False)
    return _One(count, size, True)


def _stored(shard: Shard, fetchers: ThreadPoolExecutor) -> Iterator[bytes]:
    """Its images as they lie in the store, as many at a time from URLs as a run has."""
    with contextlib.closing(read_samples(shard)) as samples:  # type: ignore[type-var]
        while several := list(itertools.islice(samples, FETCHERS)):
            yield from filter(None, fetchers.map(_bytes_of, several))


def _bytes_of(sample: Sample) -> bytes:
    """Empty where there are none to be had."""
    try:
        return sample.image or (fetch(sample) if sample.url and not sample.reject else b"")
    except Reject:
        return b""


def usable(decoder: Decoder, images: Sequence[bytes]) -> tuple[list[bytes], list[Decoded]]:
    """Those that decode, as stored and decoded. Raises `UsageError` where none does."""
    kept, decoded, why = [], [], ""
    for image in images:
        try:
            decoded.append(decoder(image))
            kept.append(image)
        except Reject as e:
            why = f"{e.reason}: {e.message}"
    if not kept:
        raise UsageError(f"none of {len(images)} images of the input can be decoded ({why})")
    return kept, decoded


def decode(decoder: Callable[[bytes], object], images: Sequence[bytes], threads: int, seconds: float) -> Cost:
    """With so many threads of one process, as a worker has."""
    decoder(images[0])

    def work(first: int) -> tuple[int, float]:
        until, cpu = time.perf_counter() + seconds, time.thread_time()
        for n in itertools.count(first):
            decoder(images[n % len(images)])
            if time.perf_counter() > until:
                return n - first + 1, time.thread_time() - cpu
        raise AssertionError

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as decoders:
        done = list(decoders.map(work, range(threads)))
    return Cost(sum(n for n, _ in done), time.perf_counter() - started, sum(cpu for _, cpu in done))


def embeddings(backbone: Backbone, decoded: Sequence[Decoded], seconds: float) -> torch.Tensor:
    """Of the first images, as many as there is time for, two at least: float64 (n, D)."""
    parts: list[torch.Tensor] = []
    until = time.perf_counter() + seconds
    while 2 * len(parts) < min(COMPARED, len(decoded)) and (not parts or time.perf_counter() < until):
        two = stacked(decoded[2 * len(parts) : 2 * len(parts) + 2])
        parts.append(backbone(two).embedding.double().cpu())
    return torch.cat(parts)


def decode_on_device(
    header: Callable[[bytes], Decoded | Jpeg],
    there: DeviceImages,
    images: Sequence[bytes],
    batch_size: int,
    seconds: float,
) -> Cost:
    """A batch at a time, as the embedding thread has it done; `header` is the decoding threads' part, and not timed."""
    batch = [header(images[n % len(images)]) for n in range(batch_size)]

    def once() -> None:
        there(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return _best(once, batch_size, seconds)


def difference(
    decoded: Sequence[Decoded], exact: Sequence[Decoded], plain: Backbone, reference: torch.Tensor
) -> Difference:
    """`exact`: of the same images. `reference`: what `plain` gives of the first of these."""
    levels = (stacked(decoded).int() - stacked(exact).int()).abs()
    return Difference(int(levels.max()), float(levels.float().mean()), cosine(plain, decoded, reference))


def cosine(backbone: Backbone, decoded: Sequence[Decoded], reference: torch.Tensor) -> float:
    """The smallest of the embeddings of `decoded` with those of `reference`, row by row."""
    found = backbone(stacked(decoded[: len(reference)])).embedding.double().cpu()
    return float(torch.nn.functional.cosine_similarity(found, reference).min())


def stacked(decoded: Sequence[Decoded]) -> torch.Tensor:
    """uint8 (n, C, H, W)."""
    return torch.from_numpy(np.stack([d.pixels for d in decoded]))


def batch_of(decoded: Sequence[Decoded], size: int) -> torch.Tensor:
    """`size` images, the same again where there are fewer: a model takes real ones and zeros at different speeds."""
    return stacked([decoded[n % len(decoded)] for n in range(size)])


def transfer(decoded: Sequence[Decoded], batch_size: int, like: Backbone, seconds: float) -> Cost:
    """Decoded images into batches, and these to the device; for a model that does nothing."""
    several = [decoded[n % len(decoded)] for n in range(batch_size)]
    staging = Staging(cast(Backbone, _NoModel(like, batch_size)))

    def once() -> None:
        staging(several).to_numpy()

    return _best(once, batch_size, seconds)


class _NoModel:
    """What `Staging` needs of a backbone."""

    def __init__(self, like: Backbone, batch_size: int):
        self.device, self.preprocessing, self.batch_size = like.device, like.preprocessing, batch_size

    def __call__(self, images: torch.Tensor) -> Vectors:
        nothing = torch.empty(len(images), 1, device=images.device)
        return Vectors(nothing, nothing[:, 0], None, None)


def forward(backbone: Backbone, decoded: Sequence[Decoded], seconds: float) -> Cost:
    """Whole batches, on CUDA several that wait in its queue, so that it never does."""
    images, queued = batch_of(decoded, backbone.batch_size), 1
    if backbone.device.type == "cuda":
        images, queued = images.to(backbone.device), QUEUED

    def once() -> None:
        vectors = [backbone(images) for _ in range(queued)]
        vectors[-1].to_numpy()

    return _best(once, queued * len(images), seconds)


def _best(once: Callable[[], object], images: int, seconds: float) -> Cost:
    """The fastest of several passes: what makes one slower is somebody else's work."""
    once()
    until = time.perf_counter() + seconds
    clock: list[float] = []
    cpu_s: list[float] = []
    while len(clock) < 2 or time.perf_counter() < until:
        started, cpu = time.perf_counter(), time.process_time()
        once()
        clock.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - cpu)
    return Cost(images, min(clock), min(cpu_s))


def write(vectors: VectorSet, labels: tuple[str, ...], arrays: Arrays, output: Root, seconds: float) -> Cost:
    """Rows into Parquet files below `output`, each published as a shard's are. `arrays`: of one batch."""
    shard = Shard(name="bench", format="webdataset", url="", size=0, etag="0" * 16)
    batch, rows = len(arrays.embedding), 0
    started, cpu = time.perf_counter(), time.thread_time()
    while not rows or time.perf_counter() < started + seconds:
        one = replace(shard, name=f"bench-{rows}")
        with ShardWriter(vectors, one, labels, output.scratch()) as writer:
            for first in range(0, SHARD_ROWS, batch):
                samples = [Sample(row, f"image_{row:06d}") for row in range(first, first + batch)]
                writer.rows(samples, [(500, 375)] * batch, arrays)
            publish(output, vectors.folder, one, writer)
            rows += writer.counts.rows
    return Cost(rows, time.perf_counter() - started, time.thread_time() - cpu)
