"""Inputs become shards: files, folders, globs, brace ranges and lists of them, on any store fsspec knows.

A shard's name is its path below the inputs' common root, and that root comes from what the user wrote, not from what
was found: shards keep their names when others come and go. What cannot be told apart or is not there is refused.
"""

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from braceexpand import braceexpand
from fsspec.core import has_magic

from pipeline.columns import UNNAMED, Columns, find_columns
from pipeline.errors import StorageError, UsageError
from pipeline.shards import is_image
from pipeline.storage import Entry, digest, is_local, list_files, open_input, read_bytes, redact, resolve
from pipeline.tables import read_schema

FORMATS = ("webdataset", "parquet", "folder")
ENDINGS = {"webdataset": (".tar.gz", ".tgz", ".tar"), "parquet": (".parquet", ".pq")}
# Bytes of a shard's name: of its last part, to which `-<etag>-<digest>.parquet` is added, and 255 fit a file name; and
# of all, as S3 takes keys of 1024 with the output's own folders.
MAX_LAST_BYTES, MAX_NAME_BYTES = 255 - 42, 800
SLICE_IMAGES = 1000  # mean images of a folder's slice: one file of output, about 4 MB at 1024 dimensions


@dataclass(frozen=True, kw_only=True, slots=True)  # a million of them are 0.5 GB
class Shard:
    """One input object. `etag`: 16 hex digits over the object's own and all that decides how it is read."""

    name: str
    format: str  # one of FORMATS
    url: str  # of a folder's slice: the folder
    size: int  # bytes, as listed
    etag: str
    columns: Columns = UNNAMED  # of Parquet
    source: Entry | None = None  # the object as listed; None for a folder's slice
    members: tuple[Entry, ...] = ()  # a folder's slice, frozen: its keys are the paths below `url`


@dataclass(frozen=True)
class _Input:
    """One line of input. `base`: scheme, bucket and folders that are the same for whatever it matches."""

    line: str
    kind: str  # file, folder, glob
    base: tuple[str, ...]
    root: str  # the same as a URL
    entries: list[Entry]


def list_shards(
    inputs: Sequence[str], *, format: str | None = None, columns: Columns = UNNAMED, exclude: str | None = None
) -> list[Shard]:
    """The shards of all inputs, sorted by name. `exclude`: a root (the output's) whose objects are left out.

    Raises `UsageError` naming the input that matches nothing, names no format or is ambiguous.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {format}: one of {', '.join(FORMATS)}")
    found = sorted((_look(line) for line in _lines(inputs)), key=lambda i: (i.base, i.kind, i.line))
    if not found:
        raise UsageError("no input: give --input a tar, a Parquet file, a folder, a glob or @list.txt")
    left_out = _parts(_absolute(exclude)) if exclude else None
    common = posixpath.commonprefix([i.base for i in found])
    seen = set[str]()
    named = list[tuple[str, str, Shard]]()  # name, the longer name where that is taken, the shard
    folders = dict[str, dict[str, Entry]]()
    for source in found:
        entries = _outside(left_out, source)
        for entry, form in _with_formats(source, entries, format):
            if entry.url in seen:
                continue
            seen.add(entry.url)
            if form == "folder":
                folders.setdefault(source.root, {})[entry.url] = entry
            else:
                path = "/".join(_parts(entry.url)[len(common) :])
                named.append((_without_ending(path, form), path, _shard(entry, form, columns)))
    for root, members in folders.items():
        named += _slices(root, members.values(), len(common))
    return sorted(_distinct(named), key=lambda s: s.name)


def _outside(left_out: tuple[str, ...] | None, source: _Input) -> list[Entry]:
    """The entries that do not lie below `left_out`."""
    if left_out is None or any(a != b for a, b in zip(left_out, source.base, strict=False)):
        return source.entries
    return [e for e in source.entries if _parts(e.url)[: len(left_out)] != left_out]


def _shard(entry: Entry, form: str, columns: Columns) -> Shard:
    read_as = (columns.image, columns.key, columns.uri, *columns.allow_urls) if form == "parquet" else ()
    kept = columns if form == "parquet" else UNNAMED
    etag = digest(entry.etag, form, *read_as)
    return Shard(name="", format=form, url=entry.url, size=entry.size, etag=etag, columns=kept, source=entry)


# What the user wrote


def _lines(inputs: Iterable[str]) -> list[str]:
    """The inputs, with every `@list` in its place one a line. Relative lines: to the working directory."""
    lines = list[str]()
    for given in inputs:
        if not given.startswith("@"):
            lines.append(given)
            continue
        try:
            text = read_bytes(given[1:]).decode("utf-8-sig")
        except (OSError, StorageError, UnicodeDecodeError) as e:
            raise UsageError(f"input {redact(given)}: the list cannot be read: {e}") from e
        listed = [line.strip() for line in text.splitlines()]
        listed = [line for line in listed if line and not line.startswith("#")]
        if not listed:
            raise UsageError(f"input {redact(given)}: the list names nothing")
        lines += listed
    return lines


def _absolute(line: str) -> str:
    """The line with what is relative to the working directory spelled out, and no `..` in local paths."""
    fs, path = resolve(line)
    return posixpath.normpath(path) if is_local(fs) else str(fs.unstrip_protocol(path))


def _parts(url: str) -> tuple[str, ...]:
    """Scheme, bucket or host, then folders; of `https` without the query."""
    scheme, _, path = _without_query(url).rpartition("://")
    return (scheme or "file", *(part for part in path.split("/") if part))


def _without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith(("http://", "https://")) else url


def _look(line: str) -> _Input:
    """Lists one input and tells what it is. A literal file or folder with a pattern's characters wins."""
    url = _absolute(line)
    fs, path = resolve(url)
    if "{" in path and not fs.exists(path):
        entries, is_pattern = _expanded(line, url), True
    else:
        try:
            entries = list_files(url)
        except UsageError as e:
            raise UsageError(f"input {redact(line)}: {e}") from e
        inside = _parts(url)
        is_pattern = has_magic(path) and any(_parts(e.url)[: len(inside)] != inside for e in entries)
    if not is_pattern:
        is_file = len(entries) == 1 and _parts(entries[0].url) == _parts(url)
        root = _without_query(url).rpartition("/")[0] if is_file else url.rstrip("/")
        return _Input(line, "file" if is_file else "folder", _parts(root), root or "/", entries)
    head, mark, tail = url.rpartition("://")
    fixed = re.split(r"[*?\[{]", tail)[0].rpartition("/")[0]
    root = head + mark + fixed
    return _Input(line, "glob", _parts(root), root or "/", entries)


def _expanded(line: str, url: str) -> list[Entry]:
    """The objects of a brace range, each of which must be there. One listing serves all where the store lists."""
    try:
        urls = list(dict.fromkeys(braceexpand(url, escape=False)))
    except ValueError as e:
        raise UsageError(f"input {redact(line)}: unbalanced braces, and no such file") from e
    pattern = url
    while (wider := re.sub(r"\{[^{}]*\}", "*", pattern)) != pattern:
        pattern = wider
    try:
        listed = {} if url.startswith("http") else {e.url: e for e in list_files(pattern)}
    except UsageError:  # nothing, or braces with folders in them
        listed = {}
    try:
        return [e for u in urls for e in ([listed[u]] if u in listed else list_files(u))]
    except UsageError as e:
        raise UsageError(f"input {redact(line)}: {e}") from e


# Formats


def _format_of(url: str) -> str | None:
    name = _without_query(url).rstrip("/").rpartition("/")[2].lower()
    for form, endings in ENDINGS.items():
        if name.endswith(endings):
            return form
    return "folder" if is_image(name) else None


def _without_ending(path: str, form: str) -> str:
    ending = next((e for e in ENDINGS[form] if path.lower().endswith(e)), "")
    short = path[: len(path) - len(ending)]
    return path if not short or short.endswith("/") else short


def _with_formats(source: _Input, entries: list[Entry], format: str | None) -> list[tuple[Entry, str]]:
    """The input's shards-to-be, by name or by `--format`; of folders and globs one format only."""
    line = redact(source.line)
    if not entries:
        raise UsageError(f"input {line}: all of it lies in the output")
    if source.kind == "file":
        named = [(e, format or _format_of(e.url)) for e in entries]
        if any(form is None for _, form in named):
            raise UsageError(f"input {line}: its name tells no format: give --format")
        return [(e, form) for e, form in named if form]
    wanted = _parts(_absolute(source.line))[len(source.base) :]  # of a glob: `.cache/*.tar` asks for hidden ones
    if not any(part.startswith((".", "_")) for part in wanted):
        entries = [e for e in entries if not _is_hidden(_parts(e.url)[len(source.base) :])]
    forms = [_format_of(e.url) for e in entries]
    if format is None and "webdataset" in forms and "parquet" in forms:
        raise UsageError(f"input {line}: holds tars and Parquet files: give --format webdataset or parquet")
    chosen = format or next((form for form in FORMATS if form in forms), None)
    matching = [e for e, form in zip(entries, forms, strict=True) if form == chosen]
    if chosen and not matching and source.kind == "glob":
        matching = entries
    if not chosen or not matching:
        raise UsageError(f"input {line}: nothing of {format or 'any known format'} among its {len(entries)} files")
    return [(e, chosen) for e in matching]


def _is_hidden(parts: tuple[str, ...]) -> bool:
    """`.git/…`, `._x.tar`, `_SUCCESS`: what tools leave beside the data."""
    return any(part.startswith(".") for part in parts) or parts[-1].startswith("_")


# Folders


def _slices(root: str, members: Iterable[Entry], common: int) -> list[tuple[str, str, Shard]]:
    """A folder's images as slices cut where a name's digest says: an image more or less changes its own slice only."""
    cut = len(root.rstrip("/")) + 1
    ordered = sorted((e.url[cut:], e) for e in members)
    slices = list[tuple[str, list[tuple[str, Entry]]]]()
    for path, entry in ordered:
        mark = digest(path)
        if int(mark, 16) % SLICE_IMAGES == 0:
            slices.append((mark, []))
        elif not slices:
            slices.append(("0" * 16, []))
        slices[-1][1].append((path, entry))
    named = []
    for mark, images in slices:
        etag = digest("folder", *(part for path, e in images for part in (path, e.size, e.etag)))
        below = "/".join(_parts(root)[common:])
        short, long = (posixpath.join(below, f"slice-{digits}") for digits in (mark[:8], mark))
        size, frozen = sum(e.size for _, e in images), tuple(e for _, e in images)
        named.append((short, long, Shard(name="", format="folder", url=root, size=size, etag=etag, members=frozen)))
    return named


# Names


def _distinct(named: list[tuple[str, str, Shard]]) -> list[Shard]:
    """The shards with their names; a name that is taken, or lies on another's path, keeps its ending."""
    counts = Counter(short for short, _, _ in named)
    folders = {parent for short, _, _ in named for parent in _parents(short)}
    shards = [
        replace(shard, name=_text(long if counts[short] > 1 or short in folders else short))
        for short, long, shard in named
    ]
    names = Counter(s.name for s in shards)
    folders = {parent for name in names for parent in _parents(name)}
    for shard in shards:
        if names[shard.name] > 1 or shard.name in folders or {".", ".."} & set(shard.name.split("/")):
            raise UsageError(f"{redact(shard.url)}: its name {shard.name} would not be unique: give inputs apart")
        _check_length(shard)
    return shards


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _check_length(shard: Shard) -> None:
    *above, last = (len(part.encode()) for part in shard.name.split("/"))
    if last > MAX_LAST_BYTES or max(above, default=0) > 255 or len(shard.name.encode()) > MAX_NAME_BYTES:
        raise UsageError(
            f"{redact(shard.url)}: its name is too long for the output's files: {last} bytes and "
            f"{len(shard.name.encode())} with its folders, at most {MAX_LAST_BYTES} and {MAX_NAME_BYTES} fit: rename it"
        )


def _text(name: str) -> str:
    """A name as valid Unicode on one line: bytes that were no UTF-8, and control characters, are spelled out."""
    if name.isprintable():
        return name
    valid = name.encode("utf-8", "backslashreplace").decode()
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in valid)


def check_columns(shards: Iterable[Shard], columns: Columns) -> None:
    """Refuses wrong columns before any work, by the first Parquet footer that can be read: raises `UsageError`."""
    for shard in shards:
        if shard.format == "parquet":
            try:
                with open_input(shard.url, shard.size) as raw:
                    schema = read_schema(raw)
            except (OSError, StorageError) as e:
                raise UsageError(f"{redact(shard.url)} cannot be read: {e}") from e
            if schema is not None:
                try:
                    find_columns(schema, columns)
                except UsageError as e:
                    raise UsageError(f"{redact(shard.url)}: {e}") from e
                return
