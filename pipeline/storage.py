"""The only module that knows URLs: list, read with resume, put create-only, retry.

Any fsspec URL goes: a plain path, `s3://`, `gs://`, `az://`, `https://` … Credentials come from each store's usual
places (environment, profiles, fsspec's own configuration) and are never written anywhere.
"""

import errno
import hashlib
import io
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
import stamina
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import StorageError, UsageError

READ_BLOCK_BYTES = 16 * 2**20  # one range request; s3fs gave 702 MB/s at 32 MiB, 4 MiB blocks less than half of it
ATTEMPTS = 8  # with the waits below: about a minute of outage survived, none of it silently
WAIT_S, WAIT_MAX_S, GIVE_UP_S = 0.2, 10.0, 120.0
FINAL_ERRNOS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
# What the clients behind fsspec raise when they do not turn a failure into an OSError themselves.
CLIENT_MODULES = {"aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "requests", "urllib3"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing. `etag`: 16 hex digits that change when the store says that the object did."""

    url: str
    size: int
    etag: str


def digest(*parts: object) -> str:
    """16 hex digits (64 bits of BLAKE2b) over the parts' text."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def redact(url: str) -> str:
    """The URL without user, password and query: what may be shown in messages and stored in files."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path on it. Raises `UsageError` for a scheme that nothing here can open."""
    if "::" in url:
        raise UsageError(f"{redact(url)}: chained URLs are not supported: name the object itself")
    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError) as e:
        raise UsageError(f"{redact(url)}: {e}") from e
    return fs, str(path)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def list_files(url: str) -> list[Entry]:
    """The objects at `url`, by URL: the file itself, all files below a folder, or a glob's matches.

    Raises `UsageError` where nothing is there or the store refuses.
    """
    fs, path = resolve(url)

    def listing() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        if not fs.exists(path) and fsspec.core.has_magic(path):
            return cast(dict[str, dict[str, Any]], fs.glob(path, detail=True))
        if fs.isfile(path):
            return {path: fs.info(path)}
        return cast(dict[str, dict[str, Any]], fs.find(path, detail=True))

    try:
        found = _retrying(fs, "list", url, listing)
    except (PermissionError, FileNotFoundError, StorageError) as e:
        raise UsageError(f"cannot list {redact(url)}: {e}") from e
    files = [entry(fs, name, info) for name, info in found.items() if info["type"] == "file"]
    if not files:
        raise UsageError(f"nothing matches {redact(url)}")
    return sorted(files, key=lambda e: e.url)


def entry(fs: fsspec.AbstractFileSystem, path: str, info: dict[str, Any]) -> Entry:
    """An `Entry` from fsspec's `info`: the store's own etag where it has one, else the time of the last change."""
    marks = (
        "ETag",
        "etag",
        "md5Hash",
        "generation",
        "content_md5",
        "mtime",
        "LastModified",
        "last_modified",
        "created",
    )
    mark = next((info[m] for m in marks if info.get(m)), "")
    url = path if is_local(fs) else str(fs.unstrip_protocol(path))
    return Entry(url, int(info.get("size") or 0), digest(mark, info.get("size")))


def is_unchanged(e: Entry) -> bool:
    """Whether the store still has the object that was listed."""
    fs, path = resolve(e.url)
    fs.invalidate_cache()
    return entry(fs, path, _retrying(fs, "look at", e.url, lambda: fs.info(path))) == e


def open_input(url: str, size: int) -> BinaryIO:
    """A readable, seekable stream that goes on at the byte where an error met it. `size`: as listed, in bytes."""
    fs, path = resolve(url)
    if is_local(fs):
        return open(path, "rb")
    return cast(BinaryIO, RangeReader(fs, path, size))


def read_bytes(url: str) -> bytes:
    """The whole object. Raises `FileNotFoundError`, `PermissionError` or, after retries, `StorageError`."""
    fs, path = resolve(url)
    return cast(bytes, _retrying(fs, "read", url, lambda: fs.cat_file(path)))


class RangeReader(io.RawIOBase):
    """An object as a seekable stream of range requests; each is retried alone and must give what it promised.

    Resuming is asking again for the range that failed, so no byte can be skipped or repeated.
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
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        wanted = min(len(target), self._size - self._at)
        if wanted <= 0:
            return 0
        if not self._start <= self._at < self._start + len(self._buffer):
            self._start, self._buffer = self._at, memoryview(self._fetch(self._at, max(wanted, self._block_bytes)))
        begin = self._at - self._start
        part = self._buffer[begin : begin + wanted]
        target[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self, start: int, count: int) -> bytes:
        end = min(start + count, self._size)

        def get() -> bytes:
            data = self._fs.cat_file(self._path, start=start, end=end)
            if len(data) != end - start:
                raise OSError(errno.EIO, f"bytes {start}-{end}: the store gave {len(data)} of {end - start}")
            return cast(bytes, data)

        return _retrying(self._fs, "read", self._path, get)


class Root:
    """An output root: everything in it is named by a path relative to it, with forward slashes."""

    def __init__(self, url: str):
        self.fs, path = resolve(url)
        self.path = path.rstrip("/") or "/"
        self.url = self.path if is_local(self.fs) else str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def scratch(self) -> str:
        """A local folder for files under way: on the output's own disk where the output is local."""
        folder = Path(self.at(".tmp")) if is_local(self.fs) else Path(tempfile.gettempdir()) / "shard2vec"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def clear_scratch(self, older_than_s: float) -> None:
        """Deletes what killed writers left in the scratch folder."""
        for path in Path(self.scratch()).iterdir():
            if path.is_file() and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)

    def top(self) -> list[str]:
        """The names directly below the root; raises `NotADirectoryError` where the root is a file."""
        self.fs.invalidate_cache()
        if self.fs.isfile(self.path):
            raise NotADirectoryError(self.path)
        try:
            found = _retrying(self.fs, "list", self.url, lambda: self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []
        names = (str(f).rstrip("/").rpartition("/")[2] for f in found)
        return sorted(n for n in names if n != self.path.rpartition("/")[2] or len(found) > 1)

    def list(self, folder: str) -> dict[str, int]:
        """Path below the root → size in bytes, of every object below `folder`; empty where there is none."""

        def listing() -> dict[str, Any]:
            self.fs.invalidate_cache()
            return cast(dict[str, Any], self.fs.find(self.at(folder), detail=True))

        try:
            found = _retrying(self.fs, "list", self.url, listing)
        except FileNotFoundError:
            return {}
        cut = len(self.path.rstrip("/")) + 1
        return {name[cut:]: int(info["size"] or 0) for name, info in found.items() if info["type"] == "file"}

    def read(self, name: str) -> bytes:
        return cast(bytes, _retrying(self.fs, "read", self.at(name), lambda: self.fs.cat_file(self.at(name))))

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """`size`: in bytes, where it is known from a listing; it spares a request."""
        if is_local(self.fs):
            return open(self.at(name), "rb")
        if size is None:
            size = _retrying(self.fs, "look at", self.at(name), lambda: self.fs.info(self.at(name))["size"])
        return cast(BinaryIO, RangeReader(self.fs, self.at(name), size, block_bytes=2**20))

    def put_new(self, name: str, content: bytes | Path) -> bool:
        """Puts bytes, or a local file, under a name that nobody has; False, and nothing done, where it is there.

        The object appears whole or not at all. A `Path` is used up.
        """
        if is_local(self.fs):
            return self._link_new(name, content)
        local = content if isinstance(content, Path) else _spill(content, self.scratch())
        try:
            _retrying(self.fs, "write", self.at(name), lambda: self._put_remote(local, self.at(name)))
            return True
        except FileExistsError:
            return False
        finally:
            local.unlink(missing_ok=True)

    def _put_remote(self, local: Path, path: str) -> None:
        try:
            self.fs.put_file(str(local), path, mode="create")
        except OSError as e:
            # s3fs gives FileExistsError for AWS's 412; SeaweedFS words its 412 otherwise and comes out as EINVAL.
            if e.errno == errno.EINVAL and self.fs.exists(path):
                raise FileExistsError(path) from e
            raise

    def _link_new(self, name: str, content: bytes | Path) -> bool:
        # fsspec's local `mode="create"` looks and then writes: neither atomic nor whole. A hard link is both.
        final = Path(self.at(name))
        local = content if isinstance(content, Path) else _spill(content, self.scratch())
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with open(local, "rb") as f:
                os.fsync(f.fileno())
            try:
                os.link(local, final)
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                # No hard links here (FUSE mounts of buckets, FAT): whole still, create-only but for a moment's race.
                if final.exists():
                    return False
                os.rename(local, final)
            _sync_folder(final.parent)
            return True
        finally:
            local.unlink(missing_ok=True)

    def overwrite(self, name: str, content: bytes) -> None:
        """For progress notes only; results are put with `put_new`."""
        if not is_local(self.fs):
            _retrying(self.fs, "write", self.at(name), lambda: self.fs.pipe_file(self.at(name), content))
            return
        final = Path(self.at(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_spill(content, self.scratch()), final)

    def delete(self, name: str) -> None:
        """Deletes one object; what is not there is no error."""
        with suppress(FileNotFoundError):
            _retrying(self.fs, "delete", self.at(name), lambda: self.fs.rm_file(self.at(name)))


def _spill(content: bytes, folder: str) -> Path:
    path = Path(folder) / uuid.uuid4().hex
    path.write_bytes(content)
    return path


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_transient(e: Exception) -> bool:
    if isinstance(e, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(e, OSError | EOFError):
        return e.errno not in FINAL_ERRNOS if isinstance(e, OSError) else True
    return type(e).__module__.partition(".")[0] in CLIENT_MODULES


def _retrying(fs: fsspec.AbstractFileSystem, verb: str, url: str, call: Callable[[], T]) -> T:
    """`call()` until it works: bounded in attempts and time, and only for what may pass. Local files: once."""
    try:
        if is_local(fs):
            return call()
        for attempt in stamina.retry_context(
            on=_is_transient, attempts=ATTEMPTS, timeout=GIVE_UP_S, wait_initial=WAIT_S, wait_max=WAIT_MAX_S
        ):
            with attempt:
                return call()
        raise AssertionError("unreachable: the last attempt raises")
    except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError):
        raise
    except Exception as e:
        if is_local(fs) and not isinstance(e, OSError):
            raise
        if not (_is_transient(e) or isinstance(e, OSError)):
            raise
        raise StorageError(f"could not {verb} {redact(url)}: {type(e).__name__}: {e}") from e
