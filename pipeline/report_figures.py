"""What a report tells, gathered from an output: which run and version, and the figures of each section.

Whatever is missing (a run's note, its receipts, vectors, labels, a version before) leaves its section empty, with the
reason in `absent`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import indexed, progress, vector_map, versions
from pipeline.compare import Drift, compare
from pipeline.distributions import Distributions, distributions
from pipeline.errors import StorageError, UsageError
from pipeline.journal import Journal
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.parquet_files import open_parquet
from pipeline.progress import State, outcome
from pipeline.receipts import read_receipts
from pipeline.rejected import Rejected, rejected
from pipeline.tensor_rows import PREFIX
from pipeline.timeline import Timeline, timeline
from pipeline.vector_map import Duplicates, Map, Neighbours, Sampled
from pipeline.versions import Version

RUNS = 12  # listed, the newest
NAMED = 6  # shards of a change


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the version's input differs from that of the version before, by name and etag."""

    before: int
    same_set: bool
    added: int
    changed: int
    removed: int
    named: list[str]  # some of the added and changed, then of the removed ones
    rows_before: int
    rejected_before: int


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a report is of, known before any work.

    `version` is None where nothing was committed; then the files are what there is of the run's set.
    """

    output: str
    run: State | None
    runs: list[dict[str, Any]]  # the newest ones, oldest first: name, state, set, version, started and some results
    version: Version | None
    files: FileList
    described: dict[str, Any]  # set.json


@dataclass(frozen=True, kw_only=True)
class Figures(Chosen):
    """All that a report tells."""

    packages: dict[str, str]
    timeline: Timeline | None = None
    distributions: Distributions | None = None
    rejected: Rejected | None = None
    sampled: Sampled | None = None
    map: Map | None = None
    neighbours: list[Neighbours] = field(default_factory=list)
    neighbours_how: str = ""  # a sentence on what they were sought in
    duplicates: Duplicates | None = None
    change: Change | None = None
    drift: Drift | None = None
    absent: dict[str, str] = field(default_factory=dict)  # section → why it has nothing to show


def choose(root: Root, *, version: int | None = None, run: str | None = None) -> Chosen:
    """The run named, or that made the version named, or the newest; and its version, else the one named.

    Raises `UsageError` for those that the output does not have, where there is neither, and for a version that the run
    named did not make.
    """
    notes = [note for note in progress.read_notes(root) if _is_whole(note)]
    note, committed = _of_run(root, notes, run, version)
    set_name = committed.set if committed else note.set if note else ""
    return Chosen(
        output=root.url,
        run=note,
        runs=[_line(n) for n in notes[-RUNS:]],
        version=committed,
        files=versions.read_list(root, committed) if committed else _so_far(root, set_name),
        described=versions.described(root, set_name),
    )


def gather(root: Root, chosen: Chosen) -> Figures:
    """The figures of every section, which takes seconds to minutes."""
    note, committed, files, described = chosen.run, chosen.version, chosen.files, chosen.described
    classes = int(described["classes"])
    absent: dict[str, str] = {}
    sampled = _sampled(root, files, described, absent)
    drawn = vector_map.project(sampled) if sampled else None
    whole = _whole(root, committed, sampled, drawn) if sampled and drawn else None
    change, drift = _since(root, committed, files, absent)
    return Figures(
        **vars(chosen),
        packages=note.packages if note and note.packages else _packages(root, files),
        timeline=_timeline(root, note, absent),
        distributions=distributions(root, files, classes, lambda: _class_names(described)),
        rejected=rejected(root, files),
        sampled=sampled,
        map=drawn,
        neighbours=whole.neighbours if whole else [],
        neighbours_how=whole.how if whole else "",
        duplicates=whole.duplicates if whole else None,
        change=change,
        drift=drift,
        absent=absent,
    )


# which run, which version


def _of_run(
    root: Root, notes: Sequence[State], name: str | None, number: int | None
) -> tuple[State | None, Version | None]:
    note: State | None
    if name is not None:
        note = _named(root, notes, name)
        made = note.result.get("version")
        if number is not None and number != made:
            of = f"made version {made}" if made is not None else "made no version"
            raise UsageError(f"--version {number}: the run {note.name} {of}: leave out --version or --run")
    elif number is not None:
        of_it = [n for n in notes if n.result.get("version") == number]
        note = next(reversed([n for n in of_it if n.result.get("shards_embedded")] or of_it), None)
    else:
        note = notes[-1] if notes else None
    if number is None and note is not None:
        number = note.result.get("version")
        return note, None if number is None else versions.current(root, number)
    return note, versions.current(root, number)


def _named(root: Root, notes: Sequence[State], name: str) -> State:
    wanted = name.removeprefix("reports/").removesuffix(".json")
    for note in notes:
        if note.name == wanted:
            return note
    known = ", ".join(note.name for note in notes[-3:]) or "none"
    raise UsageError(f"--run {name}: {root.url} has no such run; the last ones: {known}")


def _so_far(root: Root, set_name: str) -> FileList:
    """What there is of a set that a run has not committed: by the journals of such runs, else by its last version."""
    files = Journal(root, set_name).read()
    current = versions.read_version(root)
    if current is not None and current.set == set_name:
        files += versions.read_list(root, current)
    names = np.array(files.column("shard").to_pylist(), dtype=str)
    _, firsts = np.unique(names, return_index=True)  # of two states of a shard the journal's
    return FileList(files.table.take(pa.array(np.sort(firsts), pa.int64())))


def _is_whole(note: State) -> bool:
    """An altered note tells nothing, as a damaged one."""
    return note.state != "committed" or {"shards", "shards_embedded", "images_per_s", "version"} <= note.result.keys()


def _line(note: State) -> dict[str, Any]:
    told = ("version", "shards_embedded", "rows", "seconds", "images_per_s", "limited_by", "top1", "top5", "labelled")
    line = {"name": note.name, "state": outcome(note), "set": note.set, "started": note.started}
    return line | {key: note.result.get(key) for key in told}


def _class_names(described: dict[str, Any]) -> Sequence[str]:
    """Of all classes, where they are ImageNet's; the names of others are in the rows alone."""
    if described["labels_source"] != "imagenet":
        return ()
    from pipeline.backbone import imagenet_names  # timm takes seconds, and is seldom needed

    return imagenet_names(int(described["classes"]))


def _packages(root: Root, files: FileList) -> dict[str, str]:
    """Out of the first file's metadata."""
    for name in files.names("embeddings"):
        with open_parquet(root, name) as file:
            told = (file.metadata.metadata or {}).get(f"{PREFIX}packages".encode(), b"{}")
        return dict(json.loads(told))
    return {}


# sections


def _timeline(root: Root, note: State | None, absent: dict[str, str]) -> Timeline | None:
    if note is None:
        absent["speed"] = "No note of the run that made this version is left."
        return None
    receipts = read_receipts(root, note.name)
    found = timeline(receipts) if receipts is not None else None
    if found is None:
        if outcome(note) in ("running", "died"):
            absent["speed"] = "The run wrote no record of its shards: it does so when it ends."
        elif note.result.get("shards_embedded"):
            absent["speed"] = "The record of the run's shards is gone."
        else:
            absent["speed"] = "This run embedded nothing: every shard was done before."
    return found


def _sampled(root: Root, files: FileList, described: dict[str, Any], absent: dict[str, str]) -> Sampled | None:
    found = None
    if "embedding" not in described["outputs"]:
        absent["vectors"] = "This set keeps metrics and no vectors."
    else:
        found = vector_map.sample(root, files)
        if found is None:
            absent["vectors"] = "There are no rows."
    return found


def _whole(root: Root, committed: Version | None, sampled: Sampled, drawn: Map) -> indexed.Whole:
    near, copies = vector_map.neighbours(sampled, drawn), vector_map.duplicates(sampled)
    return indexed.of_version(root, committed, sampled, near, copies)


def _since(
    root: Root, committed: Version | None, files: FileList, absent: dict[str, str]
) -> tuple[Change | None, Drift | None]:
    if committed is None:
        absent["drift"] = "Nothing was committed, so there is nothing to compare with the version before."
        return None, None
    earlier = [n for n in versions.numbers(root) if n < committed.version]
    if not earlier:
        absent["drift"] = "There is no version before this one to compare it with."
        return None, None
    try:
        before = versions.current(root, earlier[-1])
        change = _change(before, versions.read_list(root, before), committed, files)
        return change, compare(root, before.version, committed.version)
    except (UsageError, StorageError) as e:
        absent["drift"] = f"Version {earlier[-1]} cannot be compared with: {e}."
        return None, None


def _change(before: Version, old: FileList, after: Version, new: FileList) -> Change:
    at = pc.index_in(new.column("shard"), value_set=old.column("shard"))
    is_new = pc.is_null(at)
    is_changed = pc.fill_null(pc.not_equal(old.column("etag").take(at), new.column("etag")), False)
    is_gone = pc.invert(pc.is_in(old.column("shard"), value_set=new.column("shard")))
    fresh = new.column("shard").filter(pc.or_(is_new, is_changed))
    gone = old.column("shard").filter(is_gone)
    return Change(
        before=before.version,
        same_set=before.set == after.set,
        added=pc.sum(is_new).as_py() or 0,
        changed=pc.sum(is_changed).as_py() or 0,
        removed=len(gone),
        named=[*fresh.slice(0, NAMED).to_pylist(), *gone.slice(0, NAMED).to_pylist()],
        rows_before=before.rows,
        rejected_before=sum(before.rejects.values()),
    )
