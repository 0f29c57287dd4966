"""The only module that knows URLs: list, read with resume, put create-only, retry.

Any fsspec URL goes: a plain path, `s3://`, `gs://`, `az://`, `https://` … Credentials come from each store's usual
places (environment, profiles, fsspec's own configuration), never from the URL of a bucket, and are written nowhere.
How long a store is asked, and what is raised then: `pipeline.retries`.
"""

import errno
import fnmatch
import hashlib
import os
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.core import split_protocol
from fsspec.utils import glob_translate

from pipeline.errors import StorageError, UsageError
from pipeline.retries import CLIENT_MODULES as CLIENT_MODULES  # for shards.py
from pipeline.retries import GIVE_UP_S, RangeReader, is_local, redact, retrying, said

LOOK_GIVE_UP_S = 20.0  # before any work: somebody waits to hear that the address is wrong
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # whose `mode="create"` the store itself enforces
MARKS = (
    *("ETag", "etag", "md5Hash", "generation", "content_md5", "Content-MD5", "blob_id", "sha", "mtime"),
    *("LastModified", "last_modified", "Last-Modified", "modified", "created"),
)

T = TypeVar("T")
Info = dict[str, Any]  # fsspec's: name, size, type, and what else the store tells


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing. `etag`: 16 hex digits that change when the store says that the object did."""

    url: str
    size: int
    etag: str


def digest(*parts: object) -> str:
    """16 hex digits (64 bits of BLAKE2b) over the parts' text."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def resolve(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path on it, absolute. Raises `UsageError` for what nothing here can open."""
    head, _, tail = url.partition("::")
    if "://" in tail:
        raise UsageError(f"{redact(head)}::{redact(tail)}: chained URLs are not supported: name the object itself")
    scheme, rest = split_protocol(url)
    if scheme in BUCKETS - {"az", "abfs", "abfss"} and "@" in rest.partition("/")[0]:
        raise UsageError(f"{redact(url)}: credentials do not belong in the URL: put them in the environment")
    if scheme in BUCKETS and not rest.strip("/"):
        raise UsageError(f"{redact(url)}: names no bucket")
    try:
        kind = fsspec.get_filesystem_class(scheme or "file")
        fs = kind(**kind._get_kwargs_from_urls(url))
    except (ValueError, TypeError, ImportError, OSError) as e:
        raise UsageError(f"{redact(url)}: {said(e)}") from e
    if getattr(fs, "retries", None) == 5 and hasattr(fs, "config_kwargs"):
        # s3fs: its 5 tries of botocore's 5, times ours, would take ten minutes to say that nobody listens.
        fs.retries = 1
        fs.config_kwargs.setdefault("retries", {"total_max_attempts": 3, "mode": "standard"})
    return fs, str(fs._strip_protocol(url))


def list_files(url: str) -> list[Entry]:
    """The objects at `url`, by URL: the file itself, all files below a folder, or a glob's matches.

    A name that is there wins over its reading as a pattern; an object wins over a folder of the same name, unless the
    URL ends with `/`. Links are followed, below folders too. One that leads nowhere is listed as an empty file, so that
    it is rejected by name. Raises `UsageError` where nothing is there, or the store refuses or does not answer.
    """
    fs, path = resolve(url)

    def listing() -> dict[str, Info]:
        if url.endswith("/"):
            return _below(fs, path)
        try:
            info = _info(fs, path)
        except FileNotFoundError:
            if not has_magic(path.partition("?")[0] if path.startswith("http") else path):
                raise
            return _glob(fs, path)
        return _below(fs, path) if info["type"] == "directory" else {path: info}

    try:
        found = retrying(fs, "list", url, listing, LOOK_GIVE_UP_S)
        for name in [name for name, info in found.items() if info.get("size") is None]:  # a web server's index page
            found[name] = retrying(fs, "look at", name, partial(_info, fs, name), LOOK_GIVE_UP_S)
    except (OSError, ValueError, StorageError) as e:
        raise UsageError(said(e) if redact(url) in said(e) else f"{redact(url)}: {said(e)}") from e
    files = [entry(fs, name, info) for name, info in found.items() if info["type"] == "file"]
    if not files:
        raise UsageError(f"nothing matches {redact(url)}")
    return sorted(files, key=lambda e: e.url)


def _info(fs: fsspec.AbstractFileSystem, path: str) -> Info:
    """What the store says of the path now, whatever was listed before."""
    if not is_local(fs):
        fs.invalidate_cache()
        return cast(Info, fs.info(path))
    try:
        found = os.stat(path)
    except OSError as e:
        found = os.lstat(path)
        if e.errno == errno.EACCES or not stat.S_ISLNK(found.st_mode):
            raise
        return {"name": path, "type": "file", "size": 0, "mtime": found.st_mtime}
    kind = "directory" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
    return {"name": path, "type": kind, "size": found.st_size, "mtime": found.st_mtime}


def _object_info(fs: fsspec.AbstractFileSystem, path: str) -> Info:
    info = _info(fs, path)
    if info["type"] == "directory":
        raise FileNotFoundError(errno.ENOENT, "a folder, no object", path)
    return info


def _children(fs: fsspec.AbstractFileSystem, folder: str) -> list[Info]:
    if not is_local(fs):
        fs.invalidate_cache()
        return cast(list[Info], fs.ls(folder, detail=True))
    children = list[Info]()
    for name in os.listdir(folder or "/"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            children.append(_info(fs, f"{folder.rstrip('/')}/{name}"))
    return children


def _below(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, Info]:
    """Path → info of every object below a folder. Raises for a subfolder that cannot be listed."""
    find = getattr(type(fs), "_find" if fs.async_impl else "find")
    if is_local(fs) or find in (AsyncFileSystem._find, fsspec.AbstractFileSystem.find):
        # fsspec's own walk leaves out, without a word, the folders that it could not list; stores' own `find` does not.
        found = {info["name"]: info for info in _walk(fs, folder, ())}
    else:
        fs.invalidate_cache()
        found = fs.find(folder, detail=True)
    return {
        name: info
        for name, info in found.items()
        # A name with `/` at its end only marks a folder; one with a query is a button of a web server's index page.
        if info["type"] == "file" and not name.endswith("/") and not (info.get("size") is None and "?" in name)
    }


def _walk(fs: fsspec.AbstractFileSystem, folder: str, above: tuple[str, ...]) -> Iterator[Info]:
    real = os.path.realpath(folder) if is_local(fs) else folder.rstrip("/")
    if real in above:  # a link to a folder that it lies in, or a folder that lists itself
        return
    for info in _children(fs, folder):
        if info["type"] == "directory":
            yield from _walk(fs, info["name"], (*above, real))
        else:
            yield info


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> dict[str, Info]:
    """Level by level: fsspec's own swallows errors, so that a refused listing looks like an empty one."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    folders = ["/".join(parts[:fixed])]
    if "**" in pattern:
        matches = re.compile(glob_translate(pattern)).match
        return {name: info for name, info in _below(fs, folders[0]).items() if matches(name)}
    found = list[Info]()
    for part in parts[fixed:]:
        found = []
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                found += _children(fs, folder)
        is_match = re.compile(fnmatch.translate(part)).match
        found = [info for info in found if is_match(info["name"].rstrip("/").rpartition("/")[2])]
        folders = [info["name"].rstrip("/") for info in found if info["type"] == "directory"]
    return {info["name"]: info for info in found if info["type"] == "file" and not info["name"].endswith("/")}


def entry(fs: fsspec.AbstractFileSystem, path: str, info: Info) -> Entry:
    """An `Entry` from fsspec's `info`: the store's own etag where it has one, else the time of the last change.

    A store that tells neither is believed by the size alone. Raises `UsageError` where it does not tell that.
    """
    url = path if is_local(fs) else str(fs.unstrip_protocol(path))
    if info.get("size") is None:
        raise UsageError(f"{redact(url)}: the server does not tell its size")
    mark = next((info[m] for m in MARKS if info.get(m)), "")
    if isinstance(mark, datetime):
        mark = mark.timestamp()
    return Entry(url, int(info["size"]), digest(str(mark).strip('"'), info["size"]))  # Azure quotes in one place of two


def is_unchanged(e: Entry) -> bool:
    """Whether the store still has the object that was listed."""
    fs, path = resolve(e.url)
    try:
        return entry(fs, path, retrying(fs, "look at", e.url, lambda: _object_info(fs, path))) == e
    except FileNotFoundError:
        return False


def open_input(url: str, size: int) -> BinaryIO:
    """A readable, seekable stream that goes on at the byte where an error met it. `size`: as listed, in bytes."""
    fs, path = resolve(url)
    if is_local(fs):
        return open(path, "rb")
    return cast(BinaryIO, RangeReader(fs, path, size))


def read_bytes(url: str) -> bytes:
    """The whole object. Raises `FileNotFoundError`, `PermissionError` or, after retries, `StorageError`."""
    fs, path = resolve(url)
    return cast(bytes, retrying(fs, "read", url, lambda: fs.cat_file(path)))


class Root:
    """An output root: everything in it is named by a path relative to it, with forward slashes."""

    def __init__(self, url: str):
        self.fs, path = resolve(url)
        self.path = path.rstrip("/") or "/"
        self.url = self.path if is_local(self.fs) else str(self.fs.unstrip_protocol(self.path))

    def at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _do(self, verb: str, name: str, call: Callable[[], T], give_up_s: float = GIVE_UP_S) -> T:
        return retrying(self.fs, verb, f"{self.url}/{name}".rstrip("/"), call, give_up_s)

    def scratch(self) -> str:
        """A local folder for files under way: on the output's own disk where the output is local."""
        own = Path(tempfile.gettempdir()) / f"shard2vec-{os.getuid()}"
        folder = Path(self.at(".tmp")) if is_local(self.fs) else own
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def clear_scratch(self, older_than_s: float) -> None:
        """Deletes what killed writers left in the scratch folder."""
        for path in Path(self.scratch()).iterdir():
            with suppress(FileNotFoundError):  # another run clears it too
                if path.is_file() and time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()

    def top(self) -> list[str]:
        """The names directly below the root, none where nothing is there; `NotADirectoryError` where it is a file."""
        try:
            found = self._do("list", "", lambda: _children(self.fs, self.path), LOOK_GIVE_UP_S)
        except FileNotFoundError:
            return []
        if any(info["name"] == self.path and info["type"] == "file" for info in found):
            raise NotADirectoryError(errno.ENOTDIR, "a file, no folder", self.url)
        cut = len(self.path.rstrip("/")) + 1
        return sorted({name for info in found if (name := info["name"][cut:].rstrip("/"))})

    def list(self, folder: str) -> dict[str, int]:
        """Path below the root → size in bytes, of every object below `folder`; empty where there is none."""
        try:
            found = self._do("list", folder, lambda: _below(self.fs, self.at(folder)))
        except FileNotFoundError:
            return {}
        cut = len(self.path.rstrip("/")) + 1
        return {name[cut:]: int(info["size"] or 0) for name, info in found.items()}

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            self.fs.invalidate_cache()  # s3fs believes an older listing that a new object is not there
            return cast(bytes, self.fs.cat_file(self.at(name)))

        return self._do("read", name, get)

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """`size`: in bytes, where it is known from a listing; it spares a request."""
        if is_local(self.fs):
            return open(self.at(name), "rb")
        if size is None:
            size = int(self._do("look at", name, lambda: _object_info(self.fs, self.at(name)))["size"])
        return cast(BinaryIO, RangeReader(self.fs, self.at(name), size, block_bytes=2**20))

    def put_new(self, name: str, content: bytes | Path) -> bool:
        """Puts bytes, or a file in `scratch()`, under a name that nobody has; False, and nothing done, where it is.

        The object appears whole. Local disks, S3, Google and Azure refuse a second one themselves, so of any number of
        writers at once one gets True. Others are looked at first, and two writers in that moment can both get True:
        memory, SFTP, HDFS, disks without hard links, and S3's imitations for files of 100 MiB and more, which go in
        parts (SeaweedFS 4.48: 1 to 8 winners of 8; of single requests always one). Where the answer to a put that
        succeeded was lost, the retry finds the object and gives False: content under a name is the same whoever wrote
        it. A `Path` is used up.
        """
        try:
            if is_local(self.fs):
                if isinstance(content, bytes):
                    content = self._do("write", name, partial(self._spill, content))
                return self._do("write", name, partial(_link_new, content, Path(self.at(name))))
            self._do("write", name, partial(self._put, name, content))
            return True
        except FileExistsError:
            return False
        finally:
            if isinstance(content, Path):
                content.unlink(missing_ok=True)

    def _put(self, name: str, content: bytes | Path) -> None:
        protocol = self.fs.protocol
        if BUCKETS.isdisjoint([protocol] if isinstance(protocol, str) else protocol):
            self._put_looking(self.at(name), content)
        elif isinstance(content, Path):
            self.fs.put_file(str(content), self.at(name), mode="create")
        else:
            self.fs.pipe_file(self.at(name), content, mode="create")

    def _put_looking(self, path: str, content: bytes | Path) -> None:
        # fsspec's own `mode="create"` looks too, and then fills the file under its final name.
        with suppress(FileNotFoundError):
            _info(self.fs, path)
            raise FileExistsError(path)
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        part = self.at(f".tmp/{uuid.uuid4().hex}")
        self.fs.makedirs(self.at(".tmp"), exist_ok=True)
        self.fs.pipe_file(part, content.read_bytes() if isinstance(content, Path) else content)
        self.fs.mv(part, path)

    def overwrite(self, name: str, content: bytes) -> None:
        """For progress notes only; results are put with `put_new`."""
        if not is_local(self.fs):
            self._do("write", name, lambda: self.fs.pipe_file(self.at(name), content))
            return
        final = Path(self.at(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        self._do("write", name, lambda: os.replace(self._spill(content), final))

    def delete(self, name: str) -> None:
        """Deletes one object; what is not there is no error."""
        with suppress(FileNotFoundError):
            self._do("delete", name, lambda: self.fs.rm_file(self.at(name)))

    def _spill(self, content: bytes) -> Path:
        path = Path(self.scratch()) / uuid.uuid4().hex
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path


def _link_new(local: Path, final: Path) -> bool:
    # fsspec's local `mode="create"` looks and then writes: neither atomic nor whole. A hard link is both.
    _make_folder(final.parent)
    _sync(local)
    try:
        os.link(local, final)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # No hard links here (FUSE mounts of buckets, FAT): whole still, create-only but for a moment's race.
        if final.exists():
            return False
        os.rename(local, final)
    _sync(final.parent)
    return True


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, and on the disk before anything lies in it: a power cut takes no committed file away."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with suppress(FileExistsError):  # another writer's folder; a file in its place fails when it is linked to
            folder.mkdir()
        _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network mounts do not sync folders
            raise
    finally:
        os.close(handle)
