"""Lists of files in columns: the same list whoever made it, summed and read again without a row as an object."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from listed_store import files_of

from pipeline.lists import ROWS_AT_ONCE, FileList, ShardFiles
from pipeline.rows import Counts


def many(count: int) -> Iterator[ShardFiles]:
    return (files_of(i) for i in range(count))


def test_a_list_is_its_rows_again() -> None:
    """Over the ends of batches too, by iteration, by index and after Parquet."""
    count = ROWS_AT_ONCE + 3
    files = list(many(count))
    kept = FileList.of(files)
    assert len(kept) == count and list(kept) == files and kept[-1] == files[-1] and kept[7] == files[7]
    assert list(FileList.decode(kept.encode())) == files
    assert kept.kinds() == ["embeddings", "rejects"] and list(kept.names("rejects"))[5] == files[5].rejects


def test_equal_lists_have_one_identity_however_they_are_held() -> None:
    """In one chunk or many, made or read: a version's name; another order, another value: another."""
    files = list(many(50))
    whole = FileList.of(files)
    pieces = FileList.of(files[:20]) + FileList.of(files[20:])
    mixed = FileList(FileList.of([*files[25:], *files[:25]]).table.take(pa.array([*range(25, 50), *range(25)])))
    assert whole.identity() == pieces.identity() == mixed.identity() == FileList.decode(whole.encode()).identity()
    assert whole.identity() != FileList.of(reversed(files)).identity() != FileList.of(files[:-1]).identity()


def test_totals_are_the_rows_added() -> None:
    """Reasons apart; an empty list has none."""
    expected = Counts()
    for files in many(40):
        expected.add(files.counts)
    assert FileList.of(many(40)).totals == expected and FileList.of([]).totals == Counts()


def test_bytes_that_are_no_list_are_refused() -> None:
    """Other columns, or a flipped bit in a page, by its checksum."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"shard": ["a"]}), buffer)
    with pytest.raises(ValueError, match="its columns are shard"):
        FileList.decode(buffer.getvalue().to_pybytes())
    spoilt = bytearray(FileList.of(many(5)).encode())
    spoilt[60] ^= 1
    with pytest.raises((OSError, pa.ArrowException)):
        FileList.decode(bytes(spoilt))
