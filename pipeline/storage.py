"""The only module that knows URLs: what lies where, listed and read with resume; `output` writes.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from glob import has_magic
from typing import Any, BinaryIO, TypeVar, cast

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.core import split_protocol
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.http import HTTPFileSystem
from fsspec.utils import glob_translate

from pipeline.errors import StorageError, UsageError
from pipeline.retries import CLIENT_MODULES as CLIENT_MODULES  # for fetching.py
from pipeline.retries import RangeReader, is_local, read_whole, redact, retrying, said

READ_TIMEOUT_S = 15.0  # without a byte of an answer, which is then asked for again; s3fs' own
LOOK_GIVE_UP_S = 20.0  # before any work: somebody waits to hear that the address is wrong
CLIENT_TRIES = 3  # of one request, by the client itself: an upload in parts does not start anew for one that failed
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
        _adapt(fs)
    except (ValueError, TypeError, ImportError, OSError) as e:
        raise UsageError(f"{redact(url)}: {said(e)}") from e
    return fs, str(fs._strip_protocol(url))


def _adapt(fs: Any) -> None:
    """How often a client of S3 or Azure asks by itself, before our own retries, and how it reads times.

    Credentials, endpoints and all else stay what the client finds in its usual places.
    """
    if hasattr(fs, "call_s3"):
        # s3fs: its 5 tries of botocore's 5, times ours, would take ten minutes to say that nobody listens.
        fs.retries = 1
        fs.config_kwargs.setdefault("retries", {"total_max_attempts": CLIENT_TRIES, "mode": "standard"})
        fs.config_kwargs.setdefault("read_timeout", READ_TIMEOUT_S)
        if fs.session is None:  # s3fs would make the same, later
            from aiobotocore.session import AioSession  # type: ignore[import-untyped]

            fs.session = AioSession(**fs.kwargs)
            fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    elif hasattr(fs, "service_client"):
        # adlfs passes on no policy for its client's birth; the default waits 15, 18 and 24 s.
        policy = fs.service_client._config.retry_policy
        policy.total_retries = policy.connect_retries = policy.read_retries = policy.status_retries = CLIENT_TRIES - 1
        policy.initial_backoff, policy.increment_base, policy.random_jitter_range = 0, 2, 1
    elif isinstance(fs, HTTPFileSystem):  # aiohttp's own: 300 s for an answer, which a dead one wastes
        fs.client_kwargs.setdefault("timeout", aiohttp.ClientTimeout(sock_connect=5, sock_read=READ_TIMEOUT_S))


def _time(text: Any) -> datetime:
    """A time as botocore reads it, whose search for the format takes half of a long listing."""
    from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

    if isinstance(text, str) and text[10:11] == "T" and text.endswith("Z"):
        return datetime.fromisoformat(text)
    return cast(datetime, parse_timestamp(text))


def list_files(url: str) -> list[Entry]:
    """The objects at `url`, by URL: the file itself, all files below a folder, or a glob's matches.

    A name that is there wins over its reading as a pattern; an object wins over a folder of the same name, unless the
    URL ends with `/`. Links are followed, below folders too. One that leads nowhere is listed as an empty file, so that
    it is rejected by name. Raises `UsageError` where nothing is there, or the store refuses or does not answer.
    """
    fs, path = resolve(url)

    def listing() -> list[Entry]:
        return [entry(fs, info["name"], info) for info in found() if info["type"] == "file"]

    def found() -> Iterator[Info]:
        for info in _matches(fs, url, path):
            if info.get("size") is None:  # a web server's index page
                name = info["name"]
                info = retrying(fs, "look at", name, partial(info_of, fs, name), LOOK_GIVE_UP_S) | {"name": name}
            yield info

    try:
        files = retrying(fs, "list", url, listing, LOOK_GIVE_UP_S)
    except (OSError, ValueError, StorageError) as e:
        why = said(e) + (_missing_bucket(fs, path) if isinstance(e, FileNotFoundError) else "")
        raise UsageError(why if redact(url) in why else f"{redact(url)}: {why}") from e
    if not files:
        raise UsageError(f"nothing matches {redact(url)}{_missing_bucket(fs, path)}")
    return sorted(files, key=lambda e: e.url)


def _matches(fs: fsspec.AbstractFileSystem, url: str, path: str) -> Iterator[Info]:
    if url.endswith("/"):
        return below(fs, path)
    try:
        info = info_of(fs, path, LOOK_GIVE_UP_S)
    except FileNotFoundError:
        if not has_magic(path.partition("?")[0] if path.startswith("http") else path):
            raise
        return _glob(fs, path)
    return below(fs, path) if info["type"] == "directory" else iter([info | {"name": path}])


def is_bucket(fs: fsspec.AbstractFileSystem) -> bool:
    return not BUCKETS.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _missing_bucket(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Words for a bucket that is not there: the stores do not tell it from a folder that is not there."""
    bucket = path.partition("/")[0]
    if is_bucket(fs) and bucket:
        with suppress(PermissionError, StorageError):  # who may list need not be allowed to look at the bucket
            try:
                retrying(fs, "look at", bucket, partial(info_of, fs, bucket, LOOK_GIVE_UP_S), LOOK_GIVE_UP_S)
            except FileNotFoundError:
                return f": there is no bucket {bucket}"
    return ""


def _ask(fs: fsspec.AbstractFileSystem, call: Callable[..., T], path: str, wait_s: float | None, **options: Any) -> T:
    """`call(path)`; of a bucket's client, who may try for minutes by itself, `TimeoutError` after `wait_s`."""
    if wait_s is None or not (is_bucket(fs) and fs.async_impl):
        return call(path, **options)
    try:
        return call(path, timeout=wait_s, **options)
    except FSTimeoutError as e:
        raise TimeoutError(f"no answer in {wait_s:g} s: check the address and the credentials") from e


def info_of(fs: fsspec.AbstractFileSystem, path: str, wait_s: float | None = None) -> Info:
    """What the store says of the path now, whatever was listed before. `wait_s`: how long a bucket's client may try."""
    if not is_local(fs):
        fs.invalidate_cache()
        return cast(Info, _ask(fs, fs.info, path, wait_s))
    try:
        found = os.stat(path)
    except OSError as e:
        found = os.lstat(path)
        if e.errno == errno.EACCES or not stat.S_ISLNK(found.st_mode):
            raise
        return {"name": path, "type": "file", "size": 0, "mtime": found.st_mtime}
    kind = "directory" if stat.S_ISDIR(found.st_mode) else "file" if stat.S_ISREG(found.st_mode) else "other"
    return {"name": path, "type": kind, "size": found.st_size, "mtime": found.st_mtime}


def object_info(fs: fsspec.AbstractFileSystem, path: str) -> Info:
    """What the store says of an object now; a folder is none: `FileNotFoundError`."""
    if hasattr(fs, "call_s3"):
        return _head_of(fs, path)
    info = info_of(fs, path)
    if info["type"] == "directory":
        raise FileNotFoundError(errno.ENOENT, "a folder, no object", path)
    return info


def _head_of(fs: Any, path: str) -> Info:
    """S3's answer to one HEAD; s3fs' own `info` lists too where there is nothing, for it might be a folder."""
    bucket, key, version = fs.split_path(path)
    if not key:
        raise FileNotFoundError(errno.ENOENT, "a bucket, no object", path)
    try:
        found = fs.call_s3("head_object", Bucket=bucket, Key=key, **({"VersionId": version} if version else {}))
    except FileNotFoundError as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from e
    return {
        "name": path,
        "type": "file",
        "size": found["ContentLength"],
        "ETag": found.get("ETag", ""),
        "LastModified": found.get("LastModified", ""),
    }


def children(fs: fsspec.AbstractFileSystem, folder: str, wait_s: float | None = None) -> list[Info]:
    if not is_local(fs):
        fs.invalidate_cache()
        return cast(list[Info], _ask(fs, fs.ls, folder, wait_s, detail=True))
    children = list[Info]()
    for name in os.listdir(folder or "/"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            children.append(info_of(fs, f"{folder.rstrip('/')}/{name}"))
    return children


def below(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[Info]:
    """Every object below a folder, in no order. Raises for a subfolder that cannot be listed."""
    for info in _all_below(fs, folder):
        name = info["name"]
        # A name with `/` at its end only marks a folder; one with a query is a button of a web server's index page.
        if info["type"] == "file" and not name.endswith("/") and not (info.get("size") is None and "?" in name):
            yield info


def _all_below(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[Info]:
    find = getattr(type(fs), "_find" if fs.async_impl else "find")
    if is_local(fs) or find in (AsyncFileSystem._find, fsspec.AbstractFileSystem.find):
        # fsspec's own walk leaves out, without a word, the folders that it could not list; stores' own `find` does not.
        yield from _walk(fs, folder, ())
        return
    fs.invalidate_cache()
    found = fs.find(folder, detail=True)
    fs.invalidate_cache()  # which holds all of it too: 1.3 kB an object of S3
    if isinstance(found, list):  # adlfs, where an object bears the folder's name
        bucket, _, key = folder.partition("/")
        inside = fs.find(bucket, prefix=key, detail=True)
        found = {name: info for name, info in inside.items() if name.startswith(f"{folder.rstrip('/')}/")}
    while found:
        yield found.popitem()[1]  # and so gives its memory back as it goes


def _walk(fs: fsspec.AbstractFileSystem, folder: str, above: tuple[str, ...]) -> Iterator[Info]:
    real = os.path.realpath(folder) if is_local(fs) else folder.rstrip("/")
    if real in above:  # a link to a folder that it lies in, or a folder that lists itself
        return
    for info in children(fs, folder):
        if info["type"] == "directory":
            yield from _walk(fs, info["name"], (*above, real))
        else:
            yield info


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> Iterator[Info]:
    """Level by level: fsspec's own swallows errors, so that a refused listing looks like an empty one."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    folders = ["/".join(parts[:fixed])]
    if "**" in pattern:
        matches = re.compile(glob_translate(pattern)).match
        yield from (info for info in below(fs, folders[0]) if matches(info["name"]))
        return
    found = list[Info]()
    for part in parts[fixed:]:
        found = []
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                found += children(fs, folder)
        is_match = re.compile(fnmatch.translate(part)).match
        found = [info for info in found if is_match(info["name"].rstrip("/").rpartition("/")[2])]
        folders = [info["name"].rstrip("/") for info in found if info["type"] == "directory"]
    yield from (info for info in found if info["type"] == "file" and not info["name"].endswith("/"))


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
    return Entry(url, int(info["size"]), _etag(mark, int(info["size"])))


def _etag(mark: object, size: int) -> str:
    return digest(str(mark).strip('"'), size)  # Azure quotes in one place of two


def is_unchanged(e: Entry) -> bool:
    """Whether the store still has the object that was listed."""
    fs, path = resolve(e.url)
    try:
        return entry(fs, path, retrying(fs, "look at", e.url, lambda: object_info(fs, path))) == e
    except FileNotFoundError:
        return False


def read_listed(e: Entry) -> bytes:
    """The whole object, if it still is the one that was listed: by its size, and on S3 by its etag too.

    Raises `StorageError` where it is another or gone.
    """
    fs, path = resolve(e.url)
    try:
        content, mark = read_whole(fs, path)
    except FileNotFoundError as gone:
        raise StorageError(f"{redact(e.url)} has gone since it was listed: run again") from gone
    if len(content) != e.size:
        raise StorageError(f"{redact(e.url)} has {len(content)} bytes, {e.size} when it was listed: run again")
    if hasattr(fs, "_call_s3") and mark and _etag(mark, e.size) != e.etag:
        raise StorageError(f"{redact(e.url)} has changed since it was listed: run again")
    return content


def open_input(url: str, size: int) -> BinaryIO:
    """A readable, seekable stream that goes on at the byte where an error met it. `size`: as listed, in bytes."""
    fs, path = resolve(url)
    if is_local(fs):
        return open(path, "rb")
    return cast(BinaryIO, RangeReader(fs, path, size))


def read_bytes(url: str) -> bytes:
    """The whole object. Raises `FileNotFoundError`, `PermissionError` or, after retries, `StorageError`."""
    fs, path = resolve(url)
    return read_whole(fs, path)[0]
