"""The Parquet that comes out: its types, its encodings, and every reader that users bring."""

import json
from importlib.metadata import version
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.backbone import Arrays
from pipeline.errors import Reject
from pipeline.listing import Shard
from pipeline.rows import ROW_GROUP_ROWS, NotFinite, ShardWriter, embeddings_schema
from pipeline.shards import Sample

SHARD = Shard(name="a/x", format="webdataset", url="/in/a/x.tar", size=1, etag="0123456789abcdef")
LABELS = tuple(f"class {i}" for i in range(1000))


def arrays(n: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    embedding = random.normal(size=(n, 64)).astype(np.float32)
    index = np.tile(np.arange(5), (n, 1)) + np.arange(n)[:, None] % 900
    score = np.tile(np.array([0.5, 0.2, 0.1, 0.05, 0.01], np.float32), (n, 1))
    return Arrays(embedding, np.linalg.norm(embedding, axis=1), index, score)


def samples(n: int, start: int = 0) -> list[Sample]:
    return [Sample(start + i, f"k{start + i}", label=i % 3 or None) for i in range(n)]


def write(folder: Path, n: int = 20, **changes: object) -> tuple[Path, Path]:
    """A shard of n rows and one reject; the paths of its two files."""
    with ShardWriter(made.vector_set(**changes), SHARD, LABELS, str(folder)) as writer:
        for start in range(0, n, 8):
            count = min(8, n - start)
            writer.rows(samples(count, start), [(640, 480)] * count, arrays(count, start))
        writer.reject(Sample(n, "bad"), Reject("corrupt", "decode", "no image"), 17)
        rejects = writer.finish("rejects").rename(folder / "rejects.parquet")
        return writer.finish_embeddings({"rejects": "rejects/x.parquet"}).rename(folder / "x.parquet"), rejects


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write(tmp_path_factory.mktemp("rows"))


def test_columns_have_the_contracts_types(files: tuple[Path, Path]) -> None:
    """Names, types and nullability are those that users rely on."""
    schema = pq.read_schema(files[0])
    types = {f.name: (str(f.type), f.nullable) for f in schema}
    vector = "fixed_size_list<element: float>[64]"
    assert types == {
        "id": ("string", False),
        "shard": ("string", False),
        "key": ("string", False),
        "row": ("int32", False),
        "width": ("int32", False),
        "height": ("int32", False),
        "label": ("int32", True),
        "embedding": (vector, False),
        "norm": ("float", False),
        "topk_index": ("fixed_size_list<element: int32>[5]", True),
        "topk_score": ("fixed_size_list<element: float>[5]", True),
        "topk_label": ("list<element: string>", True),
    }
    assert pq.read_schema(files[1]).names == ["id", "shard", "key", "row", "stage", "reason", "message", "bytes"]


def test_vectors_are_stored_plainly(files: tuple[Path, Path]) -> None:
    """zstd, no dictionary on numbers, page checksums, no extension type."""
    group = pq.read_metadata(files[0]).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    for name in ("embedding.list.element", "topk_score.list.element", "topk_index.list.element", "norm", "row"):
        assert not any("DICT" in e for e in columns[name].encodings), name
    assert "BYTE_STREAM_SPLIT" in columns["embedding.list.element"].encodings


def test_metadata_tells_what_made_the_file(files: tuple[Path, Path]) -> None:
    """Both files carry the set, the model, the weights, the preprocessing and the versions of the packages."""
    for file in files:
        keys = {k.decode() for k in pq.read_metadata(file).metadata}
        wanted = [
            "set",
            "model",
            "weights_sha256",
            "preprocessing",
            "precision",
            "engine",
            "decode",
            "pooling",
            "normalized",
            "dim",
            "input_etag",
            "schema_version",
            "packages",
        ]
        assert {f"shard2vec.{k}" for k in wanted} <= keys
        packages = json.loads(pq.read_metadata(file).metadata[b"shard2vec.packages"])
        for package in ("torchvision", "simplejpeg", "pillow", "openvino"):  # that decode, and compute
            assert packages[package] == version(package)


def test_row_groups_are_thousands_of_rows(tmp_path: Path) -> None:
    """Many small batches become few row groups, in order, the last one short."""
    file, _ = write(tmp_path, 2 * ROW_GROUP_ROWS + 100)
    metadata = pq.read_metadata(file)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 100]
    table = pq.read_table(file)
    assert table["row"].to_pylist() == list(range(2 * ROW_GROUP_ROWS + 100))
    at = ROW_GROUP_ROWS + 3
    want = arrays(8, at - at % 8).embedding[at % 8]
    assert np.array_equal(table["embedding"][at].as_py(), want)


def check(ids: list, embedding: np.ndarray, scores: np.ndarray, names: list) -> None:
    assert ids == [f"a/x/k{i}" for i in range(20)]
    assert np.array_equal(embedding[:8], arrays(8).embedding)
    assert np.allclose(scores[0], [0.5, 0.2, 0.1, 0.05, 0.01])
    assert list(names[1]) == [f"class {i}" for i in range(1, 6)]


def test_pandas(files: tuple[Path, Path]) -> None:
    """pandas reads it with no conversion."""
    import pandas as pd

    frame = pd.read_parquet(files[0])
    check(frame["id"].tolist(), np.stack(frame["embedding"]), np.stack(frame["topk_score"]), list(frame["topk_label"]))
    assert frame["row"].dtype == np.int32 and frame["label"].isna().sum() == 8


def test_polars(files: tuple[Path, Path]) -> None:
    """polars sees fixed-size arrays of Float32."""
    import polars as pl

    frame = pl.read_parquet(files[0])
    assert frame.schema["embedding"] == pl.Array(pl.Float32, 64)
    check(
        frame["id"].to_list(),
        frame["embedding"].to_numpy(),
        frame["topk_score"].to_numpy(),
        frame["topk_label"].to_list(),
    )


def test_duckdb(files: tuple[Path, Path]) -> None:
    """DuckDB reads it, and compares vectors after one cast."""
    import duckdb

    rows = duckdb.sql(f"SELECT id, embedding, topk_score, topk_label FROM '{files[0]}' ORDER BY row").fetchall()
    ids, embedding, scores, names = map(list, zip(*rows, strict=True))
    check(ids, np.array(embedding, np.float32), np.array(scores), names)
    query = f"""SELECT b.id FROM '{files[0]}' a, '{files[0]}' b WHERE a.key = 'k3'
        ORDER BY array_cosine_similarity(a.embedding::FLOAT[64], b.embedding::FLOAT[64]) DESC LIMIT 1"""
    assert duckdb.sql(query).fetchall() == [("a/x/k3",)]


def test_hugging_face_datasets(files: tuple[Path, Path], tmp_path: Path) -> None:
    """datasets loads it with vectors of a fixed length."""
    from datasets import Dataset

    data = Dataset.from_parquet(str(files[0]), cache_dir=str(tmp_path))
    assert data.features["embedding"].length == 64
    check(
        list(data["id"]),
        np.array(data["embedding"], np.float32),
        np.array(data["topk_score"]),
        list(data["topk_label"]),
    )


def test_float16_vectors_open_too(tmp_path: Path) -> None:
    """--vector-type float16 is read by pyarrow, polars, pandas and DuckDB."""
    import duckdb
    import pandas as pd
    import polars as pl

    file, _ = write(tmp_path, vector_type="float16")
    want = arrays(8).embedding[0].astype(np.float16)
    assert pq.read_schema(file).field("embedding").type == pa.list_(pa.float16(), 64)
    assert np.array_equal(pd.read_parquet(file)["embedding"][0], want)
    assert np.array_equal(pl.read_parquet(file)["embedding"][0].to_list(), want.astype(float))
    assert duckdb.sql(f"SELECT count(embedding) FROM '{file}'").fetchall() == [(20,)]


def test_a_set_without_classes_has_no_such_columns() -> None:
    """--outputs embedding leaves the top-k columns out instead of filling them with nothing."""
    names = embeddings_schema(made.vector_set(top_k=0)).names
    assert names[-1] == "norm" and not any(n.startswith("topk") for n in names)


def test_values_that_are_not_finite_are_no_rows(tmp_path: Path) -> None:
    """NaN, infinity and what overflows float16 raise, naming the way out."""
    for bad, changes in ((np.nan, {}), (np.inf, {}), (1e6, {"vector_type": "float16"})):
        broken = arrays(3)
        broken.embedding[1, 5] = bad
        with ShardWriter(made.vector_set(**changes), SHARD, LABELS, str(tmp_path)) as writer, pytest.raises(NotFinite):
            writer.rows(samples(3), [(1, 1)] * 3, broken)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    """Temporary files go with the context."""
    with pytest.raises(KeyError), ShardWriter(made.vector_set(), SHARD, LABELS, str(tmp_path)) as writer:
        writer.rows(samples(3), [(1, 1)] * 3, arrays(3))
        raise KeyError
    assert not list(tmp_path.iterdir())
