"""Lists of shards' published files, in columns: what a version names, what a run has made, both as one Parquet file.

A million shards are 0.3 GB as Arrow columns and 1.5 GB as Python objects, so a list is kept, joined with listings of
the output, summed and written as columns; `ShardFiles`, one row of it, is made when it is asked for.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.rows import Counts

KINDS = ("embeddings", "rejects", "tokens", "features", "heads")
FILES = pa.schema(
    [
        ("shard", pa.string()),
        ("etag", pa.string()),
        *((name, kind) for k in KINDS for name, kind in ((k, pa.string()), (f"{k}_bytes", pa.int64()))),
        ("samples", pa.int64()),
        ("rows", pa.int64()),
        ("rejected", pa.int64()),
        ("counts", pa.string()),  # JSON of pipeline.rows.Counts
    ]
)
ROWS_AT_ONCE = 8192  # as Python objects, 10 MB; part of `identity`


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One shard's published files, by kind: embeddings, rejects and what else its set keeps."""

    shard: str
    etag: str
    names: dict[str, str]  # paths below the output root
    sizes: dict[str, int]  # in bytes
    counts: Counts

    @property
    def embeddings(self) -> str:
        return self.names["embeddings"]

    @property
    def rejects(self) -> str:
        return self.names["rejects"]


class FileList:
    """Any number of `ShardFiles`, in order, as the columns of `FILES`."""

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def of(cls, files: "Iterable[ShardFiles] | FileList") -> "FileList":
        if isinstance(files, FileList):
            return files
        batches, rows = [], list[dict[str, Any]]()
        for one in files:
            rows.append(_row(one))
            if len(rows) == ROWS_AT_ONCE:
                batches.append(pa.RecordBatch.from_pylist(rows, schema=FILES))
                rows = []
        batches.append(pa.RecordBatch.from_pylist(rows, schema=FILES))
        return cls(pa.Table.from_batches(batches, schema=FILES))

    @classmethod
    def decode(cls, content: bytes) -> "FileList":
        """What `encode` gave. Raises `ValueError`, `OSError` or an Arrow error where the bytes are no such list."""
        table = pq.read_table(BytesIO(content), page_checksum_verification=True)
        if not table.schema.equals(FILES):
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
        return cls(table)

    def encode(self) -> bytes:
        """Parquet, a row group after the other: 36 bytes a shard."""
        buffer = BytesIO()
        options = {"compression": "zstd", "write_page_checksum": True}
        pq.write_table(self.table, buffer, row_group_size=ROWS_AT_ONCE, **options)
        return buffer.getvalue()

    def __add__(self, other: "FileList") -> "FileList":
        return FileList(pa.concat_tables([self.table, other.table]))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[ShardFiles]:
        for rows in self._rows():
            yield from map(_files_of, rows)

    def __getitem__(self, index: int) -> ShardFiles:
        return _files_of(self.table.slice(index % len(self), 1).to_pylist()[0])

    def column(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def names(self, kind: str) -> Iterator[str]:
        """The paths of one kind's files, below the output root."""
        for chunk in self.table[kind].chunks:
            yield from (name for name in chunk.to_pylist() if name is not None)

    def kinds(self) -> list[str]:
        """Of which there is any file."""
        return [kind for kind in KINDS if self.table[kind].null_count < len(self)]

    @cached_property
    def totals(self) -> Counts:
        total = Counts()
        for chunk in self.table["counts"].chunks:
            for text in chunk.to_pylist():
                total.add(Counts(**json.loads(text)))
        return total

    def wrong_sum(self) -> ShardFiles | None:
        """The first shard whose samples are not its rows and rejects; None where they all are."""
        found = pc.add(self.table["rows"], self.table["rejected"])
        at = pc.index(pc.equal(self.table["samples"], found), False).as_py()
        return None if at < 0 else self[at]

    def identity(self) -> str:
        """16 hex digits over the values: equal lists have the same, however Arrow and Parquet hold them."""
        total = hashlib.blake2b(digest_size=8)
        for at in range(0, len(self), ROWS_AT_ONCE):
            total.update(json.dumps(self.table.slice(at, ROWS_AT_ONCE).to_pydict()).encode())
        return total.hexdigest()

    def _rows(self) -> Iterator[list[dict[str, Any]]]:
        for at in range(0, len(self), ROWS_AT_ONCE):
            yield self.table.slice(at, ROWS_AT_ONCE).to_pylist()


def _row(f: ShardFiles) -> dict[str, Any]:
    counts = {"samples": f.counts.samples, "rows": f.counts.rows, "rejected": f.counts.rejected}
    named = {k: f.names.get(k) for k in KINDS} | {f"{k}_bytes": f.sizes.get(k) for k in KINDS}
    return {"shard": f.shard, "etag": f.etag, **named, **counts, "counts": json.dumps(vars(f.counts))}


def _files_of(row: dict[str, Any]) -> ShardFiles:
    kinds = [kind for kind in KINDS if row[kind] is not None]
    names, sizes = {k: row[k] for k in kinds}, {k: row[f"{k}_bytes"] for k in kinds}
    return ShardFiles(row["shard"], row["etag"], names, sizes, Counts(**json.loads(row["counts"])))
