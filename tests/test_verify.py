"""verify finds each planted corruption, and nothing in a sound output."""

import shutil
from collections.abc import Callable
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import write_tar
from pictures import jpeg

from pipeline import versions
from pipeline.listing import list_shards
from pipeline.output import Root
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


def check(output: Path, shards: Path | None = None) -> Findings:
    root = Root(str(output))
    return verify(root, versions.current(root), list_shards([str(shards)]) if shards else None)


def embeddings(output: Path, shard: str = "a/one") -> Path:
    root = Root(str(output))
    return output / next(f.embeddings for f in versions.read_list(root, versions.current(root)) if f.shard == shard)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The same file with other rows, as somebody's repair script would leave it."""
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def test_a_sound_output_has_no_findings(sound: Path, shards: Path) -> None:
    """Every id of the input is there once, with and without looking at the input."""
    for found in (check(sound), check(sound, shards)):
        assert found.clean and found.problems == []
        assert found.ids == 24


def test_a_missing_file_is_named(output: Path) -> None:
    """Its rows are missing, and the file is named."""
    embeddings(output).unlink()
    found = check(output)
    assert (found.bad_files, found.missing) == (1, 11)
    assert any("missing" in p and "a/one" in p for p in found.problems)


def test_a_flipped_byte_in_a_page_is_found(output: Path) -> None:
    """Page checksums tell of one changed bit, wherever the values would still be plausible."""
    path = embeddings(output)
    column = pq.read_metadata(path).row_group(0).column(7)
    assert column.path_in_schema == "embedding.list.element"
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    found = check(output)
    assert found.bad_files == 1 and "embeddings/a/one" in found.problems[0]


def test_a_short_row_is_found(output: Path, shards: Path) -> None:
    """A file with a row less names the id when the input is given."""
    rewrite(embeddings(output), lambda t: t.slice(1))
    assert (check(output).missing, check(output).bad_files) == (1, 1)
    found = check(output, shards)
    assert found.missing == 1 and "missing id: a/one/photo_0" in found.problems


def test_a_duplicated_id_is_named(output: Path) -> None:
    """The same id twice, even in one file, is found and named."""
    rewrite(embeddings(output), lambda t: pa.concat_tables([t, t.slice(2, 1)]))
    found = check(output)
    assert found.duplicated == 1 and any(p.startswith("duplicated id: a/one/") for p in found.problems)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(bad: float, output: Path) -> None:
    """NaN and infinity in an embedding name their row."""

    def poison(table: pa.Table) -> pa.Table:
        values = np.stack(table["embedding"].to_numpy(zero_copy_only=False)).copy()
        values[3, 5] = bad
        flat = pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1)), type=table.schema.field("embedding").type
        )
        return table.set_column(7, table.schema.field("embedding"), flat)

    rewrite(embeddings(output), poison)
    found = check(output)
    assert found.not_finite == 1 and any(p.startswith("not finite: a/one/") for p in found.problems)


def test_a_file_of_another_set_is_named(output: Path, shards: Path) -> None:
    """Vectors of another configuration under our name are recognised by what the file says of itself."""
    other = made.vector_set(normalized=True).name
    ours = embeddings(output)
    theirs = Path(str(ours).replace(made.vector_set().name, other))
    shutil.copy(theirs, ours)
    found = check(output)
    assert found.bad_files == 1 and any(f"its set is {other}" in p for p in found.problems)


def test_a_file_of_another_size_is_named(output: Path) -> None:
    """Something appended or cut is found before anything is parsed."""
    path = embeddings(output)
    path.write_bytes(path.read_bytes() + b"x")
    assert "the version lists" in check(output).problems[0]


def test_new_and_gone_input_is_told(sound: Path, shards: Path, tmp_path: Path) -> None:
    """Against a newer input: ids that are not embedded yet are missing, those that are gone are unexpected."""
    shutil.copytree(shards, tmp_path / "in")
    write_tar(tmp_path / "in" / "new.tar", {"x.jpg": jpeg(), "y.jpg": jpeg()})
    (tmp_path / "in" / "a" / "two.tar").unlink()
    found = check(sound, tmp_path / "in")
    assert (found.missing, found.unexpected) == (2, 7)
    assert not found.clean
