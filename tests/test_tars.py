"""The promises of pipeline/tars.py: every whole member of a tar once, as a stream, and damage said where it begins."""

import gzip
import os
import random
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from containers import growth, samples_of, shard_of, tar_bytes, tar_of, told
from damage import as_v7, global_header, pax_sparse_member, sparse_member, with_checksum

from pipeline.shards import read_samples


def test_sparse_members_are_read_whole(tmp_path: Path) -> None:
    """GNU tar stores files with holes so; their real size is what counts."""
    whole, behind = bytes(1024) + b"d" * 512, tar_bytes([("b.jpg", b"b")])
    for member in (
        sparse_member("a.jpg", b"d" * 512, 1024),
        pax_sparse_member("a.jpg", b"1\n1024\n512\n", b"d" * 512, 1536),
    ):
        assert tar_of(tmp_path, member + behind) == [("a", whole), ("b", b"b")]
    terabytes = sparse_member("a.jpg", b"d" * 512, 1024, claimed_bytes=5 * 2**40)
    assert tar_of(tmp_path, terabytes + behind) == [("a", "too_large"), ("b", b"b")]


def test_old_and_odd_tars_are_read(tmp_path: Path) -> None:
    """Those of Unix Version 7; a tar in a tar is no image; global headers are taken as they come."""
    members = [("a.jpg", b"1" * 700), ("b.jpg", b"2")]
    plain = tar_bytes(members)
    expected = [("a", b"1" * 700), ("b", b"2")]
    assert tar_of(tmp_path, as_v7(plain)) == expected
    assert tar_of(tmp_path, global_header({"comment": "x" * 2000}) * 100 + plain) == expected
    nested = tar_bytes([("inner.tar", plain), *members])
    assert tar_of(tmp_path, nested) == [("inner", "missing_image"), *expected]


def packed_member(name: str, part: bytes, times: int) -> bytes:
    """Gzip of a member that is `part` again and again, and the end of the tar; nothing of that size is made here."""
    info = tarfile.TarInfo(name)
    info.size = len(part) * times
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(part) * times


def test_a_gigabyte_of_zeros_in_gzip_is_passed_by(tmp_path: Path) -> None:
    """1.2 MB that unpack to a member of 1 GiB: too large, in a few megabytes, and the next image comes."""
    content = packed_member("big.jpg", bytes(2**24), 64) + gzip.compress(tar_bytes({"b.jpg": b"b"}))
    (tmp_path / "x.tar").write_bytes(content)
    with growth() as taken:
        samples = list(read_samples(shard_of(tmp_path / "x.tar", "webdataset")))
    assert told(samples) == [("big", "too_large"), ("b", b"b")]
    assert taken.peak_bytes < 40e6


@pytest.mark.parametrize("kind", ["chained", "global", "sparse"])
def test_headers_without_end_are_cut_off(kind: str, tmp_path: Path) -> None:
    """A megabyte a member is what all its headers may take together: neither memory nor minutes go into more.

    300 pax headers before one member; global ones that are all kept; a sparse file's map of 64 MB.
    """
    if kind == "sparse":
        info = tarfile.TarInfo("a.jpg")
        info.size = 64 * 2**20
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        lines = b"1000000000\n" + b"1\n" * (2**23 - 6) + b"\n"
        bomb = gzip.compress(info.tobuf(tarfile.PAX_FORMAT)) + gzip.compress(lines) + gzip.compress(b"1\n" * 2**19) * 48
    else:
        bomb = b"".join(gzip.compress(pax_block(f"k{n}", 400_000, kind == "global"), 1) for n in range(300))
    (tmp_path / "x.tar").write_bytes(gzip.compress(tar_bytes({"first.jpg": b"1"})[:1024]) + bomb)
    shard = shard_of(tmp_path / "x.tar", "webdataset")
    started = time.perf_counter()
    with growth() as taken:
        samples = list(read_samples(shard))
    assert told(samples) == [("first", b"1"), ("#end", "corrupt")]
    assert samples[1].reject and "of over 1048576 bytes" in samples[1].reject.message
    assert taken.peak_bytes < 60e6 and time.perf_counter() - started < 10


def pax_block(key: str, size: int, is_global: bool) -> bytes:
    """A pax header with one long value."""
    record = f" {key}={'v' * size}\n".encode()
    record = b"%d" % (len(record) + len(str(len(record)))) + record
    info = tarfile.TarInfo("header")
    info.type, info.size = (tarfile.XGLTYPE if is_global else tarfile.XHDTYPE), len(record)
    return info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)


def test_a_size_beyond_any_disk_is_a_reject(tmp_path: Path) -> None:
    """Local file systems refuse to seek there with an error that looks like the store's."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 2**62
    content = tar_bytes({"a.jpg": b"a"})[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    assert tar_of(tmp_path, content) == [("a", b"a"), ("big", "too_large"), ("#end", "truncated")]


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
        assert tar_of(tmp_path, tar_bytes(FIVE)[: 1536 * 5] + with_checksum(header)) == [*WHOLE, ("#end", "corrupt")]


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
