"""Asking a store until it answers: which failures may pass, for how long, and a stream that resumes where one met it.

Local errors come at once, the store's after bounded retries: `FileNotFoundError`, `PermissionError` or
`FileExistsError` where it says so, else `StorageError`. Every message is one line that shows no password and no query.
"""

import errno
import io
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import fsspec
import stamina
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError

READ_BLOCK_BYTES = 16 * 2**20  # one range request: long enough to hide its latency, small beside the images under way
ATTEMPTS = 16  # and no new one after GIVE_UP_S: a store that is away for a minute costs no shard
WAIT_S, WAIT_MAX_S, GIVE_UP_S = 0.2, 10.0, 90.0
MESSAGE_CHARS = 300  # of a client's message; botocore's longest recite their regular expressions
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL}
# What the clients behind fsspec raise when they do not turn a failure into an OSError themselves.
CLIENT_MODULES = {"aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "requests", "urllib3"}
FINAL_CLIENT_ERRORS = re.compile("Credential|Token|Auth|Profile|Region|ParamValidation|InvalidU(RL|rl)")
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


def said(e: Exception) -> str:
    """What an error says, in one line and without what its URLs carry beyond the path."""
    text = " ".join(str(e).split()) or type(e).__name__
    text = re.sub(r"[A-Za-z0-9+]+://[^\s'\"<>]+", lambda url: redact(url[0]), text)
    return text if len(text) <= MESSAGE_CHARS else text[:MESSAGE_CHARS] + "…"


def retrying(
    fs: fsspec.AbstractFileSystem, verb: str, url: str, call: Callable[[], T], give_up_s: float = GIVE_UP_S
) -> T:
    """`call()` until it works: bounded in attempts and time, and only for what may pass. Local files: once."""
    try:
        if is_local(fs):
            return call()
        for attempt in stamina.retry_context(
            on=_may_pass, attempts=ATTEMPTS, timeout=give_up_s, wait_initial=WAIT_S, wait_max=WAIT_MAX_S
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
        return said(e) if _status(e) and " " in str(e) else "not found"
    text = said(e)
    if _kind(e) is PermissionError and " " not in text:  # a HEAD request's answer has no words of its own
        return f"{text}: check the credentials and what they allow"
    return text if isinstance(e, OSError) and " " in text else f"{type(e).__name__}: {text}"


def _status(e: Exception) -> int | None:
    """The HTTP status behind an error, where there is one."""
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


def _is_client_error(e: Exception) -> bool:
    return type(e).__module__.partition(".")[0] in CLIENT_MODULES


class RangeReader(io.RawIOBase):
    """An object as a seekable stream of range requests; each is retried alone and must give what it promised.

    Resuming is asking again for the range that failed, so no byte can be skipped or repeated. A read gives all that was
    asked for, up to the end, as a local file does. `size`: in bytes; the object is never read beyond it.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, size: int, block_bytes: int = READ_BLOCK_BYTES):
        self._fs, self._path, self._size, self._block_bytes = fs, path, size, block_bytes
        self._at = self._start = 0
        self._buffer = memoryview(b"")

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
        end = min(start + count, self._size)

        def get() -> bytes:
            data = cast(bytes, self._fs.cat_file(self._path, start=start, end=end))
            if len(data) not in (end - start, self._size):
                raise OSError(errno.EIO, f"bytes {start}-{end}: the store gave {len(data)} of {end - start}")
            return data

        data = retrying(self._fs, "read", self._path, get)
        # All of it: the whole was asked for, or a plain web server knows no ranges.
        self._start, self._buffer = (0 if len(data) == self._size else start), memoryview(data)
