"""docs/readers.md: every block is run against the real library, and gives what it says."""

import csv
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import made
import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_tar
from pgvector_server import PgvectorServer, missing
from pictures import jpeg

import pipeline
from pipeline import versions
from pipeline.errors import StorageError, UsageError
from pipeline.listing import list_shards
from pipeline.lists import FileList
from pipeline.output import Root

PAGE = Path(__file__).parent.parent / "docs" / "readers.md"
KEYS = {"pets": ("cat", "dog", "fox", "hare", "newt"), "town": ("bridge", "mill", "tower", "tram")}
IDS = [f"{shard}/{key}" for shard, keys in KEYS.items() for key in keys]
LABELS = [7 if key in ("cat", "bridge") else None for keys in KEYS.values() for key in keys]


class Block(NamedTuple):
    line: int
    language: str
    code: str


def sections() -> dict[str, list[Block]]:
    """Heading → its blocks, in the page's order."""
    text, found = PAGE.read_text(), dict[str, list[Block]]()
    for part in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if part[1]:
            found[part[1]] = []
        else:
            list(found.values())[-1].append(Block(text[: part.start()].count("\n") + 2, part[2], part[3]))
    return found


SECTIONS = sections()


class World(NamedTuple):
    """A folder with `out`, of two versions and sets, and what the current one holds, by the id's place in `IDS`."""

    folder: Path
    sets: tuple[str, str]
    vectors: np.ndarray  # float32 (9, 64)
    classes: list[str]  # predicted first
    scores: np.ndarray
    norms: np.ndarray

    def by_cosine(self, to: str) -> list[str]:
        unit = self.vectors.astype(np.float64) / np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return [IDS[i] for i in np.argsort(-(unit @ unit[IDS.index(to)]), kind="stable")]

    def cosine(self, a: str, b: str) -> float:
        x, y = (self.vectors[IDS.index(i)].astype(np.float64) for i in (a, b))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Version 1 of the vectors as they are, version 2 of another set: of the same images, length and shards."""
    folder = tmp_path_factory.mktemp("readers")
    images = [jpeg(60 + 9 * i, 50 + 31 * i % 70, seed=100 + i) for i in range(len(IDS))]
    for shard, keys in KEYS.items():
        members = [(f"{key}.jpg", images[IDS.index(f"{shard}/{key}")]) for key in keys]
        write_tar(folder / "in" / f"{shard}.tar", [*members[:1], (f"{keys[0]}.cls", b"7"), *members[1:]])
    (folder / "labels.csv").write_text(
        "id,species\npets/dog,canis\npets/cat,felis\npets/fox,vulpes\ntown/none,nobody\n"
    )
    listed, root = list_shards([str(folder / "in")]), Root(str(folder / "out"))
    first = made.job(root.url, normalized=True, top_k=0, outputs=("embedding",), classes=0)
    versions.commit(root, first.vectors.name, [r.files for r in made.embed(first, listed)])

    vectors = oracle.expected(made.MODEL, images).embedding
    net = oracle.module(made.MODEL)
    weight, mean = net.head.weight.detach() * 200, torch.from_numpy(vectors.mean(0))
    bias = -(weight @ mean)  # without it all would be of one class
    scores = torch.softmax(torch.from_numpy(vectors) @ weight.T + bias, 1).max(1)
    fish = int(scores.indices[scores.values.argmax()])
    second = made.job(root.url, labels=tuple("goldfish" if i == fish else f"thing {i}" for i in range(1000)))
    embedder = made.embedder(second)
    with torch.no_grad():
        embedder.backbone._module.head.weight.copy_(weight)
        embedder.backbone._module.head.bias.copy_(bias)
    versions.commit(root, second.vectors.name, [r.files for r in made.receipts(embedder, listed)])
    rows = [row for path in sorted((folder / "out" / second.vectors.folder).glob("embeddings/*.parquet"))
            for row in pq.ParquetFile(path).read().to_pylist()]  # fmt: skip
    assert [row["id"] for row in rows] == IDS
    stored = np.array([row["embedding"] for row in rows], np.float32)
    assert oracle.relative(stored, vectors) < 1e-5
    return World(
        folder,
        (first.vectors.name, second.vectors.name),
        stored,
        [row["topk_label"][0] for row in rows],
        np.array([row["topk_score"][0] for row in rows], np.float32),
        np.array([row["norm"] for row in rows], np.float32),
    )


# the page


def one_set(got: dict[str, Any], world: World) -> None:
    assert {Path(p).parts[-3] for p in got["paths"]} == {world.sets[1]} and len(got["paths"]) == 2
    assert {Path(p).parts[-3] for p in got["first"]} == {world.sets[0]} == {got["mine"]}
    assert got["same_set"] == got["first"]
    assert [pq.read_table(p).num_rows for p in got["rejects"]] == [0, 0]


def with_duckdb(got: dict[str, Any], world: World) -> None:
    assert [name for name, _ in got["hits"]] == world.by_cosine("pets/cat")[1:4]
    assert [s for _, s in got["hits"]] == pytest.approx([world.cosine("pets/cat", n) for n, _ in got["hits"]], abs=1e-6)
    with pytest.raises(duckdb.BinderException):  # "without the cast they are refused"
        got["vectors"].select(duckdb.SQLExpression("array_cosine_similarity(embedding, embedding)")).fetchall()


def with_polars(got: dict[str, Any], world: World) -> None:
    want = [(i, s) for i, c, s in zip(IDS, world.classes, world.scores, strict=True) if c == "goldfish" and s > 0.5]
    assert 0 < len(want) < len(IDS)
    assert got["found"].rows() == sorted(want, key=lambda row: -row[1])


def with_pandas(got: dict[str, Any], world: World) -> None:
    joined = got["joined"]
    assert joined["id"].tolist() == IDS and np.array_equal(joined["norm"].to_numpy(), world.norms)
    assert joined["species"].dropna().tolist() == ["felis", "canis", "vulpes"]
    assert got["missing"] == [i for i in IDS if i not in ("pets/cat", "pets/dog", "pets/fox")]


def with_numpy(got: dict[str, Any], world: World) -> None:
    matrix = got["matrix"]
    assert matrix.dtype == np.float32 and np.array_equal(matrix, world.vectors) and got["ids"].tolist() == IDS
    arrows = np.frombuffer(got["column"].values.buffers()[1], np.float32)
    assert np.shares_memory(matrix, arrows) and not matrix.flags.writeable
    assert got["nearest"].tolist() == world.by_cosine("pets/cat")[:4]


def in_batches(got: dict[str, Any], world: World) -> None:
    assert got["count"] == len(IDS)
    assert got["mean"] == pytest.approx(world.vectors.mean(0, dtype=np.float64))
    assert np.shares_memory(got["part"], np.frombuffer(got["batch"]["embedding"].values.buffers()[1], np.float32))


def with_datasets(got: dict[str, Any], world: World) -> None:
    assert got["shapes"] == [(4, 64), (4, 64), (1, 64)]
    rows = list(got["streamed"])
    assert [row["id"] for row in rows] == IDS
    assert np.array_equal(np.stack([row["embedding"] for row in rows]), world.vectors)


def with_lance(got: dict[str, Any], world: World) -> None:
    rows = got["neighbours"].to_pylist()
    assert [row["id"] for row in rows] == world.by_cosine("pets/cat")[:4]
    distances = [1 - world.cosine("pets/cat", row["id"]) for row in rows]
    assert [row["_distance"] for row in rows] == pytest.approx(distances, abs=1e-6)
    table = got["exported"].to_table()
    assert np.array_equal(table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 64), world.vectors)
    assert got["made_of"] == world.sets[1] and table["label"].to_pylist() == LABELS


def with_delta(got: dict[str, Any], world: World) -> None:
    table = got["delta"].to_pyarrow_table().sort_by("id")
    assert table["id"].to_pylist() == IDS and str(table.schema.field("embedding").type) == "list<element: float>"
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), world.vectors)
    assert got["delta"].metadata().description == world.sets[1] and not table.schema.metadata


def with_copy(got: dict[str, Any], world: World) -> None:
    """pgvector's grammar, from its documentation: numbers between brackets, commas between them, spaces ignored."""
    with open("images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == IDS and [row["label"] for row in rows] == [
        "" if label is None else "7" for label in LABELS
    ]
    number = r"-?\d+(\.\d+)?(e[+-]?\d+)?"
    assert all(re.fullmatch(rf"\[{number}(, {number})*\]", row["embedding"]) for row in rows)
    read = np.array([row["embedding"][1:-1].split(", ") for row in rows]).astype(np.float32)
    assert np.array_equal(read, world.vectors)
    assert f"embedding vector({read.shape[1]})" in PAGE.read_text()


CHECKS: dict[str, Callable[[dict[str, Any], World], None]] = {
    "One set at a time": one_set,
    "DuckDB: the nearest neighbours of an id": with_duckdb,
    "polars: the images of a class above a score": with_polars,
    "pandas: joining labels of your own": with_pandas,
    "NumPy: all vectors as one array, without a copy": with_numpy,
    "pyarrow: batches that fit the memory": in_batches,
    "Hugging Face datasets: streaming into a training loop": with_datasets,
    "Lance: an index that is searched on disk": with_lance,
    "Delta: a table for a lakehouse": with_delta,
    "PostgreSQL: COPY into pgvector": with_copy,
}
COPY = "PostgreSQL: COPY into pgvector"


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_sections_blocks_do_what_it_says(heading: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process and folder of ours, as they stand on the page."""
    monkeypatch.chdir(world.folder)
    got: dict[str, Any] = {"__name__": "readers"}
    for block in SECTIONS[heading]:
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, PAGE, "exec"), got)
    CHECKS[heading](got, world)


def test_no_block_of_the_page_is_left_out() -> None:
    """Each section is checked, and what is no Python is the SQL that runs below."""
    assert list(SECTIONS) == list(CHECKS)
    others = {(name, b.language) for name, blocks in SECTIONS.items() for b in blocks if b.language != "python"}
    assert others == {(COPY, "bash")}


@pytest.fixture(scope="module")
def database() -> Iterator[PgvectorServer]:
    if reason := missing():
        pytest.skip(reason)
    with PgvectorServer() as server:
        yield server


def test_pgvector_takes_the_copy_and_finds_the_neighbours(world: World, database: PgvectorServer, monkeypatch) -> None:
    """A real server: the rows are there with our bits, and its distances are 1 - cosine."""
    monkeypatch.chdir(world.folder)
    got: dict[str, Any] = {}
    for block in SECTIONS[COPY]:
        if block.language == "python":
            exec(block.code, got)
        else:
            done = subprocess.run(
                ["bash", "-c", block.code], env=database.environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
    hits = re.findall(r"^ (\S+)\s+\|\s+(\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in hits] == world.by_cosine("pets/cat")[:4]
    distances = [1 - world.cosine("pets/cat", name) for name, _ in hits]
    assert [float(d) for _, d in hits] == pytest.approx(distances, abs=1e-6)
    asked = [
        "psql",
        database.environment["DATABASE_URL"],
        "-Atc",
        "SELECT id, label, embedding FROM images ORDER BY id",
    ]
    rows = subprocess.run(asked, env=database.environment, capture_output=True, text=True, check=True, timeout=60)
    parts = [line.split("|") for line in rows.stdout.splitlines()]
    assert [(i, label and int(label)) for i, label, _ in parts] == [
        (i, "" if label is None else label) for i, label in zip(IDS, LABELS, strict=True)
    ]
    stored = np.array([v[1:-1].split(",") for _, _, v in parts]).astype(np.float32)
    assert np.array_equal(stored, world.vectors)


# files


def test_a_glob_would_mix_two_sets_and_files_does_not(world: World) -> None:
    """The same ids twice, with other vectors of the same length, and no reader that says a word."""
    glob = f"{world.folder}/out/sets/**/embeddings/*.parquet"
    mixed = duckdb.sql(f"SELECT count(*), count(DISTINCT id), count(DISTINCT embedding) FROM '{glob}'").fetchall()
    assert mixed == [(2 * len(IDS), len(IDS), 2 * len(IDS))]
    for number, name in enumerate(world.sets, 1):
        table = pipeline.open_dataset(str(world.folder / "out"), version=number).to_table()
        assert table["id"].to_pylist() == IDS and table.schema.metadata[b"shard2vec.set"].decode() == name
        assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), world.vectors) == (number == 2)


def test_a_reader_that_names_its_set_gets_no_other(world: World) -> None:
    """The newest version of that set; where there is none, or the version asked for is of another, a refusal."""
    out, (old, new) = str(world.folder / "out"), world.sets
    for kind in ("embeddings", "rejects"):
        assert pipeline.files(out, kind=kind, set_name=old) == pipeline.files(out, kind=kind, version=1)
        assert pipeline.files(out, kind=kind, set_name=new) == pipeline.files(out, kind=kind)
    assert pipeline.open_dataset(out, set_name=old, version=1).count_rows() == len(IDS)
    with pytest.raises(UsageError, match=rf"--set {old}: version 2 of .*out is of {new}$"):
        pipeline.files(out, set_name=old, version=2)
    with pytest.raises(UsageError, match=r"--set vit: .*out has no version of it; sets with versions: test_vit@"):
        pipeline.open_dataset(out, set_name="vit")


def test_a_list_that_names_files_of_two_sets_is_refused(world: World, tmp_path: Path) -> None:
    """Whoever wrote it: a version is of one set."""
    root, theirs = Root(str(world.folder / "out")), Root(str(tmp_path / "out"))
    lists = [versions.read_list(root, versions.current(root, number)) for number in (1, 2)]
    versions.commit(theirs, world.sets[1], FileList.of([lists[0][0], lists[1][1]]))
    for read in (pipeline.files, pipeline.open_dataset):
        with pytest.raises(StorageError, match=rf"the list of version 1, names files outside sets/{world.sets[1]}/"):
            read(theirs.url)


def test_a_datasets_metadata_is_what_all_its_files_have(world: World) -> None:
    """An export keeps it: the set and the dimension belong there, the first file's shard does not."""
    metadata = pipeline.open_dataset(str(world.folder / "out")).schema.metadata
    every = [pq.read_schema(path).metadata for path in pipeline.files(str(world.folder / "out"))]
    assert metadata == dict(set(every[0].items()) & set(every[1].items()))
    assert metadata[b"shard2vec.dim"] == b"64" and b"shard2vec.shard" not in metadata
