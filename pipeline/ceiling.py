"""What the stages cost → how fast a run on this machine can be at most, what that is due to, and the best setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cuda_images import LEAST_COSINE, MEAN_LEVELS, MOST_LEVELS
from pipeline.engines import STATED_ERROR
from pipeline.measure import Cost, Difference
from pipeline.resizing import BOUNDS, Bound

ON_DEVICE = Bound(MOST_LEVELS, MEAN_LEVELS, LEAST_COSINE)  # what `--decode cuda` promises

WORTH_LESS_EXACT = 1.03  # another decoder than `exact` is chosen where a run gains 3 % by it …
LOOSE = ("scaled", "cuda")  # … and these never: who wants them has read their bounds


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to decode."""

    decode: str
    one: Cost  # with one thread
    all: Cost  # with one for each core, of one process
    difference: Difference
    there: Cost | None = None  # on the GPU, beside what a thread does here

    def as_dict(self) -> dict[str, Any]:
        bound = ON_DEVICE if self.decode == "cuda" else BOUNDS[self.decode]
        return {
            "decode": self.decode,
            **self.one.as_dict(),
            "images_per_s_threads": round(self.all.images_per_s, 1),
            "largest_levels": self.difference.largest,
            "mean_levels": round(self.difference.mean, 5),
            "cosine": round(self.difference.cosine, 7),
            "bound": bound._asdict(),
            "there": self.there.as_dict() if self.there else None,
        }


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One way to compute. `cosine`: the smallest with eager fp32, of the embeddings at hand."""

    engine: str
    precision: str
    batch_size: int
    start_s: float  # to load it, and to compile
    cost: Cost  # of one worker's threads, or of one GPU
    cosine: float

    def as_dict(self) -> dict[str, Any]:
        bound = STATED_ERROR.get((self.engine, self.precision))  # of eager none is stated: it is timm's own
        return {
            "engine": self.engine,
            "precision": self.precision,
            "batch_size": self.batch_size,
            **self.cost.as_dict(),
            "start_s": round(self.start_s, 1),
            "cosine": round(self.cosine, 7),
            "bound": bound._asdict() if bound else None,
        }


@dataclass(frozen=True, kw_only=True)
class Room:
    """`gpus` 0: the CPU computes. `workers`: processes; on GPUs as many as there are, to begin with."""

    cores: int
    gpus: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """`alone`: images/s that each stage could do with all of the machine to itself. `cpu_ms`: of one image."""

    images_per_s: float
    limited_by: str
    cpu_ms: dict[str, float]
    alone: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "images_per_s": round(self.images_per_s, 2),
            "limited_by": self.limited_by,
            "cpu_ms": {stage: round(ms, 4) for stage, ms in self.cpu_ms.items()},
            "alone_images_per_s": {stage: round(limit, 1) for stage, limit in self.alone.items()},
        }


def ceiling(room: Room, decoding: Decoding, forward: Forward, *, read: Cost, transfer: Cost, write: Cost) -> Ceiling:
    """On the CPU the cores / CPU seconds of an image; on GPUs what these do, or the cores with all but `forward`.

    Reading and writing have a thread of each worker, which may be less than that.
    """
    cpu_ms = {"read": read.cpu_ms, "decode": decoding.one.cpu_ms, "transfer": transfer.cpu_ms, "write": write.cpu_ms}
    if not room.gpus:
        cpu_ms["forward"] = forward.cost.cpu_ms
    alone = {stage: 1000 * room.cores / ms if ms else math.inf for stage, ms in cpu_ms.items()}
    for stage, cost in (("read", read), ("write", write)):
        alone[stage] = min(alone[stage], room.workers * cost.images_per_s)
    if room.gpus:
        there = 1 / decoding.there.images_per_s if decoding.there else 0.0  # it decodes and computes in turns
        alone["forward"] = room.gpus / (1 / forward.cost.images_per_s + there)
    together = 1000 * room.cores / sum(cpu_ms.values())
    narrowest = min(alone, key=lambda stage: alone[stage])
    if together < alone[narrowest]:
        return Ceiling(
            images_per_s=together, limited_by=max(cpu_ms, key=lambda stage: cpu_ms[stage]), cpu_ms=cpu_ms, alone=alone
        )
    return Ceiling(images_per_s=alone[narrowest], limited_by=narrowest, cpu_ms=cpu_ms, alone=alone)


def chosen(decodings: Sequence[Decoding], ceilings: dict[str, Ceiling]) -> Decoding:
    """The first (`exact`), unless another gives a run 3 % more."""
    best = decodings[0]
    for other in decodings[1:]:
        gain = ceilings[other.decode].images_per_s / ceilings[best.decode].images_per_s
        if other.decode not in LOOSE and gain > WORTH_LESS_EXACT:
            best = other
    return best


def workers_on_gpus(room: Room, decoding: Decoding, wanted_images_per_s: float) -> int:
    """As many for each GPU as it takes to decode so much: the interpreter's lock bounds what the threads of one do."""
    of_a_gpu = wanted_images_per_s / room.gpus
    return room.gpus * max(1, math.ceil(of_a_gpu / decoding.all.images_per_s - 0.1))
