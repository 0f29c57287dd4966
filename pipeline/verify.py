"""Checks a committed version against its own promises and, where given, against the input.

Each file is there, as large as listed, of the version's set and of its shard, with every page's checksum right and the
metadata that set.json and the list tell; each sample of a shard is exactly one row of embeddings or rejects, and
tokens, features and heads have the rows of the embeddings in their order; every value is finite; no id comes twice;
the list's counts add up to the version's. Held are the ids of the few shards under way. Not seen: what else a file's
footer says, such as a page's statistics or the names that other readers go by, for which Parquet has no checksum: of
300 bits flipped there, 121.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.flow import ordered
from pipeline.listing import Shard
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root
from pipeline.shards import read_keys
from pipeline.tensor_rows import PREFIX
from pipeline.versions import Version, read_list

SHARDS_AT_ONCE = 4
NAMED = 20  # problems of one shard spelled out; the rest is counted
BATCH_ROWS = 4096
COLUMNS = {"id": pa.string(), "shard": pa.string(), "key": pa.string(), "row": pa.int32()}  # of every row
BATCH_BYTES = 32 * 2**20  # fewer rows at once where they are large: 197x768 tokens are 0.3 MB a row


@dataclass
class Findings:
    """What is wrong. `problems` names it; the counts are complete even where the names are cut short."""

    ids: int = 0  # distinct ids found in embeddings and rejects
    missing: int = 0
    duplicated: int = 0
    unexpected: int = 0  # ids that the input does not have
    not_finite: int = 0
    bad_files: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.missing or self.duplicated or self.unexpected or self.not_finite or self.bad_files)

    def add(self, other: "Findings") -> None:
        for name in ("ids", "missing", "duplicated", "unexpected", "not_finite", "bad_files"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems

    def bad_file(self, name: str, why: object) -> None:
        """Counts a file once, however much is wrong with it."""
        before = f"bad file {name}: "
        self.bad_files += not any(p.startswith(before) for p in self.problems)
        self.problems.append(before + str(why))

    def name_ids(self, what: str, ids: Sequence[object]) -> None:
        self.problems += [f"{what}: {i}" for i in ids[:NAMED]]
        if len(ids) > NAMED:
            self.problems.append(f"{what}: {len(ids) - NAMED} more like {ids[NAMED]}")


def verify(root: Root, version: Version, shards: Sequence[Shard] | None = None) -> Findings:
    """All findings of one version; `shards`: the input's listing, to compare the ids with."""
    found = Findings()
    try:
        listed = read_list(root, version)
    except StorageError as e:
        found.bad_file(version.files, e)
        return found
    names = set(listed.column("shard").to_pylist())
    by_name = {s.name: s for s in shards} if shards is not None else None
    _verify_list(version, listed, found)
    described = _described(root, version, found)
    for one in ordered(lambda f: _verify_shard(root, described, f, by_name), listed, SHARDS_AT_ONCE):
        found.add(one)
    for shard in (by_name or {}).values():
        if shard.name not in names:
            ids = [f"{shard.name}/{key}" for key in read_keys(shard)]
            found.missing += len(ids)
            found.name_ids("missing id (its shard is not in the version)", ids)
    return found


def _verify_list(version: Version, listed: FileList, found: Findings) -> None:
    for name, count in Counter(listed.column("shard").to_pylist()).items():
        if count > 1:
            found.bad_file(version.files, f"shard {name} is listed {count} times")
    for f in listed:
        if f.counts.samples != f.counts.rows + f.counts.rejected:
            what = f"{f.counts.samples} samples are not {f.counts.rows} rows and {f.counts.rejected} rejects"
            found.bad_file(version.files, f"shard {f.shard}: {what}")
    total = listed.totals
    for name, listed_count, own in (
        ("shards", len(listed), version.shards),
        ("samples", total.samples, version.samples),
        ("rows", total.rows, version.rows),
        ("rejects", total.rejects, version.rejects),
    ):
        if listed_count != own:
            found.bad_file(version.files, f"its {name} are {listed_count}, the version's {own}")


def _described(root: Root, version: Version, found: Findings) -> dict[str, str]:
    """What every file's metadata must say: the set's name, and what set.json tells where it is there."""
    name = f"sets/{version.set}/set.json"
    try:
        described = json.loads(root.read(name))
        described.pop("set")
    except FileNotFoundError:  # the files themselves still tell their set
        return {"set": version.set}
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        found.bad_file(name, f"cannot be read: {e}")
        return {"set": version.set}
    if hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12] != version.set[-12:]:
        found.bad_file(name, f"it does not describe the set {version.set}")
        return {"set": version.set}
    texts = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in described.items()}
    return texts | {"set": version.set, "labels": texts.get("labels_source", "")}


def _verify_shard(
    root: Root, described: dict[str, str], listed: ShardFiles, inputs: dict[str, Shard] | None
) -> Findings:
    found = Findings()
    ids: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    embedded: list[str] = []
    rows = _read(root, described, listed, "embeddings", found, ids, positions, embedded)
    rejects = _read(root, described, listed, "rejects", found, ids, positions)
    for kind in listed.names.keys() - {"embeddings", "rejects"}:
        beside: list[str] = []
        read = _read(root, described, listed, kind, found, order=beside)
        if read is not None and rows is not None and beside != embedded:
            found.bad_file(listed.names[kind], f"its ids or their order are not those of {listed.embeddings}")
    found.ids = len(ids)
    twice = sorted(i for i, n in ids.items() if n > 1)
    found.duplicated = sum(ids[i] - 1 for i in twice)
    found.name_ids("duplicated id", twice)
    for name, got, expected in (
        (listed.embeddings, rows, listed.counts.rows),
        (listed.rejects, rejects, listed.counts.rejected),
    ):
        if got is not None and got != expected:
            found.bad_file(name, f"{got} rows, the version lists {expected}")
    odd = sorted(n for n, count in positions.items() if count > 1 or n not in range(listed.counts.samples))
    if odd and not twice:
        found.bad_file(listed.embeddings, f"row numbers twice in the shard, or beyond its samples: {odd[:NAMED]}")
    shard = (inputs or {}).get(listed.shard)
    if shard is not None:
        _compare(listed.shard, ids, read_keys(shard), found)
    else:
        if inputs is not None:
            found.unexpected += len(ids)
            found.problems.append(f"unexpected shard: {listed.shard} is not in the input")
        _missing_rows(listed, positions, found)
    return found


def _missing_rows(listed: ShardFiles, positions: Counter[int], found: Findings) -> None:
    samples = listed.counts.samples
    lost = max(0, samples - sum(n in range(samples) for n in positions))
    found.missing += lost
    what = f"missing row of shard {listed.shard}"
    named = list(islice((n for n in range(samples) if n not in positions), min(lost, NAMED)))
    found.problems += [f"{what}: {n}" for n in named]
    if lost > len(named):
        found.problems.append(f"{what}: {lost - len(named)} more")


def _compare(shard: str, ids: Counter[str], keys: Iterable[str], found: Findings) -> None:
    expected = {f"{shard}/{key}" for key in keys}
    missing, unexpected = sorted(expected - ids.keys()), sorted(ids.keys() - expected)
    found.missing += len(missing)
    found.unexpected += len(unexpected)
    found.name_ids("missing id", missing)
    found.name_ids("unexpected id", unexpected)


def _read(
    root: Root,
    described: dict[str, str],
    listed: ShardFiles,
    kind: str,
    found: Findings,
    ids: Counter[str] | None = None,
    positions: Counter[int] | None = None,
    order: list[str] | None = None,
) -> int | None:
    """Reads every page of one file; returns its rows, or None where it cannot be read to its end."""
    name, size = listed.names[kind], listed.sizes[kind]
    try:
        with root.open(name) as f:
            there = f.seek(0, 2)
            if there != size:
                found.bad_file(name, f"{there} bytes, the version lists {size}")
            file = pq.ParquetFile(f, page_checksum_verification=True, pre_buffer=False)
            for wrong in _wrong_metadata(file, described, listed, kind):
                found.bad_file(name, wrong)
            if columns := _wrong_columns(file.schema_arrow, own_rows=positions is not None):
                found.bad_file(name, columns)
                return None
            rows = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.schema_arrow)):
                if any(batch.column(c).null_count for c in COLUMNS if c in batch.schema.names):
                    found.bad_file(name, "an id, shard, key or row is null")
                    return None
                batch_ids = batch.column("id").to_pylist()
                if ids is not None:
                    ids.update(batch_ids)
                if positions is not None:
                    positions.update(batch.column("row").to_pylist())
                if order is not None:
                    order += batch_ids
                rows += len(batch)
                foreign = next((i for i in batch_ids if not i.startswith(f"{listed.shard}/")), None)
                if foreign is not None:
                    found.bad_file(name, f"id {foreign} is not of shard {listed.shard}")
                if positions is not None and set(batch.column("shard").to_pylist()) - {listed.shard}:
                    found.bad_file(name, f"its column shard is not {listed.shard} throughout")
                broken = _not_finite(batch)
                found.not_finite += int(broken.sum())
                found.name_ids("not finite", [batch_ids[i] for i in np.flatnonzero(broken)])
            return rows
    except FileNotFoundError:
        found.bad_file(name, "missing")
    except (OSError, StorageError, pa.ArrowException, KeyError, ValueError) as e:
        found.bad_file(name, " ".join(str(e).split())[:300])
    return None


def _wrong_metadata(file: pq.ParquetFile, described: dict[str, str], listed: ShardFiles, kind: str) -> Iterator[str]:
    own = {
        k.decode("utf-8", "replace").removeprefix(PREFIX): v.decode("utf-8", "replace")
        for k, v in (file.metadata.metadata or {}).items()
    }
    expected = described | {"shard": listed.shard, "input_etag": listed.etag}
    if kind == "embeddings":
        beside = {k: name for k, name in listed.names.items() if k != "embeddings"}
        expected |= {"counts": json.dumps(vars(listed.counts)), "files": json.dumps(beside)}
    for key in {"set", "shard", "input_etag", "counts", "files"} | own.keys():
        if key in expected and _parsed(own.get(key)) != _parsed(expected[key]):
            yield f"its {key} is {own.get(key)}, the version's {expected[key]}"


def _parsed(text: str | None) -> object:
    """JSON's value, whatever the order of its keys; else the text."""
    try:
        return cast(object, json.loads(text or ""))
    except ValueError:
        return text


def _wrong_columns(schema: pa.Schema, *, own_rows: bool) -> str | None:
    """`own_rows`: of embeddings and rejects; tokens, features and heads have ids alone."""
    wanted = COLUMNS if own_rows else {"id": COLUMNS["id"]}
    wrong = [c for c, kind in wanted.items() if schema.names.count(c) != 1 or schema.field(c).type != kind]
    return f"its columns {', '.join(wrong)} are missing or of another type: {schema.names}" if wrong else None


def _batch_rows(schema: pa.Schema) -> int:
    widths = [t.list_size * t.value_type.byte_width for t in schema.types if pa.types.is_fixed_size_list(t)]
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(widths))))


def _not_finite(batch: pa.RecordBatch) -> np.ndarray:
    """bool (rows,): any float of the row, in lists too, is NaN, infinite or null."""
    broken = np.zeros(len(batch), dtype=bool)
    for kind, column in zip(batch.schema.types, batch.columns, strict=True):
        listed = pa.types.is_fixed_size_list(kind)
        if pa.types.is_floating(kind.value_type if listed else kind):
            there = column.is_valid().to_numpy(zero_copy_only=False)  # `flatten` leaves out the lists that are null
            values: Any = column.flatten() if listed else column.drop_null()
            finite = np.isfinite(values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
            broken[there] |= ~finite.reshape(int(there.sum()), -1).all(axis=1)
            broken |= ~there
    return broken
