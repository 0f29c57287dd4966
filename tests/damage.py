"""Sound small files of every kind, and edits that damage them: drawn by hypothesis, or made from a random seed."""

import gzip
import random
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pictures
import pyarrow as pa
import pyarrow.parquet as pq
from containers import tar_bytes
from hypothesis import strategies as st

KINDS = ("flip", "set", "zero", "insert", "drop", "cut", "duplicate", "splice")
LENGTHS = (1, 4, 16, 200, 2000)  # bytes that an edit changes at most
IMAGES = (
    *("jpeg_turned", "jpeg_progressive", "jpeg_cmyk", "png_palette_transparency", "png_grey16", "png_animated"),
    *("gif_animated", "webp", "webp_animated", "bmp", "tiff_turned", "tiff_lzw", "tiff_float", "avif", "jpeg2000"),
    *("ico", "ppm"),
)
Image = dict[str, bytes | str | None]


@dataclass(frozen=True)
class Edit:
    """`at` and `frm`: places as shares of the length, 0…1. `value`: the bytes to write, or how many to move."""

    kind: str
    at: float
    frm: float
    value: bytes


def damaged(content: bytes, edits: Sequence[Edit]) -> bytes:
    for edit in edits:
        at, frm, n = int(edit.at * len(content)), int(edit.frm * len(content)), len(edit.value)
        new, gone = {
            "flip": (bytes(a ^ b for a, b in zip(content[at : at + n], edit.value, strict=False)), n),
            "set": (edit.value, n),
            "zero": (bytes(n), n),
            "insert": (edit.value, 0),
            "drop": (b"", n),
            "cut": (b"", len(content)),
            "duplicate": (content[frm : frm + n], 0),
            "splice": (content[frm : frm + n], n),
        }[edit.kind]
        content = content[:at] + new + content[at + gone :]
    return content


_values = st.sampled_from(LENGTHS).flatmap(lambda n: st.binary(min_size=1, max_size=n))
_edit = st.builds(
    Edit, st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), _values
)
edits = st.lists(_edit, min_size=1, max_size=4)


def random_edits(chance: random.Random) -> list[Edit]:
    """One to four; half of them near one end, where headers and footers are."""

    def place() -> float:
        at = chance.random()
        return (at, at, at**4, 1 - (1 - at) ** 4)[chance.randrange(4)]

    def value() -> bytes:
        return chance.choice((chance.randbytes, bytes, b"\xff".__mul__))(chance.randint(1, chance.choice(LENGTHS)))

    return [Edit(chance.choice(KINDS), place(), place(), value()) for _ in range(chance.randint(1, 4))]


def with_tar_checksums(content: bytes) -> bytes:
    """Every block that says `ustar` gets the checksum of its bytes, so that damage reaches what comes behind it."""
    fixed = bytearray(content)
    at = fixed.find(b"ustar")
    while at >= 0:
        block = fixed[at - 257 : at + 255] if at >= 257 else b""
        if len(block) == 512:
            block[148:156] = b" " * 8
            fixed[at - 109 : at - 101] = b"%06o\0 " % sum(block)
        at = fixed.find(b"ustar", at + 1)
    return bytes(fixed)


def with_png_checksums(content: bytes) -> bytes:
    """Every chunk of a PNG gets the checksum of its bytes."""
    if not content.startswith(pictures.PNG_HEAD):
        return content
    fixed, at = bytearray(content), 8
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4], "big")
        fixed[end : end + 4] = zlib.crc32(fixed[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(fixed)


@cache
def tars() -> dict[str, bytes]:
    """Small tars of every dialect."""
    photo = pictures.jpeg(30, 20)
    members = [("a.jpg", photo), ("a.cls", b"3"), ("d/b.png", b"second"), ("c.json", b"{}"), ("d.webp", b"")]
    gnu, long = tar_bytes(members), tar_bytes([("x" * 300 + ".jpg", photo), *members])
    return {
        "gnu.tar": gnu,
        "long_names.tar": long,
        "pax.tar": tar_bytes([("ü" * 200 + ".jpg", photo), *members], tarfile.PAX_FORMAT),
        "global.tar": global_header({"comment": "made for tests"}) + gnu,
        "sparse.tar": sparse_member("s.jpg", b"d" * 512, 1024) + gnu,
        "pax_sparse.tar": pax_sparse_member("s.jpg", b"1\n1024\n512\n", b"d" * 512, 1536) + gnu,
        "v7.tar": as_v7(gnu),
        "packed.tar.gz": gzip.compress(gnu, mtime=0),
        "parts.tar.gz": gzip.compress(gnu[:1000], mtime=0) + gzip.compress(gnu[1000:], mtime=0),
    }


def with_checksum(header: bytes | bytearray) -> bytes:
    """A tar header of 512 bytes, its checksum set."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def as_v7(content: bytes) -> bytes:
    """The same tar as Unix Version 7 wrote it: no magic, no prefix, type 0 for a file."""
    blocks = [content[at : at + 512] for at in range(0, len(content), 512)]
    return b"".join(
        with_checksum(block[:156] + b"\0" + block[157:257] + bytes(255)) if block[257:262] == b"ustar" else block
        for block in blocks
    )


def sparse_member(name: str, data: bytes, hole_bytes: int, claimed_bytes: int | None = None) -> bytes:
    """GNU's old form: a hole, then `data`; `claimed_bytes` is what the header says that the whole is."""
    header = bytearray(tar_bytes([(name, data)])[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (hole_bytes, len(data))
    number: bytes = tarfile.itn(claimed_bytes or hole_bytes + len(data), 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    header[483:495] = number
    return with_checksum(header) + data + bytes(-len(data) % 512)


def pax_sparse_member(name: str, blocks: bytes, data: bytes, size: int) -> bytes:
    """The newer form, 1.0: the map of `blocks` (count, then offset and length of each, a line a number) in the data."""
    info = tarfile.TarInfo(name)
    content = blocks + bytes(-len(blocks) % 512) + data
    info.size = len(content)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def global_header(values: dict[str, str]) -> bytes:
    """A pax header that holds for all members behind it."""
    return tarfile.TarInfo.create_pax_global_header(values)


@cache
def tables() -> dict[str, bytes]:
    """Small Parquet files: plain and struct images, addresses, several row groups, with and without checksums."""
    photo = pictures.jpeg(30, 20)
    images: list[bytes | None] = [photo, b"second", None, b"", b"x" * 300, photo]
    struct = pa.array(
        [None if i is None else {"bytes": i, "path": f"{n}.jpg"} for n, i in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    keys, labels = pa.array(["a", "b", None, "a", "", "ü"]), pa.array([1, None, 3, 2**40, 5, 6])
    plain = pa.table({"image": pa.array(images, pa.binary()), "key": keys, "label": labels})
    return {
        "plain.parquet": _table(plain, use_dictionary=False, compression="none", row_group_size=2),
        "summed.parquet": _table(plain, use_dictionary=False, write_page_checksum=True, compression="zstd"),
        "struct.parquet": _table(pa.table({"image": struct, "id": keys}), row_group_size=4),
        "addresses.parquet": _table(pa.table({"url": ["a.jpg", "s3://b/c.jpg", None], "n": [1, 2, 3]})),
        "other.parquet": _table(pa.table({"text": ["a", "b"], "deep": [[{"x": b"1"}], []]})),
        "small.parquet": _table(pa.table({"image": [b"1"]}), compression="none", store_schema=False),
    }


def _table(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())
