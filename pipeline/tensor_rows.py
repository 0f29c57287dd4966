"""Tokens, feature maps and heads of one shard → one local Parquet file a kind, in bounded memory.

Columns are `id` and a flat fixed-size list a tensor, in the row order of the embeddings; the file's metadata tells the
shapes, what they hold and their layout. A row may be half a megabyte, so a row group goes by bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import TensorColumn

GROUP_BYTES = 16 * 2**20  # 55 rows of 197x768 float16
GROUP_ROWS = 8192  # at most, of small rows, as the embeddings have
PREFIX = "shard2vec."  # of all our key-value metadata
ARROW_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


def tensor_schema(columns: Sequence[TensorColumn]) -> pa.Schema:
    """`id`, then one fixed-size list a column."""
    columns = [pa.field(c.column, pa.list_(ARROW_TYPES[c.dtype], c.size), nullable=False) for c in columns]
    return pa.schema([pa.field("id", pa.string(), nullable=False), *columns])


def tensor_metadata(columns: Sequence[TensorColumn]) -> dict[str, str]:
    """JSON by column: `shapes` of one row, `layouts` of a batch, `sources`; lists where a column holds several."""
    several = {c.column: len(c.shapes) > 1 for c in columns}
    shapes = {c.column: c.shapes if several[c.column] else c.shapes[0] for c in columns}
    layouts = {c.column: c.layouts if several[c.column] else c.layouts[0] for c in columns}
    entries = {"shapes": shapes, "layouts": layouts, "sources": {c.column: c.source for c in columns}}
    return {PREFIX + name: json.dumps(value) for name, value in entries.items()}


class TensorWriter:
    """Rows of one kind, a batch at a time. What it holds is one row group, in arrays that are filled again."""

    def __init__(self, columns: Sequence[TensorColumn], path: Path, metadata: dict[str, str]):
        self._columns, self._schema = tuple(columns), tensor_schema(columns)
        row_bytes = sum(c.size * np.dtype(c.dtype).itemsize for c in columns)
        self._group = max(1, min(GROUP_ROWS, GROUP_BYTES // row_bytes))
        self._values = [np.empty((self._group, c.size), c.dtype) for c in columns]
        self._ids: list[str] = []
        # Another version of a package may give other values for the same rows.
        self._digest = hashlib.sha256(metadata.get(f"{PREFIX}packages", "").encode())
        # float16 with BYTE_STREAM_SPLIT breaks DuckDB's reader; of float32 it saves a sixth.
        split = {f"{c.column}.list.element": "BYTE_STREAM_SPLIT" for c in columns if c.dtype == "float32"}
        self._writer = pq.ParquetWriter(
            path,
            self._schema.with_metadata(metadata | tensor_metadata(columns)),
            compression="zstd",
            use_dictionary=False,
            write_page_checksum=True,
            column_encoding=split or None,
        )

    def rows(self, ids: Sequence[str], columns: Sequence[np.ndarray]) -> str | None:
        """Adds n rows: (n, size) a column. Returns the id of a row that holds NaN or infinity; then none is added."""
        for values in columns:
            if not np.isfinite(values).all():
                return ids[int((~np.isfinite(values).all(axis=1)).argmax())]
        start = 0
        while start < len(ids):
            at = len(self._ids)
            n = min(len(ids) - start, self._group - at)
            for kept, values in zip(self._values, columns, strict=True):
                kept[at : at + n] = values[start : start + n]
            self._ids += ids[start : start + n]
            start += n
            if len(self._ids) == self._group:
                self._write_group()
        for i in ids:
            self._digest.update(i.encode() + b"\0")
        return None

    def digest(self) -> str:
        """Of the ids in their order and the packages' versions: files of a set with one digest hold the same rows."""
        return self._digest.hexdigest()

    def finish(self, metadata: dict[str, str]) -> None:
        """Closes the file, with what could not be known before added to its metadata."""
        self._write_group()
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()

    def close(self) -> None:
        self._writer.close()

    def _write_group(self) -> None:
        n = len(self._ids)
        if n:
            kinds = self._schema.types[1:]
            columns = [fixed(values[:n], kind) for values, kind in zip(self._values, kinds, strict=True)]
            table = pa.Table.from_arrays([pa.array(self._ids, pa.string()), *columns], schema=self._schema)
            self._writer.write_table(table, row_group_size=n)
            self._ids = []


def fixed(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(n, width) → fixed_size_list, without a copy."""
    flat = pa.array(values.reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)
