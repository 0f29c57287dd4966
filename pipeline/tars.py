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
READ_BYTES = 2**20  # one read of the stream below, however large a header says its member is
PACKED_BYTES = 2**16  # one step of gunzip; a copy of its state (40 kB) is kept for each
# Of all headers before one member (long names, pax, a sparse file's map), and of the global ones: tarfile reads them
# whole, however large they say they are, and takes 44 s and 20 times their bytes for 64 MB of "1\n" as a map.
HEADER_MAX_BYTES = 2**20
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
USTAR, USTAR_AT = b"ustar", 257  # what a header says of itself, and where
GZIP_MAGIC = b"\x1f\x8b"
# What tarfile's parsing of sizes, sparse maps and character sets raises on damage, beside its own errors.
PARSING = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)


@dataclass(frozen=True, slots=True)
class Member:
    """`kind`: file, link, folder or other. `size`: bytes, as the header says."""

    name: str
    kind: str
    size: int
    link: str
    read: Callable[[], bytes]  # only before the next member; raises `Reject` where the tar is cut within
    check: Callable[[], None]  # the same without the bytes


def read_members(raw: BinaryIO) -> Iterator[Member]:
    """All members in order. Raises `Reject` at the byte where the archive is damaged or ends without its mark."""
    source = _Source(raw)
    ended: list[HeaderError] = []
    with _naming_damage(source, ended), source.reading_headers():  # of the first member
        # Not `tarfile.open(mode="r|")`: it copies the rest of its buffer at each read, 11 of 14 us a member.
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, source), tarinfo=_noting(ended), encoding="utf-8")
    while not ended:  # the first header may have ended it: tarfile would go on behind
        with _naming_damage(source, ended), source.reading_headers():
            info = tar.next()
        if info is None:
            break
        tar.members.clear()  # type: ignore[attr-defined]  # else 10^5 members stay in memory

        def read(info: tarfile.TarInfo = info) -> bytes:
            with _naming_damage(source, ended, info.name):
                if info.issparse():
                    content = tar.extractfile(info)
                    return content.read() if content else b""
                source.seek(info.offset_data)
                return source.read_all(info.size)

        def check(info: tarfile.TarInfo = info) -> None:
            with _naming_damage(source, ended, info.name):
                if info.issparse():
                    read(info)
                elif info.size:
                    source.seek(info.offset_data + info.size - 1)
                    source.read_all(1)

        yield Member(info.name, _kind(info), info.size, info.linkname, read, check)
    if not isinstance(ended[0], EOFHeaderError):
        raise _damage(source, ended, None, None)
    _look_behind(source)


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
                if sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > HEADER_MAX_BYTES:
                    raise InvalidHeaderError(f"global headers of over {HEADER_MAX_BYTES} bytes")
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
    at = f"byte {source.end()}" + (" of the unpacked tar" if source.is_gzip else "")
    if source.at == 0:
        return Reject("empty", "read", "the file holds no bytes, not even a tar's end mark")
    inside = f" inside {name!r}" if name else ""
    first = ended[0] if ended else None  # the innermost: tarfile wraps what goes wrong behind a pax header
    is_cut = isinstance(first, EmptyHeaderError | TruncatedHeaderError)
    is_cut = is_cut or (first is None and isinstance(e, tarfile.ReadError))
    # Shorter than one header and without its zero padding: some other kind of small file.
    if is_cut and (source.at >= BLOCK_BYTES or b"\0" in source.head):
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


def _look_behind(source: "_Source") -> None:
    """Reads what follows the end mark: gzip's checksum; a second tar, joined with `cat`; what lies behind a hole.

    Zeros and garbage are nobody's samples; members are refused, since they would be lost in silence.
    """
    window = b""
    while data := source.read(READ_BYTES):
        window = window[1 - BLOCK_BYTES :] + data
        at = window.find(USTAR, USTAR_AT)
        while at >= 0:
            if _is_header(window[at - USTAR_AT : at - USTAR_AT + BLOCK_BYTES]):
                raise Reject("corrupt", "read", "members follow behind the tar's end mark: their samples are not read")
            at = window.find(USTAR, at + 1)


class _Source:
    """A tar's bytes for `tarfile`, forward only; unpacked where they are gzipped, in one part or several.

    Raises `Reject` where the gzip stream is damaged or cut, after all that unpacks before that byte has been given.
    """

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self.is_gzip = raw.read(1) + raw.read(1) == GZIP_MAGIC  # a raw stream may give less than it was asked for
        self._size = raw.seek(0, 2)
        raw.seek(0)
        self._allowance: int | None = None  # bytes that may still be read for the headers of one member
        self._gunzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._broken: Reject | None = None
        self._rest = memoryview(b"")  # unpacked and not given yet
        self.head, self.at = b"", 0

    def tell(self) -> int:
        return self.at

    def end(self) -> int:
        """Where the bytes end, as far as is known."""
        return self.at if self.is_gzip else min(self.at, self._size)

    @contextmanager
    def reading_headers(self) -> Iterator[None]:
        self._allowance = HEADER_MAX_BYTES + 2 * BLOCK_BYTES  # the header's own block, the byte before it
        try:
            yield
        finally:
            self._allowance = None

    def seek(self, to: int) -> None:
        if to < self.at:
            raise tarfile.StreamError("a member that begins before the end of the last one")
        if self.is_gzip:
            while self.at < to and self._take(min(to - self.at, READ_BYTES)):
                pass
        elif to > self.at:
            self._raw.seek(min(to, self._size))  # beyond 2**44 bytes a local file system refuses with an OSError
        self.at = to

    def read(self, count: int) -> bytes:
        """`count` bytes, fewer only at the end."""
        if self._allowance is not None:
            self._allowance -= count
            if self._allowance < 0:
                raise InvalidHeaderError(f"headers of over {HEADER_MAX_BYTES} bytes before one member")
        return self._take(count)

    def _take(self, count: int) -> bytes:
        take, parts, wanted = self._unpack if self.is_gzip else self._raw.read, list[bytes](), count
        while wanted > 0 and (part := take(min(wanted, READ_BYTES))):
            parts.append(part)
            wanted -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.at == 0:
            self.head = data[:BLOCK_BYTES]
        self.at += len(data)
        return data

    def read_all(self, count: int) -> bytes:
        data = self.read(count)
        if len(data) < count:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _unpack(self, count: int) -> bytes:
        """At most `count` bytes; none only at the end."""
        if not self._rest:
            self._rest = memoryview(self._gunzip_some())
        data, self._rest = self._rest[:count], self._rest[count:]
        return bytes(data)

    def _gunzip_some(self) -> bytes:
        while self._broken is None:
            packed = self._gunzip.unconsumed_tail
            if self._gunzip.eof:
                packed = self._gunzip.unused_data.lstrip(b"\0") or self._raw.read(PACKED_BYTES).lstrip(b"\0")
                packed += self._raw.read(1) if len(packed) == 1 else b""
                if not packed.startswith(GZIP_MAGIC):
                    return b""  # padding or garbage behind the last part, as gzip itself takes it
                self._gunzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            packed = packed or self._raw.read(PACKED_BYTES)
            before = self._gunzip.copy()
            try:
                data = self._gunzip.decompress(packed, READ_BYTES)
            except zlib.error as e:
                data = self._unpack_to_damage(before, packed, e)
            if data:
                return data
            if not packed and not self._gunzip.eof:
                lost = f"the gzip stream ends too early, at byte {self.at} of the unpacked tar: later samples lost"
                self._broken = self._broken or Reject("truncated", "read", lost)
        raise self._broken

    def _unpack_to_damage(self, gunzip: "zlib._Decompress", packed: bytes, error: zlib.error) -> bytes:
        # zlib drops what it had unpacked when it raises: give it the same bytes again, one by one.
        data = bytearray()
        try:
            for i in range(len(packed)):
                data += gunzip.decompress(packed[i : i + 1])
        except zlib.error:
            pass
        at = self.at + len(data)
        message = f"damaged gzip stream at byte {at} of the unpacked tar ({error}): later samples lost"
        self._broken = Reject("corrupt", "read", message)
        return bytes(data)
