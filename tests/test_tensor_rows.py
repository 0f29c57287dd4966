"""Tokens, maps and heads as Parquet: types, metadata, bounded memory, every reader, and the embeddings' row order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import duckdb
import made
import numpy as np
import oracle
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import files, open_dataset
from pipeline.config import TensorColumn
from pipeline.listing import list_shards
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.tensor_rows import GROUP_BYTES, TensorWriter, tensor_metadata
from pipeline.verify import verify
from pipeline.versions import collect, commit, current, published

ALL = ("embedding", "classes", "tokens", "features", "heads")
MODEL = "pit_ti_distilled_224"


def column(*shape: int, kind: str = "tokens", name: str = "tokens", dtype: str = "float16") -> TensorColumn:
    return TensorColumn(kind=kind, column=name, source="x", shapes=(shape,), layouts=("NLC",), dtype=dtype)


def write(path: Path, columns: list[TensorColumn], n: int, batch: int = 7) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    values = [random.normal(size=(n, f.size)).astype(f.dtype) for f in columns]
    writer = TensorWriter(columns, path, {"shard2vec.set": "a@b"})
    for start in range(0, n, batch):
        rows = slice(start, min(n, start + batch))
        assert writer.rows([f"s/{i}" for i in range(n)[rows]], [v[rows] for v in values]) is None
    writer.finish({"shard2vec.rows_sha256": writer.digest()})
    return values


def test_values_types_and_metadata(tmp_path: Path) -> None:
    """What went in comes out, flat, without nulls; shape, layout and source of each column are told as JSON."""
    columns = [column(3, 5, kind="features", name="feature_0"), column(4, kind="features", name="feature_1")]
    values = write(tmp_path / "x", columns, 20)
    table = pq.read_table(tmp_path / "x")
    assert table.schema.types == [pa.string(), pa.list_(pa.float16(), 15), pa.list_(pa.float16(), 4)]
    assert not any(f.nullable for f in table.schema)
    assert table["id"].to_pylist() == [f"s/{i}" for i in range(20)]
    for name, expected in zip(("feature_0", "feature_1"), values, strict=True):
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        assert (flat.reshape(expected.shape) == expected).all()
    for metadata in (pq.read_metadata(tmp_path / "x").metadata, pq.read_schema(tmp_path / "x").metadata):
        assert json.loads(metadata[b"shard2vec.shapes"]) == {"feature_0": [3, 5], "feature_1": [4]}
        assert json.loads(metadata[b"shard2vec.layouts"])["feature_0"] == "NLC"
        assert json.loads(metadata[b"shard2vec.sources"])["feature_1"] == "x"
        assert metadata[b"shard2vec.set"] == b"a@b"


def test_a_list_of_tensors_keeps_each_shape() -> None:
    """CrossViT's two sequences lie one after the other; the shapes say where one ends."""
    flat = TensorColumn(kind="tokens", column="tokens", source="x", shapes=((2, 3), (4, 5)), layouts=("NLC", "NLC"))
    assert flat.size == 26
    told = {k.removeprefix("shard2vec."): json.loads(v) for k, v in tensor_metadata([flat]).items()}
    assert told["shapes"] == {"tokens": [[2, 3], [4, 5]]} and told["layouts"] == {"tokens": ["NLC", "NLC"]}


@pytest.mark.parametrize(("shape", "most"), [((197, 768), 55), ((256,), 8192), ((3000, 3000), 1)])
def test_row_groups_go_by_bytes(shape: tuple[int, ...], most: int, tmp_path: Path) -> None:
    """A reader streams 16 MB at a time however large a row is, and small rows get groups of thousands."""
    n = min(2 * most + 3, 120)
    write(tmp_path / "x", [column(*shape)], n)
    metadata = pq.read_metadata(tmp_path / "x")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [most] * (n // most) + ([n % most] if n % most else [])
    assert most == 8192 or most == max(1, GROUP_BYTES // (2 * int(np.prod(shape))))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(bad: float, tmp_path: Path) -> None:
    """float16 ends at 65504: beyond it there is no row, but the id of the image."""
    writer = TensorWriter([column(2, 2)], tmp_path / "x", {})
    values = np.ones((3, 4), np.float16)
    values[1, 2] = bad
    assert writer.rows(["a", "b", "c"], [values]) == "b"
    writer.close()


def test_tokens_beyond_float16_fail_the_shard_with_a_sentence(tmp_path: Path, shards: Path) -> None:
    """Never clipped, never infinite: the shard is left uncommitted and the message says what to do."""
    job = made.job(tmp_path, outputs=("embedding", "tokens"))
    embedder = made.embedder(job)
    net = embedder.backbone._module
    original = net.forward_features
    net.forward_features = lambda x: original(x) * 1e6
    receipts = made.receipts(embedder, list_shards([str(shards)]))
    assert all(r.files is None and "beyond float16's 65504" in str(r.error) for r in receipts)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """All kinds of a distilled PiT, committed as version 1."""
    folder = tmp_path_factory.mktemp("all-kinds")
    job = made.job(folder, model=MODEL, outputs=ALL)
    listed = list_shards([str(shards)])
    root = Root(str(folder))
    root.put_new(
        f"{job.vectors.folder}/set.json", json.dumps(job.vectors.as_dict() | {"set": job.vectors.name}).encode()
    )
    assert not [r.error for r in made.embed(job, listed) if r.error]
    commit(root, job.vectors.name, collect(root, job.vectors.folder, listed, FileList.of([])))
    return folder


@pytest.mark.parametrize("kind", ["tokens", "features", "heads"])
def test_rows_are_those_of_the_embeddings_in_their_order(kind: str, output: Path) -> None:
    """File by file the same ids, in the same order, so that columns can be put side by side without a join."""
    pairs = zip(files(str(output)), files(str(output), kind=kind), strict=True)
    for embeddings, beside in pairs:
        assert Path(beside).name == Path(embeddings).name
        assert pq.read_table(beside, columns=["id"])["id"].equals(pq.read_table(embeddings, columns=["id"])["id"])


def test_every_reader_opens_them(output: Path) -> None:
    """pandas, polars, DuckDB, datasets and pyarrow give the values of timm's own tokens and heads."""
    table = open_dataset(str(output), kind="heads").to_table()
    net = oracle.module(MODEL)
    assert table.num_rows == 21
    tokens = {r["id"]: r["tokens"] for r in open_dataset(str(output), kind="tokens").to_table().to_pylist()}
    for row in table.to_pylist():
        body = torch.tensor(np.array(tokens[row["id"]], np.float32)).view(2, 256)
        heads = torch.stack([net.head(body[0]), net.head_dist(body[1])]).flatten()
        assert torch.allclose(heads, torch.tensor(row["heads"]), atol=2e-3)  # from tokens rounded to float16
    names = files(str(output), kind="tokens")
    expected = np.array([tokens[i] for i in pq.read_table(names[0])["id"].to_pylist()], np.float32)
    readers = {
        "pandas": np.stack(pd.read_parquet(names[0])["tokens"]),
        "polars": pl.read_parquet(names[0])["tokens"].to_numpy(),
        "duckdb": np.stack(duckdb.sql(f"SELECT tokens FROM '{names[0]}'").fetchnumpy()["tokens"]),
        "datasets": np.array(datasets.Dataset.from_parquet(names[0], cache_dir=str(output.parent))["tokens"]),
    }
    for name, values in readers.items():
        assert (np.asarray(values, np.float32) == expected).all(), name


def test_verify_reads_them_too(output: Path, tmp_path: Path) -> None:
    """A missing, a swapped and a damaged file beside the embeddings are each named."""
    root = Root(str(output))
    assert verify(root, current(root)).clean
    for kind, spoil in (("tokens", "gone"), ("features", "another shard's"), ("heads", "a flipped byte")):
        copy = tmp_path / kind
        shutil.copytree(output, copy)
        first, second, *_ = sorted((copy / "sets").rglob(f"{kind}/**/*.parquet"))
        if spoil == "gone":
            first.unlink()
        elif spoil == "another shard's":
            first.write_bytes(second.read_bytes())
        else:
            content = bytearray(first.read_bytes())
            content[len(content) // 3] ^= 1
            first.write_bytes(content)
        found = verify(Root(str(copy)), current(Root(str(copy))))
        assert found.bad_files == 1 and kind in found.problems[0], (spoil, found.problems)


def test_a_killed_attempts_files_are_used_when_their_rows_are_the_same(tmp_path: Path, shards: Path) -> None:
    """Killed between the tokens and the embeddings: the next attempt takes the tokens that lie there."""
    job, listed = made.job(tmp_path, outputs=("embedding", "tokens")), list_shards([str(shards)])
    first = [r.files for r in made.embed(job, listed)]
    stamps = {f.names["tokens"]: os.stat(tmp_path / f.names["tokens"]).st_ino for f in first}
    for f in first:
        (tmp_path / f.embeddings).unlink()
    assert [r.files for r in made.embed(job, listed)] == first
    assert stamps == {name: os.stat(tmp_path / name).st_ino for name in stamps}


def test_another_attempts_other_rows_are_not_used(tmp_path: Path, shards: Path) -> None:
    """Tokens of other rows under the usual name stay where they are; ours get a name that the embeddings tell."""
    job, listed = made.job(tmp_path, outputs=("embedding", "tokens")), list_shards([str(shards)])
    files_before = [r.files for r in made.embed(job, listed)]
    one, two = files_before[0], files_before[1]
    (tmp_path / one.embeddings).unlink()
    (tmp_path / one.names["tokens"]).unlink()
    os.link(tmp_path / two.names["tokens"], tmp_path / one.names["tokens"])
    (again, *_) = [r.files for r in made.embed(job, listed)]
    assert again.names["tokens"] != one.names["tokens"]
    assert pq.read_table(tmp_path / again.names["tokens"]).num_rows == again.counts.rows
    assert published(Root(str(tmp_path)), job.vectors.folder, listed[0]) == again


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Seven times the tokens, the same memory: 1 MB a row, 40 and 280 rows, at most a few row groups apart."""
    script = """
import resource, sys, numpy as np
from pathlib import Path
from pipeline.config import TensorColumn
from pipeline.tensor_rows import TensorWriter
flat = TensorColumn(kind="tokens", column="tokens", source="", shapes=((700, 768),), layouts=("NLC",))
random = np.random.default_rng(0)
for count in (20, 140):
    writer = TensorWriter([flat], Path(sys.argv[1]), {})
    for i in range(count):
        bits = random.integers(0, 2**16, (2, flat.size), np.uint16) & 0xBBFF  # an exponent bit less: finite
        writer.rows([f"{2 * i}", f"{2 * i + 1}"], [bits.view(np.float16)])
    writer.finish({})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "x"], capture_output=True, check=True)
    few, many = map(int, ran.stdout.split())
    assert (tmp_path / "x").stat().st_size > 200 * 2**20
    assert many - few < 60, (few, many)


def test_the_queue_to_the_writer_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Large maps wait in fewer batches: 128 MB, never less than one."""
    small = made.embedder(made.job(tmp_path))
    large = made.embedder(made.job(tmp_path, model="pit_ti_224", outputs=("embedding", "features"), batch_size=512))
    assert (small._writes_waiting(), large._writes_waiting()) == (4, 1)
