"""A tar, plain or gzipped, as a stream of members that also says how it ended.

Python's `tarfile` takes a cut header, garbage and a gzip stream that stops for the end of the archive; a shard read
that way loses its samples without a word. Here only the zero block is an end. Whatever else stops the stream is
raised as a `Reject` (`empty`, `truncated` or `corrupt`) after every whole member before it has been given.
Errors of the store below pass through as they are.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tarfile import (  # type: ignore[attr-defined]  # old names of tarfile's, unknown to the stubs
    EmptyHeaderError,
    EOFHeaderError,
    HeaderError,
    InvalidHeaderError,
    TruncatedHeaderError,
)
from typing import BinaryIO, cast

from pipeline.errors import Reject

BLOCK_BYTES = 512  # tar's own unit
READ_BYTES = 2**20  # one read of the stream below
PACKED_BYTES = 2**16  # one step of gunzip; a copy of its state (40 kB) is kept for each
HEADER_MAX_BYTES = 2**20  # of a long name or a pax header, which tarfile would read whole, however large it says it is
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
GZIP_MAGIC = b"\x1f\x8b"
# What tarfile's parsing of sizes, sparse maps and character sets raises on damage, beside its own errors.
PARSING = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)


@dataclass(frozen=True, slots=True)
class Member:
    """`kind`: file, link, folder or other. `size`: bytes, as the header says. `read` goes only before the next."""

    name: str
    kind: str
    size: int
    link: str
    read: Callable[[], bytes]


def read_members(raw: BinaryIO) -> Iterator[Member]:
    """All members in order. Raises `Reject` at the byte where the archive is damaged or ends without its mark."""
    source = _Source(raw)
    ended: list[HeaderError] = []
    with _naming_damage(source, ended):
        # "r|": forward only, and of `fileobj` only `read` is used.
        file, header = cast(BinaryIO, source), _noting(ended)
        tar = tarfile.open(fileobj=file, mode="r|", bufsize=READ_BYTES, tarinfo=header, encoding="utf-8")  # noqa: SIM115
    while True:
        with _naming_damage(source, ended):
            info = tar.next()
            if info is None:
                break
        tar.members.clear()  # type: ignore[attr-defined]  # else 10^5 members stay in memory

        def read(info: tarfile.TarInfo = info) -> bytes:
            with _naming_damage(source, ended, info.name):
                content = tar.extractfile(info)
                return content.read() if content else b""

        yield Member(info.name, _kind(info), info.size, info.linkname, read)
    if not isinstance(ended[0], EOFHeaderError):
        raise _damage(source, ended, None, None)
    _look_behind(tar)


def _kind(info: tarfile.TarInfo) -> str:
    if info.isreg():
        return "file"
    return "link" if info.islnk() or info.issym() else "folder" if info.isdir() else "other"


def _noting(ended: list[HeaderError]) -> type[tarfile.TarInfo]:
    """A `TarInfo` that notes which header ended the archive: `tarfile` itself swallows it."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
            header = super().frombuf(buf, encoding, errors)
            if header.size < 0 or (header.type in EXTENSIONS and header.size > HEADER_MAX_BYTES):
                raise InvalidHeaderError(f"a header of {header.size} bytes")
            return header

        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
            try:
                return super().fromtarfile(tar)
            except HeaderError as e:
                ended.append(e)
                raise

    return Header


@contextmanager
def _naming_damage(source: "_Source", ended: list[HeaderError], name: str | None = None) -> Iterator[None]:
    try:
        yield
    except PARSING as e:
        raise _damage(source, ended, e, name) from e


def _damage(source: "_Source", ended: list[HeaderError], e: BaseException | None, name: str | None) -> Reject:
    at = f"byte {source.given}" + (" of the unpacked tar" if source.is_gzip else "")
    if source.given == 0:
        return Reject("empty", "read", "the file holds no bytes, not even a tar's end mark")
    inside = f" inside {name!r}" if name else ""
    first = ended[0] if ended else None  # the innermost: tarfile wraps what goes wrong behind a pax header
    is_cut = isinstance(first, EmptyHeaderError | TruncatedHeaderError)
    is_cut = is_cut or (first is None and isinstance(e, tarfile.ReadError))
    # Shorter than one header and without its zero padding: some other kind of small file.
    if is_cut and (source.given >= BLOCK_BYTES or b"\0" in source.head):
        return Reject("truncated", "read", f"the tar ends at {at}{inside} without its end mark: later samples lost")
    if isinstance(first, InvalidHeaderError | TruncatedHeaderError) and not _is_header(source.head):
        return Reject("corrupt", "read", f"this is no tar: it begins with {source.head[:16]!r}")
    return Reject("corrupt", "read", f"damaged tar header before {at}{inside} ({first or e}): later samples lost")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except PARSING:
        return False
    return True


def _look_behind(tar: tarfile.TarFile) -> None:
    """Reads what follows the end mark: gzip's checksum; a second tar, joined with `cat`; what lies behind a hole.

    Zeros and garbage are nobody's samples; members are refused, since they would be lost in silence.
    """
    stream = tar.fileobj
    assert stream is not None
    while block := stream.read(BLOCK_BYTES):
        if block.strip(b"\0") and _is_header(block):
            raise Reject("corrupt", "read", "members follow behind the tar's end mark: their samples are not read")


class _Source:
    """`read` over a tar's bytes, unpacked where they are gzipped; gzip of several parts (bgzip, `cat`) goes too.

    Raises `Reject` where the gzip stream is damaged or cut, after all that unpacks before that byte has been given.
    """

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._held = raw.read(len(GZIP_MAGIC))
        if len(self._held) == 1:  # a raw stream may give less than it was asked for
            self._held += raw.read(1)
        self.is_gzip = self._held == GZIP_MAGIC
        self._gunzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._broken: Reject | None = None
        self.head, self.given = b"", 0

    def read(self, count: int) -> bytes:
        """At most `count` bytes, none only at the end."""
        data = self._unpack(count) if self.is_gzip else self._take(count)
        if len(self.head) < BLOCK_BYTES:
            self.head += data[: BLOCK_BYTES - len(self.head)]
        self.given += len(data)
        return data

    def _take(self, count: int) -> bytes:
        held, self._held = self._held, b""
        return held or self._raw.read(count)

    def _unpack(self, count: int) -> bytes:
        while self._broken is None:
            packed = self._gunzip.unconsumed_tail
            if self._gunzip.eof:
                packed = self._gunzip.unused_data.lstrip(b"\0") or self._take(PACKED_BYTES).lstrip(b"\0")
                packed += self._take(1) if len(packed) == 1 else b""
                if not packed.startswith(GZIP_MAGIC):
                    return b""  # padding or garbage behind the last part, as gzip itself takes it
                self._gunzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            packed = packed or self._take(PACKED_BYTES)
            before = self._gunzip.copy()
            try:
                data = self._gunzip.decompress(packed, count)
            except zlib.error as e:
                data = self._unpack_to_damage(before, packed, e)
            if data:
                return data
            if not packed and not self._gunzip.eof:
                lost = f"the gzip stream ends too early, at byte {self.given} of the unpacked tar: later samples lost"
                self._broken = self._broken or Reject("truncated", "read", lost)
        raise self._broken

    def _unpack_to_damage(self, gunzip: "zlib._Decompress", packed: bytes, error: zlib.error) -> bytes:
        # zlib drops what it had unpacked when it raises: give it the same bytes again, one by one.
        data = b""
        try:
            for i in range(len(packed)):
                data += gunzip.decompress(packed[i : i + 1])
        except zlib.error:
            pass
        at = self.given + len(data)
        message = f"damaged gzip stream at byte {at} of the unpacked tar ({error}): later samples lost"
        self._broken = Reject("corrupt", "read", message)
        return data
