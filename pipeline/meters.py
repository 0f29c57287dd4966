"""A run's metrics through Ray: the driver tells them to its node's agent, which Prometheus asks (`pipeline.metrics`).

Ray's agents export where `ray[default]` is installed. Elsewhere what is told here goes nowhere, and costs as little:
a few sums at each receipt, and some thirty calls of a microsecond every `EVERY_S`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from pipeline import metrics
from pipeline.embed import Receipt
from pipeline.metrics import Metric
from pipeline.progress import State
from pipeline.speed import seconds_by_stage
from pipeline.versions import Version

EVERY_S = 5.0
NOTHING = 5e-324  # the least that a counter takes: its series is there from the start, and each sum after it is exact


class Meters:
    """One run's metrics: what comes of its shards, what its workers say, how it ended."""

    def __init__(self, state: State, output: str, before: Version | None):
        """`before`: the version that was current when the run started."""
        self._state, self._share = state, 1.0
        self._labels = {"output": output, "set": state.set}
        self._rays: dict[Metric, Any] = {}
        # (counter, value of its own label) → since it was last told
        self._due = {(m, value): NOTHING for m in metrics.RUN if m.kind == "counter" for value in m.values or ("",)}
        self._failed = 0
        self._said: dict[str, dict[str, Any]] = {}
        self._moved, self._progress_at = (0, 0), time.time()
        self._forward_s: dict[str, float] = {}  # of each worker, when it was last told …
        self._told_at = time.monotonic()  # … then
        self._commit_at, self._success_at = metrics.unix_time(before), 0.0

    @contextmanager
    def at(self, gpus: float) -> Iterator[None]:
        """While workers are at it, each with so many GPUs; 0: the CPU computes. In the end all counts are told."""
        self._share = gpus or 1.0
        self.tell()
        try:
            yield
        finally:
            self._said = {}
            self.tell()

    def add(self, receipt: Receipt) -> None:
        """Counts one that the run's state has seen."""
        self._failed += receipt.error is not None
        self._owe(metrics.READ, receipt.bytes_read)
        if receipt.embedded or receipt.error:
            self._owe(metrics.BATCHES, receipt.batches)
            for stage, seconds in seconds_by_stage(receipt.seconds).items():
                self._owe(metrics.STAGE_SECONDS, seconds, stage)
        if receipt.files and receipt.embedded:
            self._owe(metrics.IMAGES, receipt.files.counts.rows)
            self._owe(metrics.WRITTEN, sum(receipt.files.sizes.values()))
            for reason, count in receipt.files.counts.rejects.items():
                self._owe(metrics.REJECTS, count, reason)

    def see(self, said: dict[str, dict[str, Any]]) -> None:
        """Call it often, with what each worker says that it is at; it tells Ray when it is time."""
        self._said = said or self._said  # the board may be away for a moment
        moved = self._state.shards_done, sum(one["steps"] for one in self._said.values())
        if moved != self._moved:
            self._moved, self._progress_at = moved, time.time()
        if time.monotonic() - self._told_at >= EVERY_S:
            self.tell()

    def _owe(self, counter: Metric, amount: float, value: str = "") -> None:
        self._due[counter, value] = self._due.get((counter, value), 0.0) + amount

    def tell(self) -> None:
        """Hands Ray, where there is one, what is due and how things stand.

        Ray passes it to the agent every ten seconds, and when it shuts down. A gauge that was not set again is gone
        after twenty more, so all are set each time; a counter stays for as long as the agent.
        """
        if not ray.is_initialized():
            return
        due, self._due = self._due, {}
        for (counter, value), amount in due.items():
            if amount > 0:
                self._ray(counter).inc(amount, {counter.label: value} if counter.label else None)
        state, done = self._state, self._state.shards_done - self._failed
        to_do = state.shards - state.shards_unchanged - state.shards_done
        for name, count in zip(metrics.SHARD_STATES, (state.shards_unchanged, done, self._failed, to_do), strict=True):
            self._set(metrics.SHARDS, count, state=name)
        self._set(metrics.RUN_IMAGES, state.images)
        self._set(metrics.RUN_REJECTS, state.rejects)
        self._set(metrics.WORKERS, len(self._said))
        self._set(metrics.BATCH_SIZE, min((said["batch_size"] for said in self._said.values()), default=None))
        self._set(metrics.DEVICE_BUSY, self._device_busy())
        self._set(metrics.STARTED, state.started)
        self._set(metrics.PROGRESS, self._progress_at)
        self._set(metrics.COMMIT, self._commit_at)
        self._set(metrics.SUCCESS, self._success_at or None)

    def _device_busy(self) -> float:
        """Since it was last told."""
        before, self._forward_s = self._forward_s, {who: said["forward_s"] for who, said in self._said.items()}
        last, self._told_at = self._told_at, time.monotonic()
        return device_busy(before, self._forward_s, self._told_at - last, self._share)

    def succeed(self, version: Version | None) -> None:
        """The run ended well, with this version; None where it makes none, and the one before stays."""
        self._commit_at, self._success_at = metrics.unix_time(version) or self._commit_at, time.time()
        self.tell()

    def _set(self, gauge: Metric, value: float | None, **labels: str) -> None:
        self._ray(gauge).set(value, labels)

    def _ray(self, metric: Metric) -> Any:
        """Ray's own of that name, made once Ray is there: its core drops what was made before."""
        if metric not in self._rays:
            kind = Counter if metric.kind == "counter" else Gauge
            made = kind(metric.full_name, metric.help, metric.label_names)
            self._rays[metric] = made.set_default_tags(self._labels)
        return self._rays[metric]


def device_busy(before: dict[str, float], after: dict[str, float], elapsed_s: float, share: float) -> float:
    """0…1 of all devices in use, by the seconds that each worker had computed before and after.

    `share`: of a device, that each worker has. Those that share one each count its seconds while both wait for it, so
    that it is 1 too soon.
    """
    taken = sum(max(0.0, seconds - before.get(who, 0.0)) for who, seconds in after.items())
    devices = math.ceil(round(len(after) * share, 6))
    return min(1.0, taken / (devices * elapsed_s)) if devices and elapsed_s > 0 else 0.0
