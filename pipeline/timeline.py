"""A run's receipts → how fast it was over time, by stage, and which shards were slow or failed.

A receipt tells when a shard began and ended, so what it took is spread evenly between: curves are as fine as shards
are short.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embed import STAGES

BINS = 60  # of the curves, at most
SHARDS_A_BIN = 1.5  # fewer, longer bins where few shards ended: one shard is no curve
SLOWEST, FAILED = 12, 8  # shards named
AT_ONCE = 16_384  # receipts; 8 MB of shares of bins
PARTS_OF = {"read": ("read", "fetch"), "decode": ("decode", "batch_decode")}  # as `speed.Sums.stage_seconds` has it


@dataclass(frozen=True, kw_only=True)
class SlowShard:
    """`seconds`: from its first sample to its last file, while the worker was at others too."""

    shard: str
    worker: str
    seconds: float
    samples: int
    images_per_s: float
    times_median: float  # seconds an image, against the run's median shard
    stage_seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """`edges`: seconds since the first shard began, one more than there are values in each curve."""

    shards: int  # embedded by this run
    workers: int
    hosts: int
    seconds: float
    edges: list[float]
    images_per_s: list[float]
    at_work: dict[str, list[float]]  # by stage: seconds a second, which is how many threads were at it
    median_s: float  # seconds of a shard
    slowest: list[SlowShard]
    failed: list[dict[str, str]]  # shard, error


def timeline(receipts: pa.Table) -> Timeline | None:
    """`receipts`: the columns of `receipts.RECEIPTS`. None where the run embedded nothing and nothing failed."""
    errors = receipts.filter(pc.is_valid(receipts["error"])).slice(0, FAILED).select(["shard", "error"])
    mine = receipts.filter(receipts["embedded"])
    if not mine.num_rows and not errors.num_rows:
        return None
    started, ended = _numbers(mine, "started"), _numbers(mine, "ended")
    samples = _numbers(mine, "samples")
    stages = {
        stage: np.sum([_numbers(mine, f"{part}_s") for part in PARTS_OF.get(stage, (stage,))], axis=0)
        for stage in STAGES
    }
    first, last = (float(started.min()), float(ended.max())) if len(started) else (0.0, 0.0)
    edges = np.linspace(0.0, max(last - first, 1e-3), 1 + int(np.clip(len(started) / SHARDS_A_BIN, 1, BINS)))
    per_bin = _spread(started - first, ended - first, np.stack([samples, *stages.values()], axis=1), edges)
    rates = per_bin / np.diff(edges)[:, None]
    workers = pc.unique(receipts["worker"]).to_pylist()
    return Timeline(
        shards=mine.num_rows,
        workers=len(workers),
        hosts=len({worker.partition(":")[0] for worker in workers}),
        seconds=last - first,
        edges=edges.tolist(),
        images_per_s=rates[:, 0].tolist() if len(started) else [],
        at_work={stage: rates[:, i + 1].tolist() for i, stage in enumerate(stages)} if len(started) else {},
        median_s=float(np.median(ended - started)) if len(started) else 0.0,
        slowest=_slowest(mine, ended - started, samples, stages),
        failed=errors.to_pylist(),
    )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy().astype(np.float64)


def _spread(started: np.ndarray, ended: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """What of `values` (n, c), each even between its start and end, falls between edges: (len(edges) - 1, c)."""
    below = np.zeros((len(edges), values.shape[1]))
    for at in range(0, len(started), AT_ONCE):
        begin, spans = started[at : at + AT_ONCE], np.maximum(ended - started, 1e-6)[at : at + AT_ONCE]
        shares = np.clip((edges[:, None] - begin) / spans, 0.0, 1.0)
        below += shares @ values[at : at + AT_ONCE]
    return np.diff(below, axis=0)


def _slowest(
    mine: pa.Table, seconds: np.ndarray, samples: np.ndarray, stages: dict[str, np.ndarray]
) -> list[SlowShard]:
    """Those that took longest, the longest first."""
    per_image = seconds / np.maximum(samples, 1)
    median = max(float(np.median(per_image)), 1e-9) if len(per_image) else 1.0
    found: list[SlowShard] = []
    for i in np.argsort(-seconds, kind="stable")[:SLOWEST].tolist():
        row: dict[str, Any] = mine.slice(i, 1).to_pylist()[0]
        found.append(
            SlowShard(
                shard=row["shard"],
                worker=row["worker"],
                seconds=float(seconds[i]),
                samples=row["samples"],
                images_per_s=float(samples[i] / max(seconds[i], 1e-6)),
                times_median=float(per_image[i] / median),
                stage_seconds={stage: float(values[i]) for stage, values in stages.items()},
            )
        )
    return found
