"""Runs of peers → the README's table: medians of all rounds with their range, ratios round by round."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HEAD = (
    "| | steady images/s | to two processes | all-in images/s | first row, s | peak MB |",
    "| --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one peer; a failed one has a reason and no figures."""

    images_per_s: float = 0.0
    all_in_images_per_s: float = 0.0
    first_row_s: float = 0.0
    peak_mb: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """`reference`: the runs that are its 1.00, in the same rounds; empty where they were not asked for."""

    title: str
    runs: Sequence[Run]
    reference: Sequence[Run]


def markdown(rows: Sequence[Row]) -> str:
    return "\n".join([*HEAD, *map(line, rows)])


def line(row: Row) -> str:
    """A peer that failed in any round is reported as failed, with its first reason."""
    failures = [run.failure for run in row.runs if run.failure]
    if failures:
        why = failures[0].replace("|", "/")
        return f"| {row.title} | failed in {len(failures)} of {len(row.runs)}: {why} | | | | |"
    cells = (
        spread([run.images_per_s for run in row.runs], 1),
        spread(ratios(row), 2),
        spread([run.all_in_images_per_s for run in row.runs], 1),
        spread([run.first_row_s for run in row.runs], 1),
        spread([run.peak_mb for run in row.runs], 0),
    )
    return f"| {row.title} | {' | '.join(cells)} |"


def ratios(row: Row) -> list[float]:
    pairs = zip(row.runs, row.reference, strict=False)
    return [run.images_per_s / two.images_per_s for run, two in pairs if two.images_per_s]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the range where there is one."""
    if not values:
        return "–"
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"
