"""A version's rejects: how many by reason, and a few of each with what is known of them."""

import json
from dataclasses import dataclass

import pyarrow.compute as pc

from pipeline.flow import ordered
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.parquet_files import open_parquet

EXAMPLES = 6  # of each reason
SHARDS_A_REASON = 3  # read for them
AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Example:
    """One reject, as its row says."""

    id: str
    shard: str
    stage: str
    reason: str
    message: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """`reasons`: counts, the largest first. `examples`: in the same order, at most `EXAMPLES` of each."""

    samples: int
    reasons: dict[str, int]
    examples: list[Example]


def rejected(root: Root, files: FileList) -> Rejected:
    """Reads the rejects of a few shards; counts are from the list."""
    totals = files.totals
    reasons = dict(sorted(totals.rejects.items(), key=lambda one: (-one[1], one[0])))
    paths = _paths(files, set(reasons))
    found: dict[str, list[Example]] = {reason: [] for reason in reasons}
    for examples in ordered(lambda path: _read(root, path), paths, AT_ONCE):
        for example in examples:
            if len(found[example.reason]) < EXAMPLES:
                found[example.reason].append(example)
    return Rejected(samples=totals.samples, reasons=reasons, examples=[e for some in found.values() for e in some])


def _paths(files: FileList, reasons: set[str]) -> list[str]:
    """Of the first shards that have each reason."""
    some = files.table.filter(pc.greater(files.table["rejected"], 0)).select(["rejects", "counts"])
    left = dict.fromkeys(reasons, SHARDS_A_REASON)
    paths = list[str]()
    for batch in some.to_batches(max_chunksize=1024):
        for path, counts in zip(batch["rejects"].to_pylist(), batch["counts"].to_pylist(), strict=True):
            here = [reason for reason in json.loads(counts)["rejects"] if left.get(reason, 0) > 0]
            if here and path is not None:
                paths.append(path)
                for reason in here:
                    left[reason] -= 1
        if not any(left.values()):
            break
    return paths


def _read(root: Root, path: str) -> list[Example]:
    """At most `EXAMPLES` of each reason in one file."""
    with open_parquet(root, path) as file:
        table = file.read(columns=["id", "shard", "stage", "reason", "message", "bytes"])
    found = list[Example]()
    for reason in pc.unique(table["reason"]).to_pylist():
        rows = table.filter(pc.equal(table["reason"], reason)).slice(0, EXAMPLES)
        found += [Example(**row) for row in rows.to_pylist()]
    return found
