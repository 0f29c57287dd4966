"""verify finds each planted corruption, and nothing in a sound output."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import damage
import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import write_tar
from pictures import jpeg

from pipeline import versions
from pipeline.listing import list_shards
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root
from pipeline.rows import Counts
from pipeline.tensor_rows import PREFIX
from pipeline.verify import Findings, verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A committed output of the shared shards, and another set beside it."""
    output = tmp_path_factory.mktemp("sound")
    receipts = made.embed(made.job(output), shards)
    versions.commit(Root(str(output)), made.vector_set().name, [r.files for r in receipts])
    made.embed(made.job(output, normalized=True), shards)
    return output


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def with_set(output: Path) -> Path:
    """The copy with its set.json, as a run writes it first."""
    vectors = made.vector_set()
    versions.create_set(Root(str(output)), vectors.folder, vectors.as_dict() | {"set": vectors.name})
    return output


@pytest.fixture(scope="module")
def sound_tensors(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """An output that has tokens and feature maps too."""
    folder = tmp_path_factory.mktemp("tensors")
    job = made.job(folder, outputs=("embedding", "classes", "tokens", "features"))
    files = [r.files for r in made.embed(job, shards) if r.files is not None]
    versions.commit(Root(str(folder)), job.vectors.name, files)
    return folder


@pytest.fixture
def with_tensors(sound_tensors: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound_tensors, tmp_path / "out")
    return tmp_path / "out"


def check(output: Path, shards: Path | None = None) -> Findings:
    root = Root(str(output))
    return verify(root, versions.current(root), list_shards([str(shards)]) if shards else None)


def listed(output: Path) -> list[ShardFiles]:
    root = Root(str(output))
    return list(versions.read_list(root, versions.current(root)))


def file_of(output: Path, kind: str = "embeddings", shard: str = "a/one") -> Path:
    return output / next(f.names[kind] for f in listed(output) if f.shard == shard)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The same file with other rows, as somebody's repair script would leave it."""
    metadata = {k: v for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
    table = change(pq.read_table(path)).replace_schema_metadata(metadata)
    pq.write_table(table, path, write_page_checksum=True)


def relist(output: Path, change: Callable[[ShardFiles], ShardFiles] = lambda f: f) -> None:
    """Commits a version of what lies there: sizes as they are now, counts as `change` has them."""
    root, files = Root(str(output)), []
    for f in listed(output):
        f.sizes.update({kind: (output / name).stat().st_size for kind, name in f.names.items()})
        files.append(change(f))
    versions.commit(root, versions.current(root).set, files)


def replaced(column: str, *values: object) -> Callable[[pa.Table], pa.Table]:
    """Other values in the column's first rows."""

    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(column)
        new = pa.array([*values, *table[column].to_pylist()[len(values) :]], field.type)
        return table.set_column(table.schema.names.index(column), field.with_nullable(True), new)

    return change


def test_a_sound_output_has_no_findings(sound: Path, shards: Path) -> None:
    """Every id of the input is there once, with and without looking at the input."""
    for found in (check(sound), check(sound, shards)):
        assert found.clean and found.problems == []
        assert found.ids == 24


def test_a_short_row_is_found(output: Path, shards: Path) -> None:
    """A file with a row less names the id when the input is given."""
    rewrite(file_of(output), lambda t: t.slice(1))
    assert (check(output).missing, check(output).bad_files) == (1, 1)
    found = check(output, shards)
    assert found.missing == 1 and "missing id: a/one/photo_0" in found.problems


def test_a_duplicated_id_is_named(output: Path) -> None:
    """The same id twice, even in one file, is found and named."""
    rewrite(file_of(output), lambda t: pa.concat_tables([t, t.slice(2, 1)]))
    found = check(output)
    assert found.duplicated == 1 and any(p.startswith("duplicated id: a/one/") for p in found.problems)


def test_a_file_of_another_set_is_named(output: Path, shards: Path) -> None:
    """Vectors of another configuration under our name are recognised by what the file says of itself."""
    other = made.vector_set(normalized=True).name
    ours = file_of(output)
    theirs = Path(str(ours).replace(made.vector_set().name, other))
    shutil.copy(theirs, ours)
    found = check(output)
    assert found.bad_files == 1 and any(f"its set is {other}" in p for p in found.problems)


def test_new_and_gone_input_is_told(sound: Path, shards: Path, tmp_path: Path) -> None:
    """Against a newer input: ids that are not embedded yet are missing, those that are gone are unexpected."""
    shutil.copytree(shards, tmp_path / "in")
    write_tar(tmp_path / "in" / "new.tar", {"x.jpg": jpeg(), "y.jpg": jpeg()})
    (tmp_path / "in" / "a" / "two.tar").unlink()
    found = check(sound, tmp_path / "in")
    assert (found.missing, found.unexpected) == (2, 7)
    assert not found.clean


# Ids, rows and counts


def test_an_id_in_embeddings_and_rejects_is_duplicated(output: Path, shards: Path) -> None:
    """A sample is one row or one reject: that both files have it is found, and the counts that no longer fit."""
    twice = pq.read_table(file_of(output))["id"][3].as_py()
    rewrite(file_of(output, "rejects"), replaced("id", twice))
    for found in (check(output), check(output, shards)):
        assert found.duplicated == 1 and f"duplicated id: {twice}" in found.problems
    assert found.missing == 1 and found.ids == 23


def test_an_id_of_another_shard_is_named(output: Path, shards: Path) -> None:
    """The same id in two shards' files: an id begins with its shard's name, so the file it is foreign to is bad."""
    foreign = pq.read_table(file_of(output, shard="a/two"))["id"][0].as_py()
    rewrite(file_of(output), replaced("id", foreign))
    relist(output)
    found = check(output)
    assert found.bad_files == 1 and any(f"id {foreign} is not of shard a/one" in p for p in found.problems)
    against_input = check(output, shards)
    assert (against_input.missing, against_input.unexpected) == (1, 1)
    assert f"unexpected id: {foreign}" in against_input.problems


def test_swapped_files_are_named(output: Path) -> None:
    """Two shards' files under each other's names: both are bad, by size, by metadata and by their ids."""
    one, two = file_of(output), file_of(output, shard="a/two")
    one_content, two_content = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_content)
    two.write_bytes(one_content)
    relist(output)
    found = check(output)
    assert found.bad_files == 2
    for name, other in (("a/one", "a/two"), ("a/two", "a/one")):
        assert any(f"/{name}-" in p and f"its shard is {other}" in p for p in found.problems)
        assert any(f"/{name}-" in p and f"is not of shard {name}" in p for p in found.problems)


def test_a_row_short_that_the_list_agrees_with_is_found(output: Path, shards: Path) -> None:
    """File, size and counts made to fit: the row's number is missing in the shard, its id in the input's."""
    lost = pq.read_table(file_of(output))["id"][0].as_py()
    rewrite(file_of(output), lambda t: t.slice(1))
    relist(output, lambda f: replace(f, counts=replace(f.counts, rows=f.counts.rows - (f.shard == "a/one"))))
    found = check(output)
    assert found.missing == 1 and "missing row of shard a/one: 0" in found.problems
    assert found.bad_files == 2  # the list contradicts itself, the file's own counts contradict it
    assert f"missing id: {lost}" in check(output, shards).problems


def test_a_row_number_twice_is_found(output: Path, shards: Path) -> None:
    """All ids are there, and one row's number is another's: the file is bad, and without the input a row is missing."""
    rewrite(file_of(output), replaced("row", 1))
    relist(output)
    found = check(output)
    assert (found.bad_files, found.missing) == (1, 1)
    assert any("row numbers twice in the shard, or beyond its samples: [1]" in p for p in found.problems)
    assert check(output, shards).bad_files == 1
    rewrite(file_of(output), replaced("row", 10**6))
    relist(output)
    assert any("[1000000]" in p for p in check(output).problems)


def test_samples_that_are_not_rows_and_rejects_are_told(output: Path) -> None:
    """In the list, and between the list and the version."""
    relist(output, lambda f: replace(f, counts=replace(f.counts, samples=f.counts.samples + (f.shard == "three"))))
    found = check(output)
    assert any("shard three: 5 samples are not 4 rows and 0 rejects" in p for p in found.problems)
    assert (found.missing, found.bad_files) == (1, 2)  # the list; the file, whose own counts are others
    version = output / versions.version_name(2)
    version.write_text(version.read_text().replace('"rows": 21', '"rows": 20'))
    assert any("its rows are 21, the version's 20" in p for p in check(output).problems)


@pytest.mark.parametrize("kind", ["embeddings", "rejects"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other", "longer"])
def test_a_lost_or_cut_file_is_bad(kind: str, damage: str, output: Path) -> None:
    """One bad file, named; its rows are missing."""
    path = file_of(output, kind)
    rows, content = pq.read_metadata(path).num_rows, path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        other = {"other": b"x" * len(content), "longer": content + b"x"}
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], **other}[damage])
    found = check(output)
    assert (found.bad_files, found.missing) == (1, rows)
    assert all(f"{kind}/a/one" in p for p in found.problems if p.startswith("bad file"))


def pages(path: Path) -> list[tuple[str, int, int]]:
    """Column, where its chunk begins, its bytes: of every column of the first row group."""
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    starts = [(c, min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset)) for c in chunks]
    return [(c.path_in_schema, start, c.total_compressed_size) for c, start in starts]


@pytest.mark.parametrize("kind", ["embeddings", "rejects", "tokens", "features"])
def test_a_flipped_byte_in_any_column_is_found(kind: str, with_tensors: Path) -> None:
    """Of every kind of file, in every column's page, its compressed data: one bad file, named."""
    path = file_of(with_tensors, kind)
    sound, columns = path.read_bytes(), pages(path)
    assert {name.partition(".")[0] for name, _, _ in columns} == set(pq.read_schema(path).names)
    for name, start, size in columns:
        for at in (start + size - 1, start + size - 4, start + max(size - 2000, size * 31 // 32)):
            content = bytearray(sound)
            content[at] ^= 0x10
            path.write_bytes(content)
            found = check(with_tensors)
            assert found.bad_files == 1 and f"{kind}/a/one" in found.problems[0], (name, at)
    path.write_bytes(sound)
    assert check(with_tensors).clean


def test_a_flipped_byte_in_the_footers_metadata_is_found(with_set: Path) -> None:
    """The model, the weights, the preprocessing, the counts …: every value that set.json or the list tells again."""
    path = file_of(with_set)
    sound, metadata = path.read_bytes(), pq.read_metadata(path).metadata
    told = {k: v for k, v in metadata.items() if k.startswith(b"shard2vec.") and v and k != b"shard2vec.packages"}
    assert len(told) >= 14
    for key, value in told.items():
        at = sound.rindex(key) + len(key) + 2
        at = sound.index(value, at - 1) + len(value) // 2
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        found = check(with_set)
        assert found.bad_files == 1, key
    path.write_bytes(sound)
    assert check(with_set).clean


def test_a_damaged_list_is_a_bad_file(output: Path) -> None:
    """Cut, empty, overwritten or gone: named, and nothing is raised."""
    path = output / versions.current(Root(str(output))).files
    content = path.read_bytes()
    for damaged in (content[:-20], b"", b"x" * 500, content[:200] + bytes(50) + content[250:]):
        path.write_bytes(damaged)
        found = check(output)
        assert not found.clean and found.bad_files >= 1 and path.name in found.problems[0]
    path.unlink()
    assert check(output).bad_files == 1


def test_a_damaged_description_is_a_bad_file(with_set: Path) -> None:
    """A set.json that does not give the set's fingerprint, or is none."""
    (path,) = with_set.glob("sets/*/set.json")
    for damaged in (path.read_text().replace('"fp32"', '"bf16"'), "{", "[]"):
        path.write_text(damaged)
        found = check(with_set)
        assert found.bad_files == 1 and "set.json" in found.problems[0]


@pytest.mark.parametrize("column", ["id", "shard", "key", "row", "embedding", "norm"])
def test_a_null_is_found(column: str, output: Path) -> None:
    """Where every row must have a value: as a bad file, or as a value that is not finite."""
    rewrite(file_of(output), replaced(column, None))
    relist(output)
    found = check(output)
    assert (found.bad_files, found.not_finite) == ((0, 1) if column in ("embedding", "norm") else (1, 0))


def test_other_columns_are_a_bad_file(output: Path) -> None:
    """A file without ids, or whose rows are text."""
    for change in (lambda t: t.drop_columns(["id"]), lambda t: t.set_column(3, "row", t["key"])):
        rewrite(file_of(output), change)
        assert any("missing or of another type" in p for p in check(output).problems)


# Values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kind", "column"),
    [("embeddings", "embedding"), ("embeddings", "norm"), ("embeddings", "topk_score"), ("tokens", "tokens"),
     ("features", "feature_0")],
)  # fmt: skip
def test_a_value_that_is_not_finite_is_named(bad: float, kind: str, column: str, with_tensors: Path) -> None:
    """NaN and infinity, in every column of floats: one, by its id."""
    path = file_of(with_tensors, kind)
    table = pq.read_table(path)
    value = table[column][0].as_py()
    rewrite(path, replaced(column, [bad, *value[1:]] if isinstance(value, list) else bad))
    relist(with_tensors)
    found = check(with_tensors)
    assert (found.not_finite, found.bad_files) == (1, 0)
    assert f"not finite: {table['id'][0].as_py()}" in found.problems


# Input


def test_damaged_input_is_compared_as_it_was_embedded(tmp_path: Path) -> None:
    """Cut tars, broken Parquet pages, duplicate and null keys: the ids of the rejects are the input's."""
    tars = damage.tars()
    (tmp_path / "in").mkdir()
    for name in ("gnu.tar", "sparse.tar", "pax_sparse.tar"):
        (tmp_path / "in" / name).write_bytes(tars[name].rstrip(b"\0")[:-100])
    (tmp_path / "in" / "twice.tar").write_bytes(tars["gnu.tar"][:-10240] + tars["gnu.tar"])
    (tmp_path / "in" / "empty.tar").write_bytes(b"")
    for name in ("plain.parquet", "summed.parquet", "struct.parquet"):
        content = bytearray(damage.tables()[name])
        content[len(content) // 3] ^= 0xFF
        (tmp_path / "in" / name).write_bytes(content)
    inputs = list_shards([f"{tmp_path}/in/*{ending}" for ending in (".tar", ".parquet")])
    receipts = made.embed(made.job(tmp_path / "out"), inputs)
    files = [r.files for r in receipts if r.files is not None]
    assert len(files) == 8
    versions.commit(Root(str(tmp_path / "out")), made.vector_set().name, files)
    root = Root(str(tmp_path / "out"))
    found = verify(root, versions.current(root), inputs)
    assert found.problems == []
    total = FileList.of(files).totals
    assert found.ids == total.samples == total.rows + total.rejected and total.rows > 0
    assert {"truncated", "corrupt", "empty", "missing_image"} <= total.rejects.keys()


def test_what_is_held_does_not_grow_with_the_shards(output: Path) -> None:
    """48 shards of 2,000 rows take what 8 take: the ids of the few under way, not those of the dataset."""
    paths = {kind: file_of(output, kind) for kind in ("embeddings", "rejects")}
    sources = {kind: (path, pq.read_table(path)) for kind, path in paths.items()}
    counts, files = Counts(samples=2000, rows=2000), []
    for shard in (f"s{n}" for n in range(48)):
        names = {k: str(path.relative_to(output)).replace("a/one", shard) for k, (path, _) in sources.items()}
        own = {"shard": shard, "counts": json.dumps(vars(counts)), "files": json.dumps({"rejects": names["rejects"]})}
        for kind, (_, table) in sources.items():
            n = counts.rows if kind == "embeddings" else 0
            rows = pa.concat_tables([table] * 182).slice(0, n)
            new = {"id": [f"{shard}/{i:060}" for i in range(n)], "shard": [shard] * n, "row": range(n)}
            for column, values in new.items():
                field = table.schema.field(column)
                rows = rows.set_column(table.schema.names.index(column), field, pa.array(values, field.type))
            metadata = table.schema.metadata | {f"{PREFIX}{k}".encode(): v for k, v in own.items()}
            pq.write_table(rows.replace_schema_metadata(metadata), output / names[kind])
        sizes = {k: (output / name).stat().st_size for k, name in names.items()}
        files.append(ShardFiles(shard, listed(output)[0].etag, names, sizes, counts))
    few, many = peak_of(output, files[:8]), peak_of(output, files)
    assert few > 2e6 and many < 1.3 * few


def peak_of(output: Path, files: list[ShardFiles]) -> int:
    """Bytes of Python's that verifying a version of the files takes."""
    etag = files[0].etag
    versions.commit(Root(str(output)), made.vector_set().name, [replace(f, etag=etag) for f in files])
    tracemalloc.start()
    found = check(output)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.problems == [] and found.ids == 2000 * len(files)
    return peak
