"""Checks a committed version against its own promises and, where given, against the input.

Each file is there, as large as listed, of the version's set and of its shard, with every page's checksum right; each
sample of a shard is exactly one row of embeddings or rejects, and tokens, features and heads have the rows of the
embeddings in their order; every value is finite; no id comes twice.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.listing import Shard
from pipeline.output import Root
from pipeline.shards import read_keys
from pipeline.tensor_rows import PREFIX
from pipeline.versions import ShardFiles, Version, read_list

SHARDS_AT_ONCE = 4
NAMED = 20  # problems of one shard spelled out; the rest is counted
BATCH_ROWS = 4096
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
    listed = read_list(root, version)
    names = {f.shard for f in listed}
    by_name = {s.name: s for s in shards} if shards is not None else None
    found = Findings()
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for one in pool.map(lambda f: _verify_shard(root, version, f, by_name), listed):
            found.add(one)
    for name, count in Counter(f.shard for f in listed).items():
        if count > 1:
            found.bad_file(version.files, f"shard {name} is listed {count} times")
    for shard in (by_name or {}).values():
        if shard.name not in names:
            ids = [f"{shard.name}/{key}" for key in read_keys(shard)]
            found.missing += len(ids)
            found.name_ids("missing id (its shard is not in the version)", ids)
    return found


def _verify_shard(root: Root, version: Version, listed: ShardFiles, inputs: dict[str, Shard] | None) -> Findings:
    found = Findings()
    ids: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    embedded: list[str] = []
    rows = _read(root, version, listed, "embeddings", found, ids, positions, embedded)
    rejects = _read(root, version, listed, "rejects", found, ids, positions)
    for kind in listed.names.keys() - {"embeddings", "rejects"}:
        beside: list[str] = []
        read = _read(root, version, listed, kind, found, order=beside)
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
    shard = (inputs or {}).get(listed.shard)
    if shard is not None:
        _compare(listed.shard, ids, read_keys(shard), found)
    else:
        if inputs is not None:
            found.unexpected += len(ids)
            found.problems.append(f"unexpected shard: {listed.shard} is not in the input")
        lost = sorted(set(range(listed.counts.samples)) - positions.keys())
        found.missing += len(lost)
        found.name_ids(f"missing row of shard {listed.shard}", lost)
    return found


def _compare(shard: str, ids: Counter[str], keys: Iterable[str], found: Findings) -> None:
    expected = {f"{shard}/{key}" for key in keys}
    missing, unexpected = sorted(expected - ids.keys()), sorted(ids.keys() - expected)
    found.missing += len(missing)
    found.unexpected += len(unexpected)
    found.name_ids("missing id", missing)
    found.name_ids("unexpected id", unexpected)


def _read(
    root: Root,
    version: Version,
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
            for wrong in _wrong_metadata(file, version, listed):
                found.bad_file(name, wrong)
            rows = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file.schema_arrow)):
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
                broken = _not_finite(batch)
                found.not_finite += int(broken.sum())
                found.name_ids("not finite", [batch_ids[i] for i in np.flatnonzero(broken)])
            return rows
    except FileNotFoundError:
        found.bad_file(name, "missing")
    except (OSError, StorageError, pa.ArrowException, KeyError, UnicodeDecodeError) as e:
        found.bad_file(name, " ".join(str(e).split())[:300])
    return None


def _wrong_metadata(file: pq.ParquetFile, version: Version, listed: ShardFiles) -> Iterator[str]:
    own = {k.decode(): v.decode("utf-8", "replace") for k, v in (file.metadata.metadata or {}).items()}
    for key, value in {"set": version.set, "shard": listed.shard, "input_etag": listed.etag}.items():
        if own.get(PREFIX + key) != value:
            yield f"its {key} is {own.get(PREFIX + key)}, the version's {value}"


def _batch_rows(schema: pa.Schema) -> int:
    widths = [t.list_size * t.value_type.byte_width for t in schema.types if pa.types.is_fixed_size_list(t)]
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(widths))))


def _not_finite(batch: pa.RecordBatch) -> np.ndarray:
    """bool (rows,): any float of the row, in lists too, is NaN or infinite."""
    broken = np.zeros(len(batch), dtype=bool)
    for kind, column in zip(batch.schema.types, batch.columns, strict=True):
        listed = pa.types.is_fixed_size_list(kind)
        if pa.types.is_floating(kind.value_type if listed else kind):
            values: Any = column.flatten() if listed else column
            finite = np.isfinite(values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
            broken |= ~finite.reshape(len(batch), -1).all(axis=1)
    return broken
