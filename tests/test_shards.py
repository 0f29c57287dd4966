"""The promises of pipeline/shards.py, tars.py, tables.py and columns.py: every image once, whatever is broken."""

import gzip
import io
import os
import random
import socket
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from containers import serving, tar_bytes, write_folder, write_parquet, write_tar
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import shards, tars
from pipeline.columns import UNNAMED, Columns, find_columns
from pipeline.errors import Reject, StorageError, UsageError
from pipeline.listing import Shard, list_shards
from pipeline.shards import Sample, fetch, read_keys, read_samples
from pipeline.storage import Entry
from pipeline.tables import read_rows


def shard_of(path: Path, form: str, columns: Columns = UNNAMED) -> Shard:
    return Shard(
        name="s", format=form, url=str(path), size=path.stat().st_size, etag="0" * 16, columns=columns
    )  # fmt: skip


def samples_of(path: Path, form: str = "webdataset", columns: Columns = UNNAMED) -> list[Sample]:
    """All samples, after the promises that hold for each shard: rows count up, ids are unique, `read_keys` agrees."""
    shard = shard_of(path, form, columns)
    samples = list(read_samples(shard))
    assert [s.row for s in samples] == list(range(len(samples)))
    assert len({s.id_key for s in samples}) == len(samples)
    assert list(read_keys(shard)) == [s.id_key for s in samples]
    assert all(not s.image for s in samples if s.reject and s.reject.reason != "duplicate_key")
    return samples


def told(samples: list[Sample]) -> list[tuple[str, bytes | str]]:
    """Key and image, or the reason why there is none."""
    return [(s.key, s.reject.reason if s.reject else s.image) for s in samples]


def tar_of(tmp_path: Path, content: bytes) -> list[tuple[str, bytes | str]]:
    (tmp_path / "x.tar").write_bytes(content)
    return told(samples_of(tmp_path / "x.tar"))


# WebDataset

GROUPED = [
    ("000.jpg", b"j0"), ("000.cls", b"3"), ("000.json", b"{}"),
    ("dir.d/001.cls", b" 7\n"), ("dir.d/001.PNG", b"p1"),
    ("./002.seg.png", b"s2"), ("./002.jpg", b"j2"), ("./002.depth.png", b"d2"),
    ("003.seg.png", b"s3"), ("003.other.png", b"o3"),
    ("__meta__/x.jpg", b"no"), ("__index__.jpg__", b"no"), ("__key__", b"no"), ("README", b"no"),
    (".hidden.jpg", b"no"),
    ("004.webp", b"w4"), ("sub/004.webp", b"w4b"), ("005.v1.jpeg", b"v5"), ("006.cls", b"x"), ("006.tiff", b"t6"),
    ("ü 7.jpg", b"j7"), ("x" * 180 + ".jpg", b"long"),
]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_samples_are_grouped_as_webdataset_does(tmp_path: Path, form: int, pack: Callable[[bytes], bytes]) -> None:
    """Same keys, same order, same image and label as webdataset's own reader gives; gzip is seen by content."""
    (tmp_path / "x.tar").write_bytes(pack(tar_bytes(GROUPED, form)))
    oracle = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False))
    samples = samples_of(tmp_path / "x.tar")
    assert [s.key for s in samples] == [o["__key__"] for o in oracle]
    endings = ["jpg", "png", "jpg", "seg.png", "webp", "webp", "v1.jpeg", "tiff", "jpg", "jpg"]
    assert [s.image for s in samples] == [o[e] for o, e in zip(oracle, endings, strict=True)]
    assert [s.label for s in samples] == [3, 7] + [None] * 8
    assert samples[2].key == "./002" and samples[1].key == "dir.d/001" and not any(s.reject for s in samples)


def test_equal_keys_are_rejected_but_for_the_first(tmp_path: Path) -> None:
    """A key that comes again, and a name that comes twice in one group: no image vanishes, ids stay unique."""
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.JPG", b"4"), ("a#duplicate-5.jpg", b"6")]
    (tmp_path / "x.tar").write_bytes(tar_bytes([*members, ("a.jpg", b"5"), ("a#duplicate-2.jpg", b"7")]))
    samples = samples_of(tmp_path / "x.tar")
    dup = "duplicate_key"
    assert told(samples) == [
        ("a", b"1"), ("b", b"2"), ("a", dup), ("a", dup), ("a#duplicate-5", b"6"), ("a", dup), ("a#duplicate-2", dup),
    ]  # fmt: skip
    assert [s.id_key for s in samples][2:4] == ["a#duplicate-2", "a#duplicate-3"]
    assert samples[2].reject and samples[2].reject.message == "row 0 has the key 'a' already"


def test_a_sample_without_an_image_is_a_reject(tmp_path: Path) -> None:
    """No image member, an empty one, one that is a link."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))

        add("only.json", b"{}")
        add("none.jpg")
        add("real.jpg", b"r")
        add("hard.jpg", kind=tarfile.LNKTYPE, link="real.jpg")
        add("soft.png", kind=tarfile.SYMTYPE, link="../real.jpg")
        add("soft.cls", b"4")
        add("data.json", kind=tarfile.SYMTYPE, link="only.json")
        add("folder.jpg", kind=tarfile.DIRTYPE)
        add("../up.jpg", b"u")
        add("/abs.jpg", b"a")
    assert tar_of(tmp_path, sink.getvalue()) == [
        ("only", "missing_image"), ("none", "empty"), ("real", b"r"), ("hard", "missing_image"),
        ("soft", "missing_image"), ("../up", b"u"), ("/abs", b"a"),
    ]  # fmt: skip
    samples = samples_of(tmp_path / "x.tar")
    assert samples[3].reject and "'hard.jpg' is a link to 'real.jpg'" in samples[3].reject.message
    assert samples[4].label == 4


def test_labels_that_are_no_int32_are_unknown(tmp_path: Path) -> None:
    """They would not fit the output's column."""
    texts = [b"-1", b"3000000000", b"cat", b"", b"9" * 5000]
    members = [part for i, t in enumerate(texts) for part in ((f"{i}.jpg", b"j"), (f"{i}.cls", t))]
    write_tar(tmp_path / "x.tar", members)
    assert [s.label for s in samples_of(tmp_path / "x.tar")] == [-1, None, None, None, None]


def test_names_that_are_no_utf8_are_spelled_out(tmp_path: Path) -> None:
    """Output columns hold Unicode only."""
    content = tar_bytes([("q.jpg", b"1")]).replace(b"q.jpg", b"\xff.jpg")
    header = bytearray(content[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert tar_of(tmp_path, bytes(header) + content[512:]) == [("\\udcff", b"1")]


def test_sparse_members_are_read_whole(tmp_path: Path) -> None:
    """GNU tar stores files with holes so; their real size is what counts."""
    header = bytearray(tar_bytes([("a.jpg", b"d" * 512)])[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (1024, 512)
    header[483:495] = b"%011o\0" % 1536
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content = bytes(header) + b"d" * 512 + tar_bytes([("b.jpg", b"b")])
    assert tar_of(tmp_path, content) == [("a", bytes(1024) + b"d" * 512), ("b", b"b")]


def test_too_large_images_are_refused_unread(tmp_path: Path) -> None:
    """By the header alone: the 1 GiB member here is a hole in a sparse file, and no memory is taken for it."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 2**30
    with open(tmp_path / "x.tar", "wb") as f:
        f.write(info.tobuf(tarfile.GNU_FORMAT))
        f.seek(512 + 2**30)
        f.write(tar_bytes({"b.jpg": b"b"}))
    tracemalloc.start()
    samples = list(read_samples(shard_of(tmp_path / "x.tar", "webdataset")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told(samples) == [("big", "too_large"), ("b", b"b")] and peak < 20e6


def test_a_long_tar_streams(tmp_path: Path) -> None:
    """10^5 members: what stays is the seen keys, under 400 bytes each; tarfile's own list takes 1.5 kB each."""
    count = 100_000
    header = bytearray(tar_bytes({"0000000.jpg": b"j"})[:1024])
    with open(tmp_path / "x.tar", "wb") as f:
        for i in range(count):
            header[:7] = b"%07d" % i
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header[:512])
            f.write(header)
        f.write(bytes(1024))
    before, grown, rows = resident_bytes(), 0, 0
    for sample in read_samples(shard_of(tmp_path / "x.tar", "webdataset")):
        rows += sample.image == b"j"
        if sample.row % 10_000 == 0:
            grown = max(grown, resident_bytes() - before)
    assert rows == count and grown < 400 * count


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Damaged tars

FIVE = {f"{i}.jpg": bytes([65 + i]) * 700 for i in range(5)}  # each takes 512 + 1024 bytes
WHOLE = [(str(i), bytes([65 + i]) * 700) for i in range(5)]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (0, [("#end", "empty")]),
        (300, [("#end", "truncated")]),
        (1536 * 2 + 100, [*WHOLE[:2], ("#end", "truncated")]),  # within a header
        (1536 * 2 + 512 + 100, [*WHOLE[:2], ("2", "truncated")]),  # within an image
        (1536 * 2 + 512 + 700, [*WHOLE[:3], ("#end", "truncated")]),  # within the padding behind an image
        (1536 * 3, [*WHOLE[:3], ("#end", "truncated")]),  # tarfile takes that for a whole archive
        (1536 * 5, [*WHOLE, ("#end", "truncated")]),  # all but the end mark
        (1536 * 5 + 512, WHOLE),
    ],
)
def test_a_cut_tar_gives_what_is_whole_and_says_that_it_is_cut(tmp_path: Path, at: int, expected: list[Any]) -> None:
    """Where Python's tarfile would end in silence; one reject, under the cut image's own key where it has one."""
    assert tar_of(tmp_path, tar_bytes(FIVE)[:at]) == expected


def test_a_cut_between_an_image_and_its_label_keeps_the_image(tmp_path: Path) -> None:
    """The open sample has its image; one whose image had not come yet is lost with the rest."""
    content = tar_bytes([("a.jpg", b"j" * 600), ("a.cls", b"1"), ("b.cls", b"2"), ("b.jpg", b"k")])
    assert tar_of(tmp_path, content[: 1536 + 512]) == [("a", b"j" * 600), ("#end", "truncated")]
    assert tar_of(tmp_path, content[: 1536 + 1024 + 1024]) == [("a", b"j" * 600), ("#end", "truncated")]


def test_messages_say_where_the_tar_ends(tmp_path: Path) -> None:
    """The byte, and that later samples are lost."""
    for content, expected in (
        (tar_bytes(FIVE)[:4000], "the tar ends at byte 4000 inside '2.jpg' without its end mark: later samples lost"),
        (tar_bytes(FIVE)[:3072], "the tar ends at byte 3072 without its end mark: later samples lost"),
        (b"<html>not found</html>" * 40, "this is no tar: it begins with b'<html>not found<'"),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        last = samples_of(tmp_path / "x.tar")[-1]
        assert last.reject and last.reject.message == expected and last.reject.stage == "read"


def test_a_damaged_header_ends_the_tar_with_a_reject(tmp_path: Path) -> None:
    """Nothing can be found behind it; a hole of zeros looks like the end, but members behind it give it away."""
    content = bytearray(tar_bytes(FIVE))
    content[1536 * 2 + 5] ^= 0xFF
    assert tar_of(tmp_path, bytes(content)) == [*WHOLE[:2], ("#end", "corrupt")]
    content = bytearray(tar_bytes(FIVE))
    content[1536 * 2 : 1536 * 2 + 700] = bytes(700)
    assert tar_of(tmp_path, bytes(content)) == [*WHOLE[:2], ("#end", "corrupt")]
    assert tar_of(tmp_path, tar_bytes(FIVE) + tar_bytes({"z.jpg": b"z"})) == [*WHOLE, ("#end", "corrupt")]
    assert tar_of(tmp_path, tar_bytes(FIVE) + b"shifted" + tar_bytes({"z.jpg": b"z"})) == [*WHOLE, ("#end", "corrupt")]


def test_what_is_no_tar_is_one_reject(tmp_path: Path) -> None:
    """Short or long, text or noise."""
    for content in (b"hello", b"<html>" * 500, random.Random(0).randbytes(5000), gzip.compress(b"hello" * 300)):
        assert tar_of(tmp_path, content) == [("#end", "corrupt")]
    assert tar_of(tmp_path, gzip.compress(b"")) == [("#end", "empty")]


def test_whole_tars_of_any_kind_are_fine(tmp_path: Path) -> None:
    """Garbage behind the end mark, no sample at all, gzip in several parts or padded."""
    content = tar_bytes(FIVE)
    assert tar_of(tmp_path, content + b"garbage" * 1000) == WHOLE
    assert tar_of(tmp_path, tar_bytes({})) == []
    parts = b"".join(gzip.compress(content[i : i + 1000]) for i in range(0, len(content), 1000))
    assert tar_of(tmp_path, parts) == WHOLE
    assert tar_of(tmp_path, gzip.compress(content) + bytes(100)) == WHOLE
    assert tar_of(tmp_path, gzip.compress(content) + b"garbage") == WHOLE


def test_crafted_headers_take_no_memory_and_no_time(tmp_path: Path) -> None:
    """A negative size hangs older tarfiles (CVE-2025-8194); a pax header of 8 GB would be read whole."""
    for kind, size in ((tarfile.XHDTYPE, 2**33), (tarfile.GNUTYPE_LONGNAME, 2**33), (tarfile.REGTYPE, -512)):
        header = bytearray(tar_bytes({"a.jpg": b""})[:512])
        header[156:157] = kind
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        assert tar_of(tmp_path, tar_bytes(FIVE)[: 1536 * 5] + header) == [*WHOLE, ("#end", "corrupt")]


def test_a_damaged_gzip_stream_gives_all_before_the_damage(tmp_path: Path) -> None:
    """To the last sample that unpacks; and a wrong checksum at the end is told."""
    noise = {f"{i}.jpg": random.Random(i).randbytes(3000) for i in range(60)}
    content = gzip.compress(tar_bytes(noise))
    whole = [(name[:-4], image) for name, image in noise.items()]
    broken = bytearray(content)
    broken[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    got = tar_of(tmp_path, bytes(broken))
    assert got[-1] in [("#end", "corrupt"), (got[-1][0], "corrupt")] and len(got) >= 29
    assert got[:28] == whole[:28]
    assert tar_of(tmp_path, content[:-8] + b"\0" * 8) == [*whole, ("#end", "corrupt")]
    assert tar_of(tmp_path, content[:-4]) == [*whole, ("#end", "truncated")]


class Failing(io.RawIOBase):
    """A store's stream that gives short reads and fails for good at a byte."""

    def __init__(self, content: bytes, at: int, error: Exception):
        self._bytes, self._at, self._error = io.BytesIO(content), at, error

    def read(self, count: int = -1) -> bytes:
        if count and self._bytes.tell() >= self._at:
            raise self._error
        return self._bytes.read(min(count, 1000) if count > 0 else count)

    def seek(self, *place: int) -> int:
        return self._bytes.seek(*place)

    def tell(self) -> int:
        return self._bytes.tell()


ERRORS = [
    StorageError("gone"),
    FileNotFoundError(2, "gone"),
    PermissionError(13, "no"),
    OSError(5, "eio"),
    OSError("?"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_the_store_are_never_rejects(tmp_path: Path, error: Exception) -> None:
    """They are raised as they are, from the middle of a tar, a gzipped tar, a Parquet file and its footer."""
    content = tar_bytes({f"{i}.jpg": bytes(700) for i in range(10)})
    for packed, at in ((content, 0), (content, 5000), (gzip.compress(content, 0), 5000)):
        with pytest.raises(type(error)) as e:
            list(tars.read_members(Failing(packed, at, error)))  # type: ignore[arg-type]
        assert e.value is error
    table = write_parquet(
        tmp_path / "x.parquet", [bytes([i]) * 3000 for i in range(60)], row_group_rows=20
    ).read_bytes()
    for first, last in ((0, len(table)), (0, 100_000)):
        with pytest.raises(type(error)) as e:
            list(read_rows(Window(table, first, last, error), len(table), UNNAMED))  # type: ignore[arg-type]
        assert e.value is error
    assert len(list(read_rows(Window(table, 0, 0, error), len(table), UNNAMED))) == 60  # type: ignore[arg-type]


class Window(Failing):
    """Fails for reads that begin in a range of bytes."""

    def __init__(self, content: bytes, first: int, last: int, error: Exception):
        super().__init__(content, 0, error)
        self._range = range(first, last)

    def read(self, count: int = -1) -> bytes:
        if count and self._bytes.tell() in self._range:
            raise self._error
        return self._bytes.read(min(count, 1000) if count > 0 else count)


def test_a_vanished_shard_is_the_stores_error(tmp_path: Path) -> None:
    """In every format."""
    for form in ("webdataset", "parquet"):
        shard = Shard(name="s", format=form, url=str(tmp_path / "gone"), size=9, etag="0" * 16)
        with pytest.raises(FileNotFoundError):
            list(read_samples(shard))


# Parquet


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


def test_a_shard_with_other_columns_rejects_its_rows(tmp_path: Path) -> None:
    """The first shard had the columns, this one has not: its rows are counted, the job goes on."""
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    assert told(samples_of(tmp_path / "x.parquet", "parquet")) == [("0", "missing_image"), ("1", "missing_image")]


def test_uri_columns_leave_the_fetching_to_threads(tmp_path: Path) -> None:
    """An address without a scheme is relative to the Parquet file's folder; null and blank ones are missing."""
    urls = ["https://h/a.jpg?x=1", "b/c.jpg", "../d.jpg", "/abs/e.jpg", None, " ", "s3://b/f.jpg"]
    pq.write_table(pa.table({"url": urls, "key": list("abcdefg")}), tmp_path / "x.parquet")
    samples = samples_of(tmp_path / "x.parquet", "parquet")
    assert [s.url for s in samples] == [
        "https://h/a.jpg?x=1", f"{tmp_path}/b/c.jpg", f"{tmp_path.parent}/d.jpg", "/abs/e.jpg", None, None,
        "s3://b/f.jpg",
    ]  # fmt: skip
    assert [s.key for s in samples if s.reject] == ["e", "f"]
    assert all(s.listed_bytes is None for s in samples)
    with fsspec.open("memory://bucket/d/x.parquet", "wb") as f:
        f.write((tmp_path / "x.parquet").read_bytes())
    (shard,) = list_shards(["memory://bucket/d/x.parquet"])
    assert [s.url for s in read_samples(shard)][1:3] == ["memory:///bucket/d/b/c.jpg", "memory:///bucket/d.jpg"][:2]


# Addresses


def refused(url: str) -> Reject:
    with pytest.raises(Reject) as e:
        fetch(Sample(0, "k", url=url))
    assert e.value.stage == "fetch" and "secret" not in e.value.message
    return e.value


def test_addresses_are_fetched_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any URL; what cannot be had is a reject with the URL but not its query; never more than the limit is held."""
    write_folder(tmp_path, {"a.jpg": b"image", "big.jpg": b"b" * 3000, "empty.jpg": b""})
    with fsspec.open("memory://fetch/m.jpg", "wb") as f:
        f.write(b"memory")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(shards, "MAX_IMAGE_BYTES", 2000)
    with serving(tmp_path) as url:
        assert fetch(Sample(0, "k", url=f"{url}/a.jpg?token=secret")) == b"image"
        assert refused(f"{url}/gone.jpg?token=secret").message == f"{url}/gone.jpg: not found"
        assert refused(f"{url}/big.jpg").reason == "too_large" and refused(f"{url}/empty.jpg").reason == "empty"
    assert fetch(Sample(0, "k", url="memory://fetch/m.jpg")) == b"memory"
    assert fetch(Sample(0, "k", url=str(tmp_path / "a.jpg"))) == b"image"
    assert refused(str(tmp_path / "big.jpg")).reason == "too_large"
    for bad in (
        "memory://fetch/none.jpg",
        str(tmp_path / "none.jpg"),
        str(tmp_path),
        str(tmp_path / "pipe"),
        "nothing://x",
        "reference://x",
        "http://[bad/a.jpg",
    ):
        assert refused(bad).reason == "fetch_failed"


def test_only_what_may_pass_is_fetched_again() -> None:
    """404 and 403 at once; 503 and a broken connection up to three times."""
    for status, tries in ((404, 1), (403, 1), (503, 3), (0, 3)):
        with answering(status) as (url, asked):
            why = refused(f"{url}/a.jpg?token=secret")
            # aiohttp itself asks twice where a connection breaks.
            assert why.reason == "fetch_failed" and len(asked) == tries * (2 if status == 0 else 1)
            assert why.message.endswith({404: "not found", 0: "ServerDisconnectedError"}.get(status, f"HTTP {status}"))


class answering:
    """A server that answers every request with one status, or hangs up (0); gives its URL and the requests so far."""

    def __init__(self, status: int):
        self._status, self._asked = status, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self._asked.append(connection.recv(65536))
                if self._status:
                    head = f"HTTP/1.1 {self._status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    connection.sendall(head.encode())

    def __enter__(self) -> tuple[str, list[bytes]]:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}", self._asked

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


# Folders


def test_a_folders_images_come_in_order_under_their_paths(tmp_path: Path) -> None:
    """The key keeps its ending: a.jpg and a.png are two images. Empty and too large ones are refused unread."""
    folder = write_folder(tmp_path / "f", {"b/a.png": b"2", "b/a.jpg": b"1", "c.jpg": b"", "d.gif": b"3"})
    (shard,) = list_shards([str(folder)])
    assert told(list(read_samples(shard))) == [
        ("b/a.jpg", b"1"),
        ("b/a.png", b"2"),
        ("c.jpg", "empty"),
        ("d.gif", b"3"),
    ]
    assert list(read_keys(shard)) == ["b/a.jpg", "b/a.png", "c.jpg", "d.gif"]
    huge = Shard(
        name="s", format="folder", url=str(folder), size=1, etag="0" * 16,
        members=(Entry(f"{folder}/none.jpg", 2**40, ""),),
    )  # fmt: skip
    assert told(list(read_samples(huge))) == [("none.jpg", "too_large")]


def test_a_stale_listing_is_the_stores_error(tmp_path: Path) -> None:
    """A member that has gone or has another size since it was listed: no reject, the shard is read another time."""
    folder = write_folder(tmp_path / "f", {"a.jpg": b"1", "b.jpg": b"2"})
    (shard,) = list_shards([str(folder)])
    (folder / "b.jpg").write_bytes(b"22")
    with pytest.raises(StorageError, match=r"b\.jpg has 2 bytes, 1 when"):
        list(read_samples(shard))
    (folder / "b.jpg").unlink()
    with pytest.raises(StorageError, match=r"b\.jpg has gone"):
        list(read_samples(shard))


def test_a_remote_folders_images_are_fetched_by_threads() -> None:
    """Their failure is the store's, not the image's."""
    for name in ("a.jpg", "b/c.png"):
        with fsspec.open(f"memory://remote/{name}", "wb") as f:
            f.write(name.encode())
    (shard,) = list_shards(["memory://remote"])
    samples = list(read_samples(shard))
    assert [(s.key, s.image, s.listed_bytes) for s in samples] == [("a.jpg", b"", 5), ("b/c.png", b"", 7)]
    assert [fetch(s) for s in samples] == [b"a.jpg", b"b/c.png"]
    fsspec.filesystem("memory").rm("/remote/a.jpg")
    with pytest.raises(StorageError, match="gone since it was listed"):
        fetch(samples[0])


# Any damage at all

FUZZ = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ORIGINAL = [(f"{i}", random.Random(i).randbytes(150 * i + 40)) for i in range(8)]


def originals(form: str, folder: Path) -> bytes:
    if form == "parquet":
        images, keys = [image for _, image in ORIGINAL], [key for key, _ in ORIGINAL]
        return write_parquet(folder / "whole.parquet", images, row_group_rows=3, key=keys).read_bytes()
    content = tar_bytes([(f"{key}.jpg", image) for key, image in ORIGINAL])
    return gzip.compress(content) if form == "tar.gz" else content


@pytest.mark.parametrize("form", ["tar", "tar.gz", "parquet"])
@FUZZ
@given(at=st.floats(0, 1, exclude_max=True))
@example(at=0.0)
def test_a_file_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path: Path, form: str, at: float) -> None:
    """Never raises; samples before the cut are the originals; it looks complete only if all of them came."""
    content = originals(form, tmp_path)
    path = tmp_path / "x"
    path.write_bytes(content[: int(at * len(content))])
    got = told(samples_of(path, "parquet" if form == "parquet" else "webdataset"))
    whole = [g for g in got if isinstance(g[1], bytes)]
    assert whole == ORIGINAL[: len(whole)]
    assert got == ORIGINAL or (len(got) == len(whole) + 1 and got[-1][1] in ("empty", "truncated", "corrupt"))


@pytest.mark.parametrize("form", ["tar", "tar.gz", "parquet"])
@FUZZ
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), length=st.integers(1, 64))
def test_a_file_damaged_anywhere_is_never_silently_short(
    tmp_path: Path, form: str, at: float, bit: int, length: int
) -> None:
    """Never raises; every original is there, or a reject is. Tars have no checksum over an image's own bytes."""
    content = bytearray(originals(form, tmp_path))
    start = int(at * len(content))
    for i in range(start, min(start + length, len(content))):
        content[i] ^= 1 << bit
    path = tmp_path / "x"
    path.write_bytes(content)
    got = told(samples_of(path, "parquet" if form == "parquet" else "webdataset"))
    if not any(isinstance(what, str) for _, what in got):
        assert [key for key, _ in got] == [key for key, _ in ORIGINAL] or form == "parquet"
        assert len(got) == len(ORIGINAL)
        if form == "tar.gz":
            assert got == ORIGINAL
        assert [len(what) for _, what in got] == [len(image) for _, image in ORIGINAL] or form == "parquet"
