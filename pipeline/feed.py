"""Shards → their samples, decoded, in each shard's order: the feed of one embedding process, without Ray.

    reader thread → decoding threads → whoever iterates

Reader and decoders run ahead over the ends of shards, bounded in images and in bytes, so the device does not wait
between two shards. What cannot be decoded comes as a `Reject`; a store's error ends its shard, and no other.
"""

import math
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pipeline.config import VectorSet
from pipeline.cuda_images import HeaderDecoder, Jpeg
from pipeline.errors import Reject, StorageError
from pipeline.fetching import fetch
from pipeline.flow import ByteBudget, Flow, grouped
from pipeline.images import Decoded, Decoder
from pipeline.isolation import IsolatedDecoder
from pipeline.listing import Shard
from pipeline.shards import Sample, read_samples
from pipeline.storage import is_local, is_unchanged, redact, resolve

LOOKAHEAD_BATCHES = 2  # decoded images that wait: one batch being filled, one ready …
DECODED_BYTES = 256 * 2**20  # … and fewer of large ones
# Encoded images between reader and decoders, and those that wait for the device to decode them; one larger than that
# is allowed alone.
LOOKAHEAD_BYTES = 256 * 2**20
# Images that one thread hands to the next at once, and fewer of large ones: to wake it costs 0.1 ms, as much as to read
# an image.
HANDFUL = 8
HANDFUL_BYTES = 4 * 2**20
FETCHED_BYTES = 4 * 2**20  # what an image behind a URL is taken to weigh before it is there
FETCHERS = 16  # URL columns: requests under way at once, latency is all they cost
NOTHING_S = 0.5  # until the next question where there was no shard to be had
# Of the workers that had a shard under way. After the first its images are decoded apart, so what goes on dying is not
# due to them; several, as machines may be taken away under a shard that is sound.
MAX_DEATHS = 8


class Outcome(NamedTuple):
    """One sample after decoding."""

    result: Decoded | Jpeg | Reject  # encoded still, where the device is to decode it
    size: int  # bytes as stored
    fetch_s: float  # waited for, where the image lay behind a URL
    decode_s: float
    cpu_s: float  # of these two


@dataclass(frozen=True)
class Ended:
    """The end of a shard: what was read of it, and why that is not all, if so."""

    samples: int
    bytes_read: int
    read_s: float  # waited for the store; not for images behind URLs
    started: float  # Unix time
    error: str | None
    read_cpu_s: float = 0.0  # of `read_s`


class Fed(NamedTuple):
    """A sample with what became of it, or the end of its shard."""

    shard: Shard
    sample: Sample | None  # without its bytes
    what: Outcome | Ended


@dataclass
class _Reading:
    """One shard, as far as it is read. Two threads write, each its own numbers."""

    shard: Shard
    started: float = field(default_factory=time.time)
    samples: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    read_cpu_s: float = 0.0
    fetched_bytes: int = 0
    error: str | None = None

    @property
    def ended(self) -> Ended:
        read = self.bytes_read + self.fetched_bytes
        return Ended(self.samples, read, self.read_s, self.started, self.error, self.read_cpu_s)


class _Given(NamedTuple):
    """A sample that a decoder is to have."""

    sample: Sample
    size: int  # bytes that it has of the budget
    fetched: Future[bytes] | None  # of a URL


class LocalFeed:
    """Reads and decodes in threads of this process. Called for a flow; what comes of a call ends with it."""

    def __init__(
        self, vectors: VectorSet, decode_threads: int, batch_size: int, deaths: Callable[[str], int] = lambda shard: 0
    ):
        """`batch_size` bounds what waits. `deaths`: how many workers died with a shard, by name, under way."""
        preprocessing, upright = vectors.preprocessing, vectors.exif_orientation
        self._threads, self._deaths, self._reading = decode_threads, deaths, ""
        image_bytes = math.prod(preprocessing.input_size)
        ahead = max(1, min(LOOKAHEAD_BATCHES * batch_size, DECODED_BYTES // image_bytes))
        self._handful = max(1, min(HANDFUL, ahead // (2 * decode_threads)))
        self._ahead = ahead // self._handful
        self._decoder: Callable[[bytes], Decoded | Jpeg]
        if vectors.decode == "cuda":
            self._decoder = HeaderDecoder(preprocessing, exif_orientation=upright)
        else:
            self._decoder = Decoder(preprocessing, exif_orientation=upright, how=vectors.decode)
        self._isolated = IsolatedDecoder(preprocessing, exif_orientation=upright, how=vectors.decode)

    def __call__(
        self, shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]:
        """Each shard's samples, then its `Ended`. `shards` gives None where there is none for now.

        `at` is told the stage and the shard that are waited for, for the watchdog.
        """
        waiting: queue.Queue[Any] = queue.Queue(maxsize=self._ahead)
        budget = ByteBudget(LOOKAHEAD_BYTES)
        with ThreadPoolExecutor(self._threads) as decoders, ThreadPoolExecutor(FETCHERS) as fetchers:
            reader = flow.start(lambda: self._read(shards, flow, waiting, budget, decoders, fetchers), then=waiting)
            try:
                yield from self._decoded(flow, waiting, budget, at)
            except BaseException:  # of the iterating thread too, which closes us
                flow.stop()
                raise
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                fetchers.shutdown(wait=False, cancel_futures=True)
                reader.join()
                self._isolated.close()

    def _read(
        self,
        shards: Iterable[Shard | None],
        flow: Flow,
        waiting: queue.Queue[Any],
        budget: ByteBudget,
        decoders: ThreadPoolExecutor,
        fetchers: ThreadPoolExecutor,
    ) -> None:
        for shard in shards:
            if shard is None:
                flow.pause(NOTHING_S)
                continue
            reading = _Reading(shard)
            self._reading = shard.name
            try:
                decode, most = self._decoder_for(shard)
                for several in grouped(_timed(read_samples(shard), reading), _weight, HANDFUL_BYTES, most):
                    sizes = [_weight(sample) for sample in several]
                    reading.samples += len(several)
                    reading.bytes_read += sum(len(sample.image) for sample in several)
                    budget.take(sum(sizes), flow)
                    fetched = [fetchers.submit(fetch, s) if s.url and not s.reject else None for s in several]
                    given = list(map(_Given, several, sizes, fetched))
                    flow.put(waiting, (reading, several, decoders.submit(_decode_all, decode, given, budget)))
                if _has_changed(shard):
                    raise StorageError(f"{redact(shard.url)} changed while it was read: run again")
            except (StorageError, OSError) as e:
                reading.error = f"read: {e}"
            flow.put(waiting, (reading, None, None))

    def _decoder_for(self, shard: Shard) -> tuple[Callable[[bytes], Decoded | Jpeg], int]:
        """And for how many images at once. Of a shard that took a worker down they are decoded in processes apart."""
        deaths = self._deaths(shard.name)
        if deaths >= MAX_DEATHS:
            raise StorageError(
                f"{deaths} workers died with this shard under way, and not by decoding its images: is there enough "
                "memory? Else its file breaks what reads it"
            )
        return (self._isolated, 1) if deaths else (self._decoder, self._handful)

    def _decoded(
        self, flow: Flow, waiting: queue.Queue[Any], budget: ByteBudget, at: Callable[[str, str], None]
    ) -> Iterator[Fed]:
        while True:
            at("read", self._reading)
            event = flow.get(waiting)
            if event is None:
                return
            reading, several, future = event
            if several is None:
                yield Fed(reading.shard, None, reading.ended)
                continue
            if reading.error is None:
                is_url = any(sample.url for sample in several)
                at("fetch" if is_url else "decode", reading.shard.name)
                try:
                    outcomes: list[Outcome] = flow.wait(future)
                except (StorageError, OSError) as e:
                    reading.error = f"{'fetch' if is_url else 'decode'}: {e}"
                    continue
                for sample, outcome in zip(several, outcomes, strict=True):
                    reading.fetched_bytes += outcome.size if sample.url else 0
                    yield Fed(reading.shard, sample, outcome)
            # Of a shard that failed, others are decoded still: nobody waits for them, and their bytes count as well.
            future.add_done_callback(partial(_give_encoded, budget))


def _decode_all(decode: Callable[[bytes], Decoded | Jpeg], several: list[_Given], budget: ByteBudget) -> list[Outcome]:
    """What is left of their bytes, once they are decoded, has its part of the budget until `_give_encoded`."""
    outcomes: list[Outcome] = []
    left = sum(given.size for given in several)
    try:
        for given in several:
            outcome = _decode(decode, given.sample, given.fetched)
            outcomes.append(outcome)
            done = given.size - _encoded_bytes(outcome)
            budget.give(done)
            left -= done
    except BaseException:
        budget.give(left)
        raise
    return outcomes


def _decode(decode: Callable[[bytes], Decoded | Jpeg], sample: Sample, fetched: Future[bytes] | None) -> Outcome:
    started, cpu = time.perf_counter(), time.thread_time()
    fetch_s = 0.0
    data = sample.image
    result: Decoded | Jpeg | Reject
    try:
        if sample.reject:
            raise sample.reject
        if fetched:
            data = fetched.result()
            fetch_s = time.perf_counter() - started
        result, stored = decode(data), len(data)
    except Reject as why:
        result, stored = why, len(data) or sample.size
    finally:
        sample.image = b""
    return Outcome(result, stored, fetch_s, time.perf_counter() - started - fetch_s, time.thread_time() - cpu)


def _encoded_bytes(outcome: Outcome) -> int:
    return len(outcome.result.data) if isinstance(outcome.result, Jpeg) else 0


def _give_encoded(budget: ByteBudget, decoded: "Future[list[Outcome]]") -> None:
    """Of images whose bytes were kept until they were handed over, or dropped."""
    if not decoded.cancelled() and decoded.exception() is None:
        budget.give(sum(map(_encoded_bytes, decoded.result())))


def _weight(sample: Sample) -> int:
    if sample.url:
        return sample.listed.size if sample.listed else FETCHED_BYTES
    return len(sample.image)


def _has_changed(shard: Shard) -> bool:
    if not shard.members:
        return shard.source is not None and not is_unchanged(shard.source)
    # One request a member is nothing on a local disk and the whole job on a remote store.
    return is_local(resolve(shard.url)[0]) and not all(map(is_unchanged, shard.members))


def _timed(samples: Iterator[Sample], reading: _Reading) -> Iterator[Sample]:
    """The same samples; the time that each took to come is the reader's."""
    while True:
        started, cpu = time.perf_counter(), time.thread_time()
        sample = next(samples, None)
        reading.read_s += time.perf_counter() - started
        reading.read_cpu_s += time.thread_time() - cpu
        if sample is None:
            return
        yield sample
