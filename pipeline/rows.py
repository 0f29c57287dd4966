"""Arrow schemas of the files that a shard becomes, and the writer that fills them as its rows come.

Plain Parquet for every reader: fixed-size lists of floats (never an extension type), zstd, no dictionary on vectors,
row groups of a few thousand rows, a checksum on every page.
"""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from pipeline.backbone import Arrays
from pipeline.build import version_of
from pipeline.config import VectorSet
from pipeline.errors import Reject
from pipeline.listing import Shard
from pipeline.shards import Sample
from pipeline.tensor_rows import PREFIX, TensorWriter, fixed

ROW_GROUP_ROWS = 8192  # 32 MB of 1024-d float32; the contract asks for 4 to 16 thousand
PACKAGES = (
    *("shard2vec", "torch", "torchvision", "timm", "pillow", "simplejpeg", "openvino", "pyarrow", "ray"),
)  # what decodes, computes and writes

REJECTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)


def embeddings_schema(vectors: VectorSet) -> pa.Schema:
    """The columns of `embeddings` for one set: `embedding` is D wide, the top-k columns min(k, classes).

    A set of metrics only has no `embedding`.
    """
    scalar = pa.float16() if vectors.vector_type == "float16" else pa.float32()
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("norm", pa.float32(), nullable=False),
    ]
    if "embedding" in vectors.outputs:
        fields.insert(-1, pa.field("embedding", pa.list_(scalar, vectors.dim), nullable=False))
    if vectors.top_k:
        fields += [
            pa.field("topk_index", pa.list_(pa.int32(), vectors.top_k)),
            pa.field("topk_score", pa.list_(pa.float32(), vectors.top_k)),
            pa.field("topk_label", pa.list_(pa.string())),
        ]
    return pa.schema(fields)


def file_metadata(vectors: VectorSet, shard: Shard) -> dict[str, str]:
    """The key-value metadata that every file of a set carries, prefixed with `shard2vec.`."""
    entries = {
        "set": vectors.name,
        "model": vectors.model,
        "weights_sha256": vectors.weights_sha256,
        "preprocessing": json.dumps(vectors.as_dict()["preprocessing"], sort_keys=True),
        "precision": vectors.precision,
        "engine": vectors.engine,
        "decode": vectors.decode,
        "pooling": vectors.pooling,
        "normalized": json.dumps(vectors.normalized),
        "dim": str(vectors.dim),
        "labels": vectors.labels_source,
        "shard": shard.name,
        "input_etag": shard.etag,
        "schema_version": str(vectors.schema_version),
        "packages": json.dumps(package_versions()),
    }
    return {PREFIX + key: value for key, value in entries.items()}


def package_versions() -> dict[str, str]:
    """`not installed`: run from a checkout that was not."""
    return {name: version_of(name) or "not installed" for name in PACKAGES}


@dataclass
class Counts:
    """What one shard came to; `samples == rows + sum(rejects)` once it is whole."""

    samples: int = 0
    rows: int = 0
    rejects: dict[str, int] = field(default_factory=dict)  # by reason
    labelled: int = 0  # rows whose true class is known
    top1: int = 0  # of these, predicted first
    top5: int = 0  # … among the first five

    def add(self, other: "Counts") -> None:
        for name in ("samples", "rows", "labelled", "top1", "top5"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, n in other.rejects.items():
            self.rejects[reason] = self.rejects.get(reason, 0) + n

    @property
    def rejected(self) -> int:
        return sum(self.rejects.values())


class NotFinite(Exception):
    """The model gave NaN or infinity for an image that decoded: our fault or the precision's, never a row."""


class _Numbers:
    """One row group's numbers in arrays that are filled again and again.

    Arrow arrays a batch would do too, but their small C++ parts stayed between the decoded images on the heap and
    kept it from being used again: 80 kB an image until the row group was written.
    """

    def __init__(self, vectors: VectorSet):
        n = ROW_GROUP_ROWS
        self.sizes = np.empty((n, 2), np.int32)
        self.embedding = np.empty((n, vectors.dim), np.float16 if vectors.vector_type == "float16" else np.float32)
        self.norm = np.empty(n, np.float32)
        self.topk_index = np.empty((n, vectors.top_k), np.int32)
        self.topk_score = np.empty((n, vectors.top_k), np.float32)

    def put(self, at: int, sizes: list[tuple[int, int]], arrays: "Arrays", vectors: VectorSet) -> None:
        """Rows `at`, `at + 1` … Raises `NotFinite` where a value does not fit float16."""
        rows = slice(at, at + len(sizes))
        self.sizes[rows] = sizes
        self.norm[rows] = arrays.norm
        with np.errstate(over="ignore"):
            self.embedding[rows] = _normalized(arrays) if vectors.normalized else arrays.embedding
        if not np.isfinite(self.embedding[rows]).all():
            raise NotFinite(f"{vectors.model}: an embedding does not fit float16: use --vector-type float32")
        if arrays.topk_index is not None and arrays.topk_score is not None:
            self.topk_index[rows] = arrays.topk_index[:, : vectors.top_k]
            self.topk_score[rows] = arrays.topk_score[:, : vectors.top_k]


def _normalized(arrays: "Arrays") -> np.ndarray:
    """Unit length; a zero vector stays zero."""
    return arrays.embedding / np.maximum(arrays.norm, np.finfo(np.float32).tiny)[:, None]


class ShardWriter:
    """Rows and rejects of one shard → local Parquet files; a context that leaves no file behind."""

    def __init__(self, vectors: VectorSet, shard: Shard, labels: tuple[str, ...], scratch: str):
        self._vectors, self._shard = vectors, shard
        self._schema = embeddings_schema(vectors)
        self._labels = np.array(labels, dtype=object) if labels else None
        self._metadata = file_metadata(vectors, shard)
        self._samples: list[Sample] = []  # the row group under way, beside its numbers in `_numbers`
        self._numbers = _Numbers(vectors)
        self._rejects: list[dict[str, object]] = []
        self.counts = Counts()
        stem = Path(scratch) / f"{uuid.uuid4().hex}-{os.getpid()}"
        self._paths = {kind: stem.with_suffix(f".{kind}") for kind in vectors.kinds}
        options = _parquet_options(self._schema)
        # What is known now goes into the Arrow schema too, where `pq.read_schema` looks; the rest when the file closes.
        described = self._schema.with_metadata(self._metadata)
        self._writer = pq.ParquetWriter(self._paths["embeddings"], described, **options)
        self._beside = {
            kind: TensorWriter(vectors.columns_of(kind), self._paths[kind], self._metadata)
            for kind in vectors.kinds[1:-1]
        }

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for writer in (self._writer, *self._beside.values()):
            with suppress(OSError, pa.ArrowException):  # on a full disk it fails again; the first error is under way
                writer.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def reject(self, sample: Sample, why: Reject, size: int) -> None:
        """`size`: bytes of the image as it was stored, 0 where there is none."""
        self._rejects.append(
            {
                "id": f"{self._shard.name}/{sample.id_key}",
                "shard": self._shard.name,
                "key": sample.key,
                "row": sample.row,
                "stage": why.stage,
                "reason": why.reason,
                "message": why.message,
                "bytes": size,
            }
        )
        self.counts.samples += 1
        self.counts.rejects[why.reason] = self.counts.rejects.get(why.reason, 0) + 1

    def rows(self, samples: list[Sample], sizes: list[tuple[int, int]], arrays: "Arrays") -> None:
        """n samples, their (width, height), and their vectors in the same order. Raises `NotFinite`."""
        broken = ~(np.isfinite(arrays.embedding).all(axis=1) & np.isfinite(arrays.norm))
        if arrays.topk_score is not None:
            broken |= ~np.isfinite(arrays.topk_score).all(axis=1)
        if broken.any():
            sample = samples[int(broken.argmax())]
            raise NotFinite(
                f"{self._vectors.model} in {self._vectors.precision} gave NaN or infinity for "
                f"{self._shard.name}/{sample.id_key}: try --precision fp32"
            )
        self._tensor_rows(samples, arrays)
        if len(self._samples) + len(samples) > ROW_GROUP_ROWS:
            self._write_group()
        self._numbers.put(len(self._samples), sizes, arrays, self._vectors)
        self._samples += samples
        self.counts.samples += len(samples)
        self.counts.rows += len(samples)
        self._count_hits(samples, arrays)

    def _tensor_rows(self, samples: list[Sample], arrays: "Arrays") -> None:
        if not self._beside:
            return
        ids = [f"{self._shard.name}/{s.id_key}" for s in samples]
        of_kind = {kind: [] for kind in self._beside}  # type: dict[str, list[np.ndarray]]
        for column, values in zip(self._vectors.tensors, arrays.tensors, strict=True):
            of_kind[column.kind].append(values)
        for kind, writer in self._beside.items():
            broken = writer.rows(ids, of_kind[kind])
            if broken is not None:
                raise NotFinite(
                    f"{self._vectors.model} in {self._vectors.precision} gave {kind} for {broken} that are NaN, "
                    "infinite or beyond float16's 65504: try --precision fp32, or other outputs"
                )

    def _table(self) -> pa.Table:
        samples, n, numbers = self._samples, len(self._samples), self._numbers
        columns = [
            pa.array([f"{self._shard.name}/{s.id_key}" for s in samples], pa.string()),
            pa.array([self._shard.name] * n, pa.string()),
            pa.array([s.key for s in samples], pa.string()),
            pa.array([s.row for s in samples], pa.int32()),
            pa.array(numbers.sizes[:n, 0]),
            pa.array(numbers.sizes[:n, 1]),
            pa.array([s.label for s in samples], pa.int32()),
            pa.array(numbers.norm[:n]),
        ]
        if "embedding" in self._vectors.outputs:
            columns.insert(-1, fixed(numbers.embedding[:n], self._schema.field("embedding").type))
        if self._vectors.top_k:
            columns += [
                fixed(numbers.topk_index[:n], self._schema.field("topk_index").type),
                fixed(numbers.topk_score[:n], self._schema.field("topk_score").type),
                self._names(numbers.topk_index[:n]),
            ]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _names(self, index: np.ndarray) -> pa.Array:
        """list<string> of the class names; null where the classes have none."""
        if self._labels is None:
            return pa.nulls(len(index), pa.list_(pa.string()))
        offsets = pa.array(np.arange(0, index.size + 1, index.shape[1]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(self._labels[index.reshape(-1)], pa.string()))

    def _count_hits(self, samples: list[Sample], arrays: "Arrays") -> None:
        # Test splits mark unknown labels with -1; a label past the classes is of another list of them.
        known = [i for i, s in enumerate(samples) if s.label is not None and 0 <= s.label < self._vectors.classes]
        if arrays.topk_index is None or not known:
            return
        hits = arrays.topk_index[known] == np.array([samples[i].label for i in known])[:, None]
        self.counts.labelled += len(known)
        self.counts.top1 += int(hits[:, 0].sum())
        self.counts.top5 += int(hits[:, :5].any(axis=1).sum())

    def _write_group(self) -> None:
        if self._samples:
            self._writer.write_table(self._table(), row_group_size=ROW_GROUP_ROWS)
            self._samples = []

    def finish(self, kind: str) -> Path:
        """Writes what is beside the embeddings, rejects, tokens …, and returns its local path."""
        rows = {f"{PREFIX}rows_sha256": self.digest(kind)}
        if kind == "rejects":
            table = pa.Table.from_pylist(self._rejects_in_order(), schema=REJECTS)
            table = table.replace_schema_metadata(self._metadata | rows)
            pq.write_table(table, self._paths[kind], **_parquet_options(REJECTS))
        else:
            self._beside[kind].finish(rows)
        return self._paths[kind]

    @property
    def beside(self) -> tuple[str, ...]:
        """The kinds of files that go before the embeddings."""
        return self._vectors.kinds[:-1]

    def digest(self, kind: str) -> str:
        """Two files of one kind, set and shard with the same digest hold the same rows in the same order."""
        if kind != "rejects":
            return self._beside[kind].digest()
        return hashlib.sha256(
            "".join(f"{r['id']}\0{r['reason']}\0" for r in self._rejects_in_order()).encode()
        ).hexdigest()

    def _rejects_in_order(self) -> list[dict[str, object]]:
        """Of their rows: what a device fails to decode is found a batch later than what a header tells."""
        return sorted(self._rejects, key=lambda reject: cast(int, reject["row"]))

    def finish_embeddings(self, beside: dict[str, str]) -> Path:
        """Closes the embeddings file, with the shard's counts and the names of its other files in its metadata."""
        self._write_group()
        own = {"counts": json.dumps(vars(self.counts)), "files": json.dumps(beside)}
        self._writer.add_key_value_metadata({PREFIX + name: value for name, value in own.items()})
        self._writer.close()
        return self._paths["embeddings"]


def _parquet_options(schema: pa.Schema) -> dict[str, object]:
    # A dictionary on floats writes 3 times slower and reads 12 times slower; on shard and class names it pays.
    repeated = [name for name in ("shard", "stage", "reason") if name in schema.names]
    options: dict[str, object] = {"compression": "zstd", "write_page_checksum": True}
    if "topk_label" in schema.names:
        repeated.append("topk_label.list.element")
    if "embedding" in schema.names and schema.field("embedding").type.value_type == pa.float32():
        # 0.84 of the raw size; in float16 the split breaks DuckDB's reader.
        options["column_encoding"] = {"embedding.list.element": "BYTE_STREAM_SPLIT"}
    return options | {"use_dictionary": repeated}
