"""The promises of pipeline/shards.py: every image of a shard once, in every format, whatever is broken."""

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from containers import samples_of, tar_bytes, tar_of, told, write_folder, write_parquet, write_tar
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pipeline import tars
from pipeline.columns import UNNAMED
from pipeline.errors import StorageError
from pipeline.fetching import fetch
from pipeline.listing import Shard, list_shards
from pipeline.shards import read_keys, read_samples
from pipeline.storage import Entry
from pipeline.tables import read_rows

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


def test_long_keys_are_told_apart_too(tmp_path: Path) -> None:
    """Keys that differ far behind their beginning are different; equal ones are duplicates."""
    long = "k" * 5000
    (tmp_path / "x.tar").write_bytes(tar_bytes([(f"{long}{end}.jpg", b"1") for end in ("a", "b", "a")]))
    samples = samples_of(tmp_path / "x.tar")
    assert [s.id_key for s in samples] == [f"{long}a", f"{long}b", f"{long}a#duplicate-2"]
    assert samples[2].reject is not None and samples[2].reject.reason == "duplicate_key"


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


# Errors of the store


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


# Addresses


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
    assert all(s.listed is None for s in samples)
    with fsspec.open("memory://bucket/d/x.parquet", "wb") as f:
        f.write((tmp_path / "x.parquet").read_bytes())
    (shard,) = list_shards(["memory://bucket/d/x.parquet"])
    assert [s.url for s in read_samples(shard)][1:3] == ["memory:///bucket/d/b/c.jpg", "memory:///bucket/d.jpg"][:2]


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
    assert [(s.key, s.image, s.listed and s.listed.size) for s in samples] == [
        ("a.jpg", b"", 5),
        ("b/c.png", b"", 7),
    ]
    assert [fetch(s) for s in samples] == [b"a.jpg", b"b/c.png"]
    fsspec.filesystem("memory").rm("/remote/a.jpg")
    with pytest.raises(StorageError, match="gone since it was listed"):
        fetch(samples[0])


# Any damage at all

BLOCK = 512  # bytes of a tar, whose headers have a sum
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
    before = originals(form, tmp_path)
    content = bytearray(before)
    damaged = range(int(at * len(content)), min(int(at * len(content)) + length, len(content)))
    for i in damaged:
        content[i] ^= 1 << bit
    if form == "tar":  # a header whose sum stays the same is another header, of a file with another name
        blocks = {i // BLOCK * BLOCK for i in damaged}
        assume(all(sum(content[b : b + BLOCK]) != sum(before[b : b + BLOCK]) for b in blocks))
    path = tmp_path / "x"
    path.write_bytes(content)
    got = told(samples_of(path, "parquet" if form == "parquet" else "webdataset"))
    if not any(isinstance(what, str) for _, what in got):
        assert [key for key, _ in got] == [key for key, _ in ORIGINAL] or form == "parquet"
        assert len(got) == len(ORIGINAL)
        if form == "tar.gz":
            assert got == ORIGINAL
        assert [len(what) for _, what in got] == [len(image) for _, image in ORIGINAL] or form == "parquet"
