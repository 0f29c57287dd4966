"""The promises of pipeline/tables.py and columns.py: the right columns, every row of them once, whatever is broken."""

import random
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import growth, samples_of, shard_of, told, write_parquet
from damage import tables

from pipeline.columns import UNNAMED, Columns, find_columns
from pipeline.errors import UsageError
from pipeline.shards import read_samples


def test_rows_are_those_that_pandas_reads(tmp_path: Path) -> None:
    """Images, keys and labels of several row groups, at odd batch borders."""
    rng = random.Random(1)
    images = [rng.randbytes(rng.randrange(1, 4000)) for _ in range(250)]
    path = write_parquet(
        tmp_path / "x.parquet", images, key=[f"k/{i}.jpg" for i in range(250)], label=[i % 10 for i in range(250)]
    )
    frame, samples = pd.read_parquet(path), samples_of(path, "parquet")
    assert [s.image for s in samples] == list(frame["image"]) == images
    assert [s.key for s in samples] == list(frame["key"])
    assert [s.label for s in samples] == list(frame["label"])
    by_label = samples_of(path, "parquet", Columns(key="label"))
    assert [s.key for s in by_label][:10] == [str(i) for i in range(10)]
    assert {s.reject.reason for s in by_label[10:] if s.reject} == {"duplicate_key"} and len(by_label) == 250


def test_hugging_faces_struct_and_null_values(tmp_path: Path) -> None:
    """Null: missing; a path without bytes: missing, and a file of that name is never read; no key: the row's number."""
    values = [
        {"bytes": b"1", "path": "a.jpg"}, None, {"bytes": None, "path": "/etc/hostname"}, {"bytes": b"", "path": None},
    ]  # fmt: skip
    image = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "labels": [3, None, 2**40, 5]}), tmp_path / "x.parquet")
    samples = samples_of(tmp_path / "x.parquet", "parquet")
    assert told(samples) == [("0", b"1"), ("1", "missing_image"), ("2", "missing_image"), ("3", "empty")]
    assert samples[2].reject and "'/etc/hostname' and does not hold its bytes" in samples[2].reject.message
    assert [s.label for s in samples] == [3, None, None, 5]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_every_binary_and_text_type_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Also dictionaries, as pandas' categories become; null and empty keys get the row's number; bad UTF-8 too."""
    not_utf8 = pa.array([b"x", b"\xff", b"", None]).view(pa.binary()).cast(pa.string(), safe=False)
    for key, expected in (
        (pa.array(["x", "y", None, ""], pa.large_string()), ["x", "y", "#2", "#3"]),
        (pa.array(["x", "y", "z", None]).dictionary_encode(), ["x", "y", "z", "#3"]),
        (pa.array([7, 8, None, 9], pa.uint64()), ["7", "8", "#2", "9"]),
        (not_utf8, ["x", "#1", "#2", "#3"]),
    ):
        table = pa.table({"scan": pa.array([b"1", b"2", b"3", b"4"], kind), "Image_ID": key})
        pq.write_table(table, tmp_path / "x.parquet")
        samples = samples_of(tmp_path / "x.parquet", "parquet")
        assert told(samples) == list(zip(expected, [b"1", b"2", b"3", b"4"], strict=True))


def test_a_codec_that_nobody_here_has_is_told_apart_from_damage(tmp_path: Path) -> None:
    """LZO, which Parquet knows and pyarrow does not unpack: every row is `unsupported`, none `corrupt`."""
    path = write_parquet(tmp_path / "x.parquet", [b"1", b"2"])
    snappy, lzo = b"\x05image\x15\x02", b"\x05image\x15\x06"  # the column's path, then its codec, as Thrift has them
    assert path.read_bytes().count(snappy) == 1
    path.write_bytes(path.read_bytes().replace(snappy, lzo))
    assert told(samples_of(path, "parquet")) == [("0", "unsupported"), ("1", "unsupported")]


STRUCT = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
NUMBERED = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
THREE = [b"1", None, b"3"]
GIVEN, NONE = [("0", b"1"), ("1", "missing_image"), ("2", b"3")], [(n, "missing_image") for n in "012"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([b and {"bytes": b, "path": "x"} for b in THREE], STRUCT), GIVEN),
        (pa.array([b and {"bytes": b, "path": "x"} for b in THREE], VIEWS), GIVEN),
        (pa.array([{"bytes": b, "path": 5} for b in THREE], NUMBERED), GIVEN),
        (pa.StructArray.from_arrays([pa.array(THREE)], names=["bytes"]), GIVEN),
        (pa.StructArray.from_arrays([pa.array(THREE).dictionary_encode()], names=["bytes"]), GIVEN),
        (pa.array(THREE).dictionary_encode(), GIVEN),
        (pa.StructArray.from_arrays([pa.array(THREE)] * 2, names=["bytes", "bytes"]), NONE),
        (pa.StructArray.from_arrays([pa.array(THREE), *[pa.array(list("abc"))] * 2], ["bytes", "path", "path"]), NONE),
        (pa.array([{"bytes": {"bytes": b}} for b in THREE]), NONE),
        (pa.array([[b] for b in THREE]), NONE),
        (pa.array([[{"bytes": b, "path": "x"}] for b in THREE]), NONE),
        (pa.array([{"jpg": b} for b in THREE]), NONE),
        (pa.array([b"123", b"456", None], pa.binary(3)), NONE),
        (pa.array(["/etc/hostname", None, "b"]), NONE),
        (pa.array([Decimal("1.5"), None, Decimal("2.5")]), NONE),
        (pa.array([1.5, None, 2.5]), NONE),
        (pa.nulls(3), NONE),
    ],
    ids=lambda case: str(case.type)[:60] if isinstance(case, pa.Array) else "",
)
def test_image_columns_of_every_type_are_read_or_rejected(
    tmp_path: Path, column: pa.Array, expected: list[tuple[str, bytes | str]]
) -> None:
    """Found by itself or asked for by name: images, or a reject a row where the type can hold none."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": column}), path)
    for columns in (UNNAMED, Columns(image="image")):
        assert told(samples_of(path, "parquet", columns)) == expected


@pytest.mark.parametrize("name", ["a.b", "", "ü", 'x"y', " ", "image.bytes"])
def test_any_name_of_a_column_is_taken(tmp_path: Path, name: str) -> None:
    """Dots are not paths, and another column may begin with the same name."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({name: pa.array(THREE), f"{name}.z": [1, 2, 3]}), path)
    assert told(samples_of(path, "parquet")) == GIVEN


def test_a_shard_with_other_columns_rejects_its_rows(tmp_path: Path) -> None:
    """The first shard had the columns, this one has not: its rows are counted, the job goes on."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    assert told(samples_of(tmp_path / "x.parquet", "parquet")) == [("0", "missing_image"), ("1", "missing_image")]


# Columns

SCHEMA = {"b": pa.binary(), "s": pa.string(), "i": pa.int64(), "f": pa.float32()}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("any:b", ("any", None, None, None)),
        ("image:b mask:b id:i", ("image", None, "id", None)),
        ("JPG:b data:b __key__:s key:s", ("JPG", None, "__key__", None)),
        ("data:b other:b name:s", ("data", None, "name", None)),
        ("url:s label:i", (None, "url", None, "label")),
        ("image:b url:s label:f cls:i", ("image", None, None, "cls")),
        ("id:i image:b y:i", ("image", None, "id", "y")),
        ("image:s uri:s", (None, "uri", None, None)),
    ],
)
def test_columns_are_found_by_type_and_name(columns: str, expected: tuple[str | None, ...]) -> None:
    """Images, URLs, keys, labels; whatever their case."""
    schema = pa.schema([(name, SCHEMA[kind]) for name, kind in (c.split(":") for c in columns.split())])
    found = find_columns(schema, UNNAMED)
    assert (found.image, found.uri, found.key, found.label) == expected


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ("x:b y:b", {}, r"columns x \(binary\), y \(binary\): more than one.*--image-column"),
        ("image:b photo:b", {}, "more than one"),
        ("hash:b url:s", {}, "more than one"),
        ("text:s n:i", {}, "none of them"),
        ("image:b", {"image": "img"}, r"--image-column img: no such column among image \(binary\)"),
        ("image:b s:s", {"image": "s"}, "it is string, not binary"),
        ("image:b n:i", {"uri": "n"}, "it is int64, not string"),
        ("image:b n:f", {"key": "n"}, "it is float, not string or integer"),
        ("image:b u:s", {"image": "image", "uri": "u"}, "give one of them"),
    ],
)
def test_unclear_or_wrong_columns_are_refused(columns: str, asked: dict[str, str], message: str) -> None:
    """With the columns that there are."""
    schema = pa.schema([(name, SCHEMA[kind]) for name, kind in (c.split(":") for c in columns.split())])
    with pytest.raises(UsageError, match=message):
        find_columns(schema, Columns(**asked))


# Damaged files


def test_a_broken_page_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    """The rest of its row group is rejected under its own keys; the next row group goes on."""
    images = [random.Random(i).randbytes(3000) for i in range(90)]  # that snappy leaves as they are
    path = write_parquet(tmp_path / "x.parquet", images, row_group_rows=30, key=[f"k{i}" for i in range(90)])
    content = bytearray(path.read_bytes())
    at = content.index(images[45][500:2500])
    content[at + 50] ^= 0xFF
    path.write_bytes(content)
    got = told(samples_of(path, "parquet"))
    assert [key for key, _ in got] == [f"k{i}" for i in range(90)]
    assert [what for _, what in got[:30]] == images[:30] and [what for _, what in got[60:]] == images[60:]
    broken = [i for i, (_, what) in enumerate(got) if what == "corrupt"]
    assert broken == list(range(broken[0], 60)) and broken[0] <= 45
    assert [what for _, what in got[30 : broken[0]]] == images[30 : broken[0]]


def test_a_broken_key_page_gives_row_numbers(tmp_path: Path) -> None:
    """The images of the row group are whole and come; their keys are `#<row>`."""
    path = write_parquet(
        tmp_path / "x.parquet", [bytes([i]) for i in range(1, 41)], 20, key=[f"k{i}" for i in range(40)]
    )
    column = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(content)
    got = told(samples_of(path, "parquet"))
    assert got == [(f"k{i}" if i < 20 else f"#{i}", bytes([i + 1])) for i in range(40)]


def test_a_footer_that_cannot_be_read_is_one_reject(tmp_path: Path) -> None:
    """Empty, cut, overwritten, or promising rows that its columns do not hold."""
    path = write_parquet(tmp_path / "x.parquet", [b"1"] * 50)
    content = path.read_bytes()
    for damaged, reason in (
        (b"", "empty"), (b"PAR1", "corrupt"), (content[:-30], "truncated"), (content[:-4] + b"XXXX", "truncated"),
        (b"hello" * 50, "corrupt"), (content[:-60] + b"\xff" * 52 + content[-8:], "corrupt"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        assert told(samples_of(path, "parquet")) == [("#end", reason)]
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    assert samples_of(path, "parquet") == []


# Memory


def test_one_image_for_many_rows_is_held_once(tmp_path: Path) -> None:
    """A dictionary's one entry of 8 MB for 40 rows: not many copies of it at once."""
    path, image = tmp_path / "x.parquet", random.Random(0).randbytes(8 * 2**20)
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())]), dictionary_pagesize_limit=2**30) as writer:
        writer.write_table(pa.table({"image": pa.array([image] * 40, pa.binary())}))
    assert path.stat().st_size < 2 * len(image)
    with growth() as taken:
        count = sum(s.image == image for s in read_samples(shard_of(path, "parquet")))
    assert count == 40 and taken.peak_bytes < 10 * len(image)


def test_a_huge_value_is_too_large_and_takes_four_times_its_bytes(tmp_path: Path) -> None:
    """257 MB packed into 30 kB: its page, Arrow's buffer as it grows, and Python's bytes; the rows around it come."""
    path, huge = tmp_path / "x.parquet", 257 * 2**20
    table = pa.table({"image": pa.array([b"1", bytes(huge), b"3"], pa.binary())})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    del table
    with growth() as taken:
        samples = list(read_samples(shard_of(path, "parquet")))
    assert told(samples) == [("0", b"1"), ("1", "too_large"), ("2", b"3")]
    assert path.stat().st_size < 50_000 and taken.peak_bytes < 4.5 * huge


def test_a_page_that_claims_two_gigabytes_takes_none(tmp_path: Path) -> None:
    """Its header begins two bytes early, so that the checksum is taken for its size."""
    (tmp_path / "x.parquet").write_bytes(content := tables()["summed.parquet"])
    column = pq.read_metadata(tmp_path / "x.parquet").row_group(0).column(2)
    at, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    assert column.path_in_schema == "label"
    (tmp_path / "x.parquet").write_bytes(content[:at] + content[at + 2 : end] + bytes(2) + content[end:])
    with growth() as taken:
        samples = samples_of(tmp_path / "x.parquet", "parquet")
    assert len(samples) == 6 and not any(s.label for s in samples)
    assert taken.peak_bytes < 50e6


def test_a_footer_that_claims_a_million_row_groups_takes_no_memory(tmp_path: Path) -> None:
    """In 60 bytes, where pyarrow would make room for all of them, 320 MB, before it looks for the first."""
    schema = b"\x19\x1c\x48\x06schema\x15\x00\x00"  # a list of one entry, without columns
    footer = b"\x15\x04" + schema + b"\x16\x00" + b"\x19\xfc\xc0\x84\x3d"  # version, schema, rows, 10^6 row groups
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with growth() as taken:
        (sample,) = samples_of(tmp_path / "x.parquet", "parquet")
    assert sample.reject and sample.reject.reason == "corrupt" and "\n" not in sample.reject.message
    assert "size limit" in sample.reject.message and taken.peak_bytes < 50e6


def test_more_rows_than_bytes_are_no_images(tmp_path: Path) -> None:
    """Three million rows in 6 kB, which a damaged count looks like: one reject, not three million."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.nulls(3_000_000, pa.binary())}), path)
    (sample,) = samples_of(path, "parquet")
    assert sample.reject and sample.reject.reason == "corrupt" and "3000000 rows in" in sample.reject.message
