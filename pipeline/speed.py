"""What a run's receipts add up to, and what they tell of its speed: the steady rate, the ceiling, what limits it.

The stages of a worker run at once, so a run is as fast as the busiest of the things that they need. Of each there were
so many seconds, and each stage took some:

    reader      a thread of each worker, or of each stream of its feeders: `read`, the store and samples out of shards
    decoders    threads of each worker: `decode`; while they wait for images behind URLs, `read`
    batcher     a thread of each worker: `transfer` makes batches, `forward` computes them, or on CUDA launches it;
                with `--decode cuda` it has `decode` too
    writer      a thread of each worker: `write`
    cores       CPU seconds of all threads, of all cores
    device      on CUDA: `forward`, by the device's own clock, of all GPUs in use

    busy = seconds taken / seconds that there were          ceiling = images/s / busy, of the busiest

A stage limits where it takes the most of the busiest. Where nothing is nearly always busy nothing limits but the wait:
a run of few images starts and ends more than it works, workers may lack shards, and others may take the cores. A thread
looks busy while it waits for a core, or for the device to take its next launch; so where cores or device are nearly
always busy it is them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.embed import PARTS, STAGES, Receipt
from pipeline.rows import Counts

NEARLY_ALWAYS = 0.8  # busy: the rest is the start, the end, and what the bounded queues cannot even out
NOTHING, WAITING = "nothing to do", "waiting"


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a run has to work with."""

    cores: int  # of all machines
    threads: int  # of each worker that decode; on the CPU as many compute
    gpus: float = 0.0  # of each worker, may be a fraction; 0: the CPU computes
    streams: int = 0  # of each worker's feeders, each a thread that reads and one that decodes; 0: it has none


class Resource(NamedTuple):
    """Seconds that there were of something, and what each stage took of them."""

    name: str
    seconds: float
    taken: dict[str, float]  # by stage

    @property
    def busy(self) -> float:
        """0…1. Workers that share a device each count its seconds while both wait for it: it is never more than 1."""
        return min(1.0, sum(self.taken.values()) / self.seconds)

    @property
    def stage(self) -> str:
        return max(self.taken, key=lambda stage: self.taken[stage])


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run reached and what kept it from more; shares are 0…1."""

    images_per_s: float  # steady: images of a worker's second, times the workers that were at it at once
    ceiling_images_per_s: float | None  # with the busiest resource always busy; None where nothing was embedded
    of_ceiling: float | None
    limited_by: str  # a stage, `waiting` or `nothing to do`
    stage_busy: dict[str, float]  # of the stage's own threads, or of the device
    cores_busy: float
    device_busy: float | None  # None: the CPU computed
    cpu_seconds: dict[str, float]  # by stage, of all its threads
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        """The part of `embed --json` that tells of speed, rounded."""
        ceiling, share = self.ceiling_images_per_s, self.of_ceiling
        return {
            "images_per_s": round(self.images_per_s, 2),
            "ceiling_images_per_s": None if ceiling is None else round(ceiling, 2),
            "of_ceiling": None if share is None else round(share, 3),
            "limited_by": self.limited_by,
            "speed": self.sentence,
            "stage_busy": {stage: round(busy, 3) for stage, busy in self.stage_busy.items()},
            "cores_busy": round(self.cores_busy, 3),
            "device_busy": None if self.device_busy is None else round(self.device_busy, 3),
            "cpu_seconds": {stage: round(seconds, 3) for stage, seconds in self.cpu_seconds.items()},
        }


class Sums:
    """What a run's receipts add up to, so that none of them need be kept: a few numbers, and two for each worker."""

    def __init__(self) -> None:
        self.receipts = 0
        self.shards = 0  # that have files now
        self.counts = Counts()  # of these
        self.samples = 0  # without those that another driver was faster with
        self.bytes_read = 0
        self._seconds: dict[str, float] = {}
        self._cpu_s: dict[str, float] = {}
        self._workers: dict[str, tuple[float, float]] = {}  # first start, last end

    def add(self, receipt: Receipt) -> None:
        self.receipts += 1
        self.bytes_read += receipt.bytes_read
        if receipt.files:
            self.shards += 1
            self.counts.add(receipt.files.counts)
            self.samples += receipt.files.counts.samples * receipt.embedded
        if receipt.embedded or receipt.error:  # else there was nothing to do for it
            _add(self._seconds, receipt.seconds)
            _add(self._cpu_s, receipt.cpu_s)
            first, last = self._workers.get(receipt.worker, (receipt.started, receipt.ended))
            self._workers[receipt.worker] = min(first, receipt.started), max(last, receipt.ended)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Summed over the threads of all workers; `forward` is the device's seconds on CUDA."""
        return seconds_by_stage(self._seconds)

    def speed(self, means: Means) -> Speed:
        if not self.samples:
            idle = dict.fromkeys(STAGES, 0.0)
            sentence = "nothing to embed: every shard was done"
            return Speed(
                images_per_s=0.0,
                ceiling_images_per_s=None,
                of_ceiling=None,
                limited_by=NOTHING,
                stage_busy=idle,
                cores_busy=0.0,
                device_busy=0.0 if means.gpus else None,
                cpu_seconds=idle,
                sentence=sentence,
            )
        spans = sum(max(1e-3, last - first) for first, last in self._workers.values())
        at_once = _most_at_once(self._workers.values())
        own, cores, device = self._own(means, spans), self._cores(means, spans / at_once), None
        if means.gpus:
            there = math.ceil(round(at_once * means.gpus, 6)) * spans / at_once
            # Of workers that share a GPU each one's time has some of the others' in it.
            device = Resource("device", there, {"forward": min(there, self._seconds.get("forward", 0.0))})
        shared = (cores, device) if device else (cores,)
        busiest = max([r for r in shared if r.busy >= NEARLY_ALWAYS] or (*own, *shared), key=lambda r: r.busy)
        images_per_s = at_once * self.samples / spans
        return Speed(
            images_per_s=images_per_s,
            ceiling_images_per_s=images_per_s / busiest.busy if busiest.busy else None,
            of_ceiling=busiest.busy or None,
            limited_by=busiest.stage if busiest.busy >= NEARLY_ALWAYS else WAITING,
            stage_busy=_by_stage(own, device),
            cores_busy=cores.busy,
            device_busy=device.busy if device else None,
            cpu_seconds=cores.taken,
            sentence=_sentence(images_per_s, busiest, (*own, *shared)),
        )

    def _own(self, means: Means, spans: float) -> tuple[Resource, ...]:
        """Those that each worker has for itself. `spans`: seconds of all workers, summed."""
        s = {part: self._seconds.get(part, 0.0) for part in PARTS}
        forward = s["launch" if means.gpus else "forward"]
        return (
            Resource("reader", spans * (means.streams or 1), {"read": s["read"]}),
            Resource("decoders", spans * (means.streams or means.threads), {"read": s["fetch"], "decode": s["decode"]}),
            Resource("batcher", spans, {"decode": s["batch_decode"], "transfer": s["transfer"], "forward": forward}),
            Resource("writer", spans, {"write": s["write"]}),
        )

    def _cores(self, means: Means, seconds: float) -> Resource:
        """`seconds`: of the workers that were at it at once.

        The forward pass on the CPU computes in threads that nobody can ask: it has what the process took beyond the
        other stages, and at most all its threads for as long as it lasted. On CUDA it has what launching took.
        """
        cpu = {stage: self._cpu_s.get(stage, 0.0) for stage in STAGES}
        if means.gpus:
            cpu["forward"] = self._cpu_s.get("launch", 0.0)
        else:
            known = ("transfer", "write") if means.streams else ("read", "decode", "transfer", "write")
            rest = self._cpu_s.get("process", 0.0) - sum(cpu[stage] for stage in known)
            most = self._seconds.get("forward", 0.0) * means.threads
            cpu["forward"] = max(cpu["forward"], min(rest, most))
        return Resource("cores", means.cores * seconds, cpu)


def seconds_by_stage(parts: dict[str, float]) -> dict[str, float]:
    """Seconds by `PARTS` → by stage: images behind URLs are `read`, those decoded on the device `decode`."""
    seconds = {stage: parts.get(stage, 0.0) for stage in STAGES}
    more = {"read": "fetch", "decode": "batch_decode"}
    return seconds | {stage: seconds[stage] + parts.get(part, 0.0) for stage, part in more.items()}


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, number in more.items():
        sums[name] = sums.get(name, 0.0) + number


def _most_at_once(workers: Iterable[tuple[float, float]]) -> int:
    """Workers at the same time: one that died and its successor are one."""
    changes = sorted((at, change) for first, last in workers for at, change in ((first, 1), (last, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return max(1, most)


def _by_stage(threads: tuple[Resource, ...], device: Resource | None) -> dict[str, float]:
    """How busy each stage keeps what it runs on; the more so of two, where `read` waits in two places."""
    busy = dict.fromkeys(STAGES, 0.0)
    for resource in threads:
        for stage, seconds in resource.taken.items():
            busy[stage] = max(busy[stage], min(1.0, seconds / resource.seconds))
    return busy | ({"forward": device.busy} if device else {})


def _sentence(images_per_s: float, busiest: Resource, all_of_them: tuple[Resource, ...]) -> str:
    share = f"{busiest.busy:.0%}"
    others = ", ".join(f"{r.name} {r.busy:.0%}" for r in all_of_them if r is not busiest)
    if busiest.busy < NEARLY_ALWAYS:
        return (
            f"{images_per_s:,.1f} images/s, limited by nothing that is busy: {busiest.name} {share}, {others}; "
            "too few images, too few shards for the workers, or cores that others take"
        )
    total = sum(busiest.taken.values())
    parts = sorted(busiest.taken, key=lambda stage: -busiest.taken[stage])
    of_it = ", ".join(f"{stage} {busiest.taken[stage] / total:.0%}" for stage in parts)
    what = f"{busiest.name} {share} busy" + (f" with {of_it}" if len(parts) > 1 else "")
    return f"{images_per_s:,.1f} images/s, {share} of the ceiling, limited by {busiest.stage} ({what}; {others})"
