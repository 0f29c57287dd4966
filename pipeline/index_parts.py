"""A version's files as parts of an index: made where missing, each one create-only Parquet, and merged into lists.

A part holds its file's vectors as `list`, `row` and `code`, in row groups of at most some 16 MiB of codes and a block,
each ordered by list, under a name that set, training, shard and etag give. What it was made of stands in its metadata:
the training's SHA-256 and the bytes of the embeddings file. One of other things, or damaged, is made again; what is
held at once does not grow with the files.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.tensor_rows import PREFIX
from pipeline.vectors import ROW_BITS, Vectors

MADE_AT_ONCE = 2  # the one is read or put while the other is encoded, by all cores
READ_AT_ONCE = 2  # twice as many pieces wait
WHOLE_BYTES = 2**20  # a part up to this is read by one request, of a larger one only what is wanted


class _Damaged(StorageError):
    """A part that cannot be used: it is gone, cut, or of other vectors or another training."""


class Parts:
    """The parts of one version under one training. `index`: the trained one, `trained_sha256`: of its bytes."""

    def __init__(self, vectors: Vectors, index: Any, folder: str, trained_sha256: str):
        self._vectors, self._index, self._root = vectors, index, vectors.root
        self._folder = f"{folder}/parts"
        self.names = [part_name(folder, *vectors.key(file)) for file in range(vectors.files)]
        self._sizes = self._root.list(self._folder)
        self.missing = [file for file, name in enumerate(self.names) if name not in self._sizes]
        self.damaged = list[int]()  # made again, once `make` has looked
        self._pieces = np.zeros(vectors.files, np.int64)  # row groups of each
        self._list_sizes = np.zeros(index.nlist, np.int64)  # vectors in each list, of all parts
        code = pa.binary(index.code_size)
        self._schema = pa.schema({"list": pa.int32(), "row": pa.int32(), "code": code})
        self._training = trained_sha256

    def make(self) -> int:
        """Makes the missing and the damaged ones; returns the bytes of all. To be called once."""
        for _ in ordered(self._make, self.missing, MADE_AT_ONCE):
            pass
        self._sizes = self._root.list(self._folder)
        for counts in ordered(self._checked, range(self._vectors.files), READ_AT_ONCE):
            self._list_sizes += counts
        if self.damaged:
            self._sizes = self._root.list(self._folder)
        return sum(self._sizes.get(name, 0) for name in self.names)

    def _make(self, file: int) -> None:
        local = Path(self._root.scratch()) / f"{uuid.uuid4().hex}.part"
        options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
        try:
            with pq.ParquetWriter(local, self._schema.with_metadata(self._made_of(file)), **options) as writer:
                for piece in inverted.encode(self._index, (block.unit for block in ahead(self._vectors.blocks(file)))):
                    code = pa.FixedSizeBinaryArray.from_buffers(
                        pa.binary(self._index.code_size), len(piece.codes), [None, pa.py_buffer(piece.codes)]
                    )
                    arrays = [pa.array(piece.lists), pa.array(piece.rows), code]
                    table = pa.Table.from_arrays(arrays, schema=self._schema)
                    writer.write_table(table, row_group_size=max(1, len(table)))
            self._root.put_new(self.names[file], local)
        finally:
            local.unlink(missing_ok=True)

    def _made_of(self, file: int) -> dict[str, str]:
        of_file = {"training_sha256": self._training, "embeddings_bytes": str(self._vectors.bytes_of(file))}
        return {f"{PREFIX}{name}": value for name, value in of_file.items()}

    def _checked(self, file: int) -> np.ndarray:
        """int64 (lists,): the vectors of each. A damaged part is made again first."""
        try:
            return self._counted(file)
        except _Damaged:
            self._root.delete(self.names[file])
            self._make(file)
            self.damaged.append(file)
            self._sizes[self.names[file]] = self._root.size(self.names[file]) or 0
            return self._counted(file)

    def _counted(self, file: int) -> np.ndarray:
        counts = np.zeros(self._index.nlist, np.int64)
        with self._open(file) as part:
            self._pieces[file] = part.num_row_groups
            for piece in range(part.num_row_groups):
                lists = part.read_row_group(piece, columns=["list"], use_threads=False)["list"].to_numpy()
                if lists.min(initial=0) < 0 or lists.max(initial=0) >= len(counts):
                    raise ValueError("lists beyond those of the training")
                counts += np.bincount(lists, minlength=len(counts))
        return counts

    def merge(self, path: Path) -> None:
        """Writes the lists of all parts, which `make` has seen whole, to a local file."""
        pieces = ((file, piece) for file in range(self._vectors.files) for piece in range(self._pieces[file]))
        codes = ordered(lambda one: self._codes(*one), pieces, READ_AT_ONCE)
        inverted.merge(self._index, codes, self._list_sizes, path)

    def _codes(self, file: int, piece: int) -> tuple[int, Codes]:
        """The first number of the file, and the codes of one piece of it."""
        with self._open(file) as part:
            table = part.read_row_group(piece, use_threads=False)
            code = table["code"].combine_chunks()
            raw = np.frombuffer(code.buffers()[1], np.uint8, len(code) * self._index.code_size)
            lists, rows = table["list"].to_numpy(), table["row"].to_numpy()
            return file << ROW_BITS, Codes(lists, rows, raw.reshape(len(code), -1))

    @contextmanager
    def _open(self, file: int) -> Iterator[pq.ParquetFile]:
        """The part, made of what it should be; whatever is wrong with it within the context is `_Damaged`."""
        name, size = self.names[file], self._sizes.get(self.names[file])
        try:
            if size is not None and size <= WHOLE_BYTES:
                source: Any = BytesIO(self._root.read(name))
            else:
                source = self._root.open(name, size)
            with source, pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as part:
                self._check(part, file)
                yield part
        except FileNotFoundError:
            raise _Damaged(f"{name} is gone: run `index` again") from None
        except (ValueError, OSError, pa.ArrowException) as e:
            why = " ".join(str(e).split())[:200]
            raise _Damaged(f"{name} is damaged ({why}): delete it and run `index` again") from e

    def _check(self, part: pq.ParquetFile, file: int) -> None:
        rows, wanted = part.metadata.num_rows, self._vectors.counts[file]
        if rows != wanted:
            raise ValueError(f"{rows} rows of {wanted}")
        if not part.schema_arrow.equals(self._schema):
            raise ValueError(f"its columns are {', '.join(map(str, part.schema_arrow))}")
        told = part.metadata.metadata or {}
        if any(told.get(key.encode()) != value.encode() for key, value in self._made_of(file).items()):
            raise ValueError("it was made with another training, or of another embeddings file")
