"""What the stages cost → how fast a run on this machine can be at most, what that is due to, and the best setting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.measure import Cost, Difference

WORTH_LESS_EXACT = 1.03  # another decoder than `exact` is chosen where a run gains 3 % by it …
LOOSE = "scaled"  # … and this one never: its bound is looser than that of other precisions


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One way to decode."""

    decode: str
    one: Cost  # with one thread
    all: Cost  # with one for each core, of one process
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One way to compute. `cosine`: the smallest with eager fp32, of the embeddings at hand."""

    engine: str
    precision: str
    batch_size: int
    start_s: float  # to load it, and to compile
    cost: Cost  # of one worker's threads, or of one GPU
    cosine: float


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


def ceiling(room: Room, decoding: Decoding, forward: Forward, *, read: Cost, transfer: Cost, write: Cost) -> Ceiling:
    """On the CPU the cores / CPU seconds of an image; on GPUs what these do, or the cores without `forward`.

    Reading and writing have a thread of each worker, which may be less than that.
    """
    cpu_ms = {"read": read.cpu_ms, "decode": decoding.one.cpu_ms, "transfer": transfer.cpu_ms, "write": write.cpu_ms}
    if not room.gpus:
        cpu_ms["forward"] = forward.cost.cpu_ms
    alone = {stage: 1000 * room.cores / ms if ms else math.inf for stage, ms in cpu_ms.items()}
    for stage, cost in (("read", read), ("write", write)):
        alone[stage] = min(alone[stage], room.workers * cost.images_per_s)
    if room.gpus:
        alone["forward"] = room.gpus * forward.cost.images_per_s
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
        if other.decode != LOOSE and gain > WORTH_LESS_EXACT:
            best = other
    return best


def workers_on_gpus(room: Room, decoding: Decoding, wanted_images_per_s: float) -> int:
    """As many for each GPU as it takes to decode so much: the interpreter's lock bounds what the threads of one do."""
    of_a_gpu = wanted_images_per_s / room.gpus
    return room.gpus * max(1, math.ceil(of_a_gpu / decoding.all.images_per_s - 0.1))
