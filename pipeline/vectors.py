"""A version's vectors as directions: float32 of length 1, block by block or one by one, out of its Parquet files.

A vector's number is `file << 32 | row`: its file's place in the version's list and its row in that file. A zero vector
has no direction and stays zero, so that its cosine with anything is 0. What is held at once are a few row groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import StorageError, UsageError
from pipeline.flow import ahead, ordered
from pipeline.legible import legible
from pipeline.output import Root
from pipeline.versions import Version, read_list

ROW_BITS = 32
BLOCK_ROWS = 8192  # a row group of ours
FILES_AT_ONCE = 4
LOOKED_THROUGH = 20_000  # names among which similar ones are sought when one is not there


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one file. `unit`: float32 (n, D)."""

    first: int  # the number of the first; the next one's is one more
    unit: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """int64 (n,)."""
        return self.first + np.arange(len(self.unit), dtype=np.int64)


class Vectors:
    """The vectors of one version. Raises `UsageError` where it has none, `StorageError` where a file is damaged."""

    def __init__(self, root: Root, version: Version):
        self.root, self.version = root, version
        files = read_list(root, version)
        self._shards, self._etags = files.column("shard"), files.column("etag")
        self._names, self._bytes = files.column("embeddings"), files.column("embeddings_bytes").to_numpy()
        self.counts: np.ndarray = files.column("rows").to_numpy()  # int64: rows by file
        self.what = f"version {version.version} of {root.url}"
        self.dim = self._dim()

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def files(self) -> int:
        return len(self.counts)

    def key(self, file: int) -> tuple[str, str]:
        """Shard and input etag: what the file is known by in every version."""
        return str(self._shards[file].as_py()), str(self._etags[file].as_py())

    def bytes_of(self, file: int) -> int:
        """Of the file, as the version lists it."""
        return int(self._bytes[file])

    # all of them

    def blocks(self, file: int) -> Iterator[Block]:
        """The file's vectors in their order."""
        if not self.counts[file]:
            return
        at = file << ROW_BITS
        with self._open(file) as opened:
            for batch in opened.batches():
                unit = to_unit(self._array(batch.column(0), file))
                yield Block(at, unit)
                at += len(unit)

    def all_blocks(self) -> Iterator[Block]:
        """Every vector, file by file; the next block is read meanwhile."""
        yield from ahead(block for file in range(self.files) for block in self.blocks(file))

    # some of them

    def fetch(self, numbers: np.ndarray) -> np.ndarray:
        """float32 (n, D), in the order of `numbers`, each of which may come more than once."""
        unique, back = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        found = np.empty((len(unique), self.dim), np.float32)

        def of_file(span: slice) -> None:
            at = span.start
            for table in self._taken(unique[span], ["embedding"]):
                unit = to_unit(self._array(table.column(0).combine_chunks(), int(unique[span.start]) >> ROW_BITS))
                found[at : at + len(unit)] = unit
                at += len(unit)

        for _ in ordered(of_file, _by_file(unique), FILES_AT_ONCE):
            pass
        return found if np.array_equal(back, np.arange(len(unique))) else found[back]

    def rows(self, numbers: np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The columns' values as Python's own, in the order of `numbers`; without columns that the set lacks."""
        found: list[dict[str, Any]] = self.table(numbers, columns).to_pylist() if len(numbers) else []
        return found

    def table(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Like `rows`, in columns; of at least one number."""
        unique, back = np.unique(np.asarray(numbers, np.int64), return_inverse=True)
        tables = ordered(lambda span: list(self._taken(unique[span], columns)), _by_file(unique), FILES_AT_ONCE)
        found = pa.concat_tables([table.replace_schema_metadata(None) for of_file in tables for table in of_file])
        return found.take(pa.array(back))

    def number_of(self, wanted: str) -> int:
        """The number of an id. Raises `UsageError` that suggests similar ones where there is no such row."""
        parts = wanted.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts))]  # no shard's name lies on another's path
        place = pc.index_in(pa.array(above, pa.string()), value_set=self._shards).drop_null()
        if not len(place):
            raise self._unknown(wanted, (name for chunk in self._shards.chunks for name in chunk.to_pylist()), "shards")
        file = int(place[0].as_py())
        ids = self._ids(file)
        at = int(pc.index(ids, wanted).as_py())
        if at < 0:
            raise self._unknown(wanted, (i.as_py() for i in ids), f"ids in shard {self._shards[file].as_py()}")
        return file << ROW_BITS | at

    def _ids(self, file: int) -> pa.ChunkedArray:
        if not self.counts[file]:
            return pa.chunked_array([], pa.string())
        with self._open(file) as opened:
            return pa.chunked_array([group.column(0).combine_chunks() for group in opened.groups(["id"])], pa.string())

    def _unknown(self, wanted: str, known: Iterator[str], what: str) -> UsageError:
        near = get_close_matches(wanted, islice(known, LOOKED_THROUGH), n=3, cutoff=0.5)
        more = f": similar {what} are {', '.join(map(legible, near))}" if near else ""
        return UsageError(f"{self.what} has no id {legible(wanted)}{more}")

    def _taken(self, numbers: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of one file, by row group; `numbers`: ascending."""
        rows = numbers & (2**ROW_BITS - 1)
        with self._open(int(numbers[0]) >> ROW_BITS) as opened:
            yield from opened.take(rows, columns)

    # files

    def _dim(self) -> int:
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            raise UsageError(f"{self.what} has no rows")
        with self._open(int(filled[0])) as opened:
            schema = opened.file.schema_arrow
        if "embedding" not in schema.names:
            raise UsageError(f"{self.what} has no vectors: it was embedded with --only-metrics")
        return int(schema.field("embedding").type.list_size)

    def _open(self, file: int) -> "_Opened":
        return _Opened(self.root, str(self._names[file].as_py()), int(self._bytes[file]), int(self.counts[file]))

    def _array(self, column: pa.FixedSizeListArray, file: int) -> np.ndarray:
        """float32 (n, D), of finite values."""
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        if column.type.list_size != self.dim or column.null_count or not np.isfinite(values).all():
            name = self._names[file].as_py()
            raise StorageError(f"{name} holds other than finite {self.dim}-d vectors: run `verify`")
        return values.reshape(-1, self.dim)


class _Opened:
    """One embeddings file; what is wrong with it is a `StorageError` that names it."""

    def __init__(self, root: Root, name: str, size: int, rows: int):
        self.name = name
        try:
            self._raw = root.open(name, size)
        except FileNotFoundError:
            raise StorageError(f"{name} is gone: run `verify`") from None
        try:
            self.file = pq.ParquetFile(self._raw, pre_buffer=False)
        except (ValueError, OSError, pa.ArrowException) as e:
            raise self._damaged(e) from e
        there = self.file.metadata.num_rows
        if there != rows:
            raise StorageError(f"{name} holds {there} rows, the version lists {rows}: run `verify`")

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def batches(self) -> Iterator[pa.RecordBatch]:
        batches = self.file.iter_batches(batch_size=BLOCK_ROWS, columns=["embedding"], use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (ValueError, OSError, pa.ArrowException) as e:
                raise self._damaged(e) from e
            if batch is None:
                return
            yield batch

    def groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for group in range(self.file.num_row_groups):
            yield self._group(group, columns)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Ascending rows, of each row group that has some."""
        sizes = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        ends = np.cumsum(sizes)
        places = np.searchsorted(ends, rows, side="right")
        for group in np.unique(places):
            yield self._group(int(group), columns).take(rows[places == group] - (ends[group] - sizes[group]))

    def _group(self, group: int, columns: Sequence[str]) -> pa.Table:
        known = [c for c in columns if c in self.file.schema_arrow.names]
        try:
            return self.file.read_row_group(group, columns=known, use_threads=False)
        except (ValueError, OSError, pa.ArrowException) as e:
            raise self._damaged(e) from e

    def _damaged(self, e: Exception) -> StorageError:
        return StorageError(f"{self.name} cannot be read ({' '.join(str(e).split())[:200]}): run `verify`")


def to_unit(vectors: np.ndarray) -> np.ndarray:
    """float32 (n, D) of length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def _by_file(numbers: np.ndarray) -> list[slice]:
    """Of ascending numbers: one slice a file."""
    starts = np.flatnonzero(np.diff(numbers >> ROW_BITS, prepend=-1))
    return [slice(int(a), int(b)) for a, b in zip(starts, np.append(starts[1:], len(numbers)), strict=False)]
