"""What can be watched, by name: each metric's kind, labels and help; and an output's own state as Prometheus text.

A run exports those of `RUN` through Ray's agents, which put `ray_` before each name (`pipeline.meters`); they are gone
when its cluster is. What an output says of itself, `OUTPUT`, can be asked any time: `shard2vec status OUT --metrics`.

Names end in their unit; a counter's ends in `_total`. Labels have few values: outputs, sets, and those that a metric
lists. Shards, ids, hosts and runs are none.
"""

import calendar
import re
import time
from collections.abc import Iterable
from typing import Literal, NamedTuple

from pipeline.embed import STAGES
from pipeline.errors import REASONS
from pipeline.output import Root
from pipeline.progress import STATES, is_alive, outcome, read_notes
from pipeline.versions import Version, read_version

PREFIX = "shard2vec_"
BASE = ("output", "set")  # labels of every metric: the output's URL, the set's name
SHARD_STATES = ("unchanged", "done", "failed", "to_do")
NOTES = 32  # of the newest runs, that are read


class Metric(NamedTuple):
    """`name`: without the prefix. `label`: one beside those of every metric, "" for none, and all its `values`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*BASE, self.label) if self.label else BASE


# Counters of a run count finished shards that this run embedded, so that they end exactly where its receipts do.
IMAGES = Metric("images_total", "counter", "Rows embedded, in shards that are finished")
REJECTS = Metric("rejects_total", "counter", "Samples that gave no vector, by reason", "reason", REASONS)
READ = Metric("read_bytes_total", "counter", "Bytes read of the input")
WRITTEN = Metric("written_bytes_total", "counter", "Bytes of the files put into the output")
BATCHES = Metric("batches_total", "counter", "Forward passes; images by these is how full batches are")
STAGE_SECONDS = Metric(
    "stage_seconds_total",
    "counter",
    "Seconds of each stage, summed over the threads of all workers; forward on CUDA by the device's own clock",
    "stage",
    STAGES,
)

SHARDS = Metric("shards", "gauge", "Shards of the input, by what became of them", "state", SHARD_STATES)
RUN_IMAGES = Metric("run_images", "gauge", "Rows of this run so far, those of shards under way too")
RUN_REJECTS = Metric("run_rejects", "gauge", "Rejects of this run so far, those of shards under way too")
WORKERS = Metric("workers", "gauge", "Workers that have loaded the model and are not known to be dead")
BATCH_SIZE = Metric("batch_size", "gauge", "Images of a full forward pass, the least of all workers")
DEVICE_BUSY = Metric("device_busy_ratio", "gauge", "Share of the last seconds that devices computed, of all in use")
STARTED = Metric("start_timestamp_seconds", "gauge", "Unix time when the run started")
PROGRESS = Metric("last_progress_timestamp_seconds", "gauge", "Unix time when a sample or a shard was last finished")
COMMIT = Metric("last_commit_timestamp_seconds", "gauge", "Unix time when the output's current version was made")
SUCCESS = Metric("last_success_timestamp_seconds", "gauge", "Unix time when a run last ended well, with news or not")

RUN = (
    *(IMAGES, REJECTS, READ, WRITTEN, BATCHES, STAGE_SECONDS),
    *(SHARDS, RUN_IMAGES, RUN_REJECTS, WORKERS, BATCH_SIZE, DEVICE_BUSY, STARTED, PROGRESS, COMMIT, SUCCESS),
)

VERSION = Metric("version", "gauge", "Number of the output's current version; 0 before the first")
VERSION_SHARDS = Metric("version_shards", "gauge", "Shards of the current version")
VERSION_ROWS = Metric("version_rows", "gauge", "Rows of the current version")
VERSION_REJECTS = Metric("version_rejects", "gauge", "Rejects of the current version, by reason", "reason", REASONS)
RUNS = Metric("runs", "gauge", "Runs that are under way")
LAST_RUN = Metric("last_run", "gauge", "One for how the newest run stands, zero for all else", "state", STATES)
LAST_RUN_SEEN = Metric("last_run_timestamp_seconds", "gauge", "Unix time when the newest run was last heard of")

OUTPUT = (VERSION, VERSION_SHARDS, VERSION_ROWS, VERSION_REJECTS, COMMIT, SUCCESS, RUNS, LAST_RUN, LAST_RUN_SEEN)


class Sample(NamedTuple):
    """`labels`: by name, in any order."""

    metric: Metric
    labels: dict[str, str]
    value: float


def unix_time(version: Version | None) -> float | None:
    """When the version was made; None where there is none."""
    return None if version is None else float(calendar.timegm(time.strptime(version.created, "%Y-%m-%dT%H:%M:%SZ")))


def of_output(root: Root) -> list[Sample]:
    """What an output says of itself and of the newest runs on it. Raises `StorageError` where it cannot be read."""
    version, runs = read_version(root), read_notes(root, NOTES)
    made = unix_time(version)
    at = {"output": root.url, "set": version.set if version else ""}
    samples = [Sample(VERSION, at, version.version if version else 0)]
    if version and made:
        samples += [Sample(VERSION_SHARDS, at, version.shards), Sample(VERSION_ROWS, at, version.rows)]
        samples += [Sample(VERSION_REJECTS, at | {"reason": r}, version.rejects.get(r, 0)) for r in REASONS]
        samples += [Sample(COMMIT, at, made)]
    well = [run.updated for run in runs if run.state == "committed"]
    if well or made:
        samples += [Sample(SUCCESS, at, max(well, default=made or 0.0))]
    samples += [Sample(RUNS, at, sum(map(is_alive, runs)))]
    if runs:
        newest = max(runs, key=lambda run: run.started)
        of_run = at | {"set": newest.set}
        samples += [Sample(LAST_RUN, of_run | {"state": s}, outcome(newest) == s) for s in STATES]
        samples += [Sample(LAST_RUN_SEEN, of_run, newest.updated)]
    return samples


def text(samples: Iterable[Sample]) -> str:
    """Prometheus' text format: for a scrape, or for the folder of node_exporter's textfile collector."""
    by_metric: dict[str, list[Sample]] = {}
    for sample in samples:
        by_metric.setdefault(sample.metric.full_name, []).append(sample)
    lines: list[str] = []
    for name, found in by_metric.items():
        lines += [f"# HELP {name} {found[0].metric.help}", f"# TYPE {name} {found[0].metric.kind}"]
        lines += [f"{name}{{{_labels(s)}}} {float(s.value):.17g}" for s in found]
    return "\n".join(lines) + "\n"


def _labels(sample: Sample) -> str:
    return ",".join(f'{label}="{_escaped(sample.labels[label])}"' for label in sample.metric.label_names)


def _escaped(value: str) -> str:
    return re.sub(r'[\\"\n]', lambda found: {"\\": r"\\", '"': r"\"", "\n": r"\n"}[found[0]], value)
