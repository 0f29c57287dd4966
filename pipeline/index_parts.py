"""A version's files as parts of an index: made where missing, each one create-only Parquet, and merged into lists.

A part holds its file's vectors as `list`, `row` and `code`, ordered by list, under a name that set, training, shard and
etag give: what is there is done, whoever made it and for whichever version.
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import inverted
from pipeline.errors import StorageError
from pipeline.flow import ahead, ordered
from pipeline.inverted import Codes
from pipeline.stored_index import part_name
from pipeline.vectors import ROW_BITS, Vectors

MADE_AT_ONCE = 2  # the one is read or put while the other is encoded, by all cores
READ_AT_ONCE = 4


class Parts:
    """The parts of one version under one training, `folder`. `index`: the trained one."""

    def __init__(self, vectors: Vectors, index: Any, folder: str):
        self._vectors, self._index, self._root = vectors, index, vectors.root
        self.names = [part_name(folder, *vectors.key(file)) for file in range(vectors.files)]
        there = self._root.list(f"{folder}/parts")
        self.missing = [file for file, name in enumerate(self.names) if name not in there]

    def make(self) -> int:
        """Makes the missing ones; returns the bytes of all."""
        for _ in ordered(self._make, self.missing, MADE_AT_ONCE):
            pass
        there = self._root.list(self.names[0].partition("/parts/")[0] + "/parts")
        return sum(there.get(name, 0) for name in self.names)

    def _make(self, file: int) -> None:
        part = inverted.encode(self._index, (block.unit for block in ahead(self._vectors.blocks(file))))
        code = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self._index.code_size), len(part.codes), [None, pa.py_buffer(part.codes)]
        )
        table = pa.table({"list": pa.array(part.lists), "row": pa.array(part.rows), "code": code})
        buffer = BytesIO()
        pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_page_checksum=True)
        self._root.put_new(self.names[file], buffer.getvalue())

    def merge(self, path: Path) -> None:
        """Writes the lists of all parts to a local file; holds a few parts at once."""
        sizes = np.zeros(self._index.nlist, np.int64)
        for lists in ordered(lambda file: self._read(file, ["list"])["list"].to_numpy(), self._filled(), READ_AT_ONCE):
            sizes += np.bincount(lists, minlength=len(sizes))
        inverted.merge(self._index, self._codes(), sizes, path)

    def _filled(self) -> Iterator[int]:
        return (file for file in range(self._vectors.files) if self._vectors.counts[file])

    def _codes(self) -> Iterator[tuple[int, Codes]]:
        def of_file(file: int) -> tuple[int, Codes]:
            table = self._read(file, ["list", "row", "code"])
            code = table["code"].combine_chunks()
            raw = np.frombuffer(code.buffers()[1], np.uint8, len(code) * code.type.byte_width)
            lists, rows = table["list"].to_numpy(), table["row"].to_numpy()
            return file << ROW_BITS, Codes(lists, rows, raw.reshape(len(code), -1))

        return ordered(of_file, self._filled(), READ_AT_ONCE)

    def _read(self, file: int, columns: list[str]) -> pa.Table:
        name = self.names[file]
        try:
            table = pq.read_table(
                BytesIO(self._root.read(name)), columns=columns, page_checksum_verification=True, use_threads=False
            )
            lists = table["list"].to_numpy()
            fits = "code" not in columns or table["code"].type.byte_width == self._index.code_size
            if (
                len(table) == self._vectors.counts[file]
                and fits
                and lists.min() >= 0
                and lists.max() < self._index.nlist
            ):
                return table
            why = f"{len(table)} rows of {self._vectors.counts[file]}, or of another kind"
        except FileNotFoundError:
            raise StorageError(f"{name} is gone: run `index` again") from None
        except (ValueError, KeyError, OSError, AttributeError, pa.ArrowException) as e:
            why = " ".join(str(e).split())[:200]
        raise StorageError(f"{name} is damaged ({why}): delete it and run `index` again")
