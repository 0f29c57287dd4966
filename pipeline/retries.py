"""Asking a store until it answers: which failures may pass, for how long, and reads that go on where one met them.

Local errors come at once, the store's after bounded retries: `FileNotFoundError`, `PermissionError` or
`FileExistsError` where it says so, else `StorageError`. Every message is one line that shows no password and no query.
"""

import errno
import io
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import fsspec
import stamina
from aiohttp.http_exceptions import HttpProcessingError
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError

READ_BLOCK_BYTES = 16 * 2**20  # one range request: long enough to hide its latency, small beside the images under way
PROGRESS_BYTES = 2**16  # an answer that broke off behind so many was no failed attempt: the next one goes on from there
ATTEMPTS = 16  # and no new one GIVE_UP_S after the first failure: a store that is away for a minute costs no shard
WAIT_S, JITTER_S, WAIT_MAX_S, GIVE_UP_S = 0.2, 0.3, 10.0, 90.0
MESSAGE_CHARS = 300  # of a client's message; botocore's longest recite their regular expressions
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL}
# What the clients behind fsspec raise when they do not turn a failure into an OSError themselves.
CLIENT_MODULES = {"aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "requests", "urllib3"}
FINAL_CLIENT_ERRORS = re.compile("Credential|Token|Auth|Signing|Profile|Region|ParamValidation|InvalidU(RL|rl)")
# S3's words for what passes though its status says otherwise: bytes of ours that were lost or altered on their way, and
# the end of an upload in parts that has ended already, its answer lost: a new upload then finds the object.
PASSING = {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload"}
BY_STATUS = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError, 412: FileExistsError}

T = TypeVar("T")


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def redact(url: str) -> str:
    """The URL without user, password and query: what may be shown in messages and stored in files."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme.lower() == "file":
        return url
    # In a bucket `?` and `#` may belong to a key or a pattern.
    rest = re.sub(r"[?#].*" if scheme.lower().startswith("http") else r"\?[^/?]*=.*", "", rest)
    host, slash, path = rest.partition("/")
    if re.search(r":(?!\d*$)", host.rpartition("]")[2]) and "@" in path:  # a password with a slash in it
        host, slash, path = rest.rpartition("@")[2].partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path


def redact_all(text: str) -> str:
    """The text, each URL in it redacted."""
    return re.sub(r"[A-Za-z0-9+]+://[^\s'\"<>]+", lambda url: redact(url[0]), text)


def said(e: Exception) -> str:
    """What an error says, in one line and without what its URLs carry beyond the path."""
    sentence = str(e).partition("\nRequestId:")[0]  # Azure's client appends the whole answer, XML and all
    text = " ".join(sentence.split()) or type(e).__name__
    text = redact_all(text)
    return text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + "…"


def retrying(
    fs: fsspec.AbstractFileSystem, verb: str, url: str, call: Callable[[], T], give_up_s: float = GIVE_UP_S
) -> T:
    """`call()` until it works: bounded in attempts and time, and only for what may pass. Local files: once."""
    failed_at: float | None = None

    def is_tried_again(e: Exception) -> bool:
        nonlocal failed_at
        failed_at = failed_at or time.monotonic()  # not the start: an upload of minutes that fails is worth another
        return _may_pass(e) and time.monotonic() - failed_at <= give_up_s

    try:
        if is_local(fs):
            return call()
        for attempt in stamina.retry_context(
            on=is_tried_again,
            attempts=ATTEMPTS,
            timeout=None,
            wait_initial=WAIT_S,
            wait_jitter=JITTER_S,
            wait_max=WAIT_MAX_S,
        ):
            with attempt:
                return call()
        raise AssertionError("unreachable: the last attempt raises")
    except Exception as e:
        if is_local(fs) and (isinstance(e, FINAL) or not isinstance(e, OSError)):
            raise
        if not (isinstance(e, OSError | EOFError | ValueError) or _is_client_error(e)):
            raise
        raise _kind(e)(f"could not {verb} {redact(url)}: {_what(e)}") from e


def _may_pass(e: Exception) -> bool:
    e = _told(e)
    if _code(e) in PASSING:
        return True
    if isinstance(e, FINAL):
        return False
    if isinstance(e, TimeoutError | ConnectionError):
        return True
    status = _status(e)
    if status is not None:  # 409: S3's answer to a put that meets another one under way
        return (status >= 500 and status != 501) or status in (408, 409, 425, 429)
    if isinstance(e, OSError):
        return e.errno not in FINAL_ERRNOS
    return isinstance(e, EOFError) or (_is_client_error(e) and not FINAL_CLIENT_ERRORS.search(type(e).__name__))


def _kind(e: Exception) -> type[Exception]:
    e = _told(e)
    # SeaweedFS words its 412 otherwise than AWS: s3fs makes an EINVAL of it.
    by_status = BY_STATUS.get(_status(e) or 0, StorageError)
    return next((kind for kind in FINAL if isinstance(e, kind)), by_status)


def _told(e: Exception) -> Exception:
    """fsspec's HTTP says "not found" whatever went wrong; its cause knows better."""
    cause = e.__cause__
    if isinstance(e, FileNotFoundError) and isinstance(cause, Exception) and _is_client_error(cause):
        return e if _status(cause) == 404 else cause
    return e


def _what(e: Exception) -> str:
    e = _told(e)
    if isinstance(e, FileNotFoundError):  # the clients give a bare path, or a sentence such as "no such bucket"
        return said(e) if _status(e) and " " in str(e) and e.strerror != os.strerror(errno.ENOENT) else "not found"
    text = said(e)
    # A HEAD request's answer has no words of its own, and Azure's says "Incorrect padding" of a key that is none.
    if (_kind(e) is PermissionError and " " not in text) or "Signing" in type(e).__name__:
        return f"{text}: check the credentials and what they allow"
    return text if isinstance(e, OSError) and " " in text else f"{type(e).__name__}: {text}"


def _status(e: Exception) -> int | None:
    """The HTTP status behind an error, where there is one."""
    if isinstance(e.__cause__, HttpProcessingError):  # a body that was cut: its `code` 400 is no server's answer
        return None
    if str(e).startswith("Forbidden: "):  # gcsfs gives a bare OSError
        return 403
    for error in (e, e.__cause__):
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):  # botocore's
            return cast(int | None, answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for name in ("status", "status_code", "code"):
            status = getattr(error, name, None) or getattr(answer, name, None)
            if isinstance(status, int):
                return status
    return None


def _code(e: Exception) -> str:
    """S3's word for an error, where there is one."""
    answer = getattr(e.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def _is_client_error(e: Exception) -> bool:
    return type(e).__module__.partition(".")[0] in CLIENT_MODULES


class Piece:
    """Bytes of one object as they come, from `start` on: each answer goes on where the last one broke off.

    `size`: of the whole object, None until the store tells it. Raises `StorageError` as soon as an answer is of another
    size or has another etag than the one before: bytes of two objects never meet.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, start: int, size: int | None, mark: str = ""):
        self.fs, self.path, self.start, self.size, self.mark = fs, path, start, size, mark
        self.url = path if is_local(fs) else str(fs.unstrip_protocol(path))
        self.data = bytearray()
        self._is_range = True  # the answer under way is of what was asked for, not of the whole object

    @property
    def at(self) -> int:
        return self.start + len(self.data)

    def fill(self, end: int | None) -> None:
        """Until the byte before `end`, or the object's last; all of it where the store knows no ranges."""
        is_full = False
        while not is_full:
            is_full = retrying(self.fs, "read", self.url, lambda: self._ask(end))

    def _ask(self, end: int | None) -> bool:
        """One request; False where its answer was cut, but late enough to ask for the rest at once."""
        begun, end = self.at, self.size if end is None else end
        try:
            if hasattr(self.fs, "_call_s3"):
                sync(self.fs.loop, self._from_s3, end)
            elif isinstance(self.fs, HTTPFileSystem):
                sync(self.fs.loop, self._from_web, end)
            else:
                self._from_client(end)
        except Exception as e:
            if _status(e) == 416:
                raise self._changed() from e
            # A stall has cost its timeout: it counts.
            if isinstance(e, TimeoutError) or not self._has_progressed(begun) or not _may_pass(e):
                raise
            return False
        wanted = self.size if end is None else end
        if wanted is not None and self.at < wanted:
            if self._has_progressed(begun):
                return False
            raise OSError(errno.EIO, f"bytes {begun}-{wanted}: the store gave {self.at - begun} of {wanted - begun}")
        self.size = self.at if self.size is None else self.size
        return True

    def _has_progressed(self, begun: int) -> bool:
        return self._is_range and self.at - begun >= PROGRESS_BYTES

    async def _from_s3(self, end: int | None) -> None:
        # s3fs' own `cat_file` shows no etag, drops what came of a cut answer, asks for the size first where the whole
        # is wanted, and fills 50 MiB pieces that came short with zeros.
        bucket, key, version = self.fs.split_path(self.path)
        named = {"VersionId": version} if version else {}
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **self._range(end), **named)
        async with answer["Body"] as body:
            self._begin(answer.get("ContentRange"), answer.get("ContentLength"), answer.get("ETag"))
            while chunk := await body.read(PROGRESS_BYTES):
                self.data += chunk

    async def _from_web(self, end: int | None) -> None:
        session = await self.fs.set_session()
        headers = self.fs.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"} | self._range(end)
        async with session.get(self.fs.encode_url(self.path), **(self.fs.kwargs | {"headers": headers})) as answer:
            self.fs._raise_not_found_for_status(answer, self.path)
            length = None if answer.headers.get("Content-Encoding") else answer.content_length
            content_range = answer.headers.get("Content-Range") if answer.status == 206 else None
            self._begin(content_range, length, answer.headers.get("ETag"))
            async for chunk in answer.content.iter_any():
                self.data += chunk

    def _from_client(self, end: int | None) -> None:
        if end is None:
            self.data[:] = self.fs.cat_file(self.path)
            return
        data = self.fs.cat_file(self.path, start=self.at, end=end)
        if len(data) == self.size:
            self.start, self.data = 0, bytearray(data)
        elif len(data) == end - self.at:
            self.data += data
        else:
            raise OSError(errno.EIO, f"bytes {self.at}-{end}: the store gave {len(data)} of {end - self.at}")

    def _range(self, end: int | None) -> dict[str, str]:
        return {} if end is None else {"Range": f"bytes={self.at}-{end - 1}"}

    def _begin(self, content_range: str | None, length: int | None, mark: str | None) -> None:
        """What an answer's head promises. One without a range is the whole object, from its first byte."""
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range or "")
        self._is_range = told is not None
        size = length if told is None else None if told[2] == "*" else int(told[2])
        if size is not None and size != (self.size if self.size is not None else size):
            raise self._changed(f" ({size} bytes, not {self.size})")
        if mark and self.mark and mark != self.mark:
            raise self._changed()
        self.size, self.mark = self.size if size is None else size, mark or self.mark
        if told and int(told[1]) != self.at:
            raise OSError(errno.EIO, f"byte {self.at} was asked for, the store began at {told[1]}")
        if not told:
            self.start = 0
            self.data.clear()

    def _changed(self, how: str = "") -> StorageError:
        return StorageError(f"{redact(self.url)} changed while it was read{how}: run again")


def read_whole(fs: fsspec.AbstractFileSystem, path: str) -> tuple[bytes, str]:
    """The object, as it was at one moment, and the etag that came with it. Raises as `retrying` does."""
    if is_local(fs):
        return retrying(fs, "read", path, lambda: cast(bytes, fs.cat_file(path))), ""
    piece = Piece(fs, path, 0, None)
    piece.fill(None)
    return bytes(piece.data), piece.mark


class RangeReader(io.RawIOBase):
    """An object as a seekable stream of range requests; a cut answer is gone on with at the byte where it was cut.

    A read gives all that was asked for, up to the end, as a local file does; of S3 and web servers with etags, all of
    one object, or `StorageError`. `size`: in bytes; the object is never read beyond it.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int, block_bytes: int = READ_BLOCK_BYTES):
        self._fs, self._path, self._size, self._block_bytes = fs, path, size, block_bytes
        self._at = self._start = 0
        self._buffer = memoryview(b"")
        self._mark = ""  # the etag that the first answer came with

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END) or (whence == io.SEEK_SET and offset < 0):
            raise ValueError(f"cannot seek to {offset}, whence {whence}")
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._at)) or b""

    def readinto(self, target: Any) -> int:
        if self.closed:
            raise ValueError("read from a closed file")
        view = memoryview(target).cast("B")
        wanted, done = min(len(view), self._size - self._at), 0
        while done < wanted:
            if not self._start <= self._at < self._start + len(self._buffer):
                self._fetch(self._at, max(self._block_bytes, min(wanted - done, READ_BLOCK_BYTES)))
            begin = self._at - self._start
            part = self._buffer[begin : begin + wanted - done]
            view[done : done + len(part)] = part
            done, self._at = done + len(part), self._at + len(part)
        return done

    def _fetch(self, start: int, count: int) -> None:
        piece = Piece(self._fs, self._path, start, self._size, self._mark)
        piece.fill(min(start + count, self._size))
        self._start, self._buffer, self._mark = piece.start, memoryview(piece.data), piece.mark
