"""What is done, and what is committed.

A shard is done when its embeddings file lies under the name that (set, shard, input etag) gives; nothing else is
remembered. A version is a numbered JSON, put create-only, that names a Parquet list of files of one set. Readers read
versions, never listings.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import VectorSet
from pipeline.errors import StorageError, UsageError
from pipeline.flow import ordered
from pipeline.listing import Shard
from pipeline.lists import ROWS_AT_ONCE, FileList, ShardFiles
from pipeline.output import Root
from pipeline.rows import Counts, ShardWriter
from pipeline.storage import digest
from pipeline.tensor_rows import PREFIX

OURS = {"sets", "versions", "reports", "index", ".tmp"}  # what may lie in an output root
FOOTERS_AT_ONCE = 32
OLD_SCRATCH_S = 7 * 86400  # local files of killed writers; a slow model may be at one shard for hours
COMMIT_TRIES = 20  # each lost race means that another driver committed


@dataclass(frozen=True, kw_only=True)
class Version:
    """One committed version, as its JSON says."""

    version: int
    set: str
    files: str  # the Parquet list, below the output root
    shards: int
    samples: int
    rows: int
    rejects: dict[str, int]
    created: str
    removed: list[str] = field(default_factory=list)  # shards of the version before that are gone from the input
    rolled_back: dict[str, Any] = field(default_factory=dict)  # to which version and from what: `rollback.roll_back`


def file_name(folder: str, kind: str, shard: str, etag: str) -> str:
    return f"{folder}/{kind}/{shard}-{etag}.parquet"


# one shard


def publish(root: Root, folder: str, shard: Shard, writer: ShardWriter) -> tuple[ShardFiles, bool]:
    """Puts what is beside the embeddings, then these, create-only; returns the published files and whether ours.

    The embeddings file is the commit of the shard and names the others.
    """
    names, sizes = {}, {}
    for kind in writer.beside:
        names[kind], sizes[kind] = _publish_beside(root, folder, kind, shard, writer)
    local = writer.finish_embeddings(names)
    embeddings = file_name(folder, "embeddings", shard.name, shard.etag)
    names, sizes = names | {"embeddings": embeddings}, sizes | {"embeddings": local.stat().st_size}
    if root.put_new(embeddings, local):
        return ShardFiles(shard.name, shard.etag, names, sizes, writer.counts), True
    files = published(root, folder, shard)
    if files is None:
        raise StorageError(f"{embeddings} was there and is gone: something else deletes in this output")
    return files, False


def _publish_beside(root: Root, folder: str, kind: str, shard: Shard, writer: ShardWriter) -> tuple[str, int]:
    """One file beside the embeddings; its name and size. An unfinished attempt may have left it there already.

    Where that one holds other rows (a URL failed then and not now), ours gets a name of its own.
    """
    local, rows = writer.finish(kind), writer.digest(kind)
    size = local.stat().st_size
    name = file_name(folder, kind, shard.name, shard.etag)
    if root.put_new(name, local):
        return name, size
    if _rows_of(root, name) != rows:
        name = file_name(folder, kind, shard.name, f"{shard.etag}-{digest(rows)}")
        root.put_new(name, local)
    return name, _size(root, name)  # another version of a package writes other bytes of the same rows


def _rows_of(root: Root, name: str) -> str | None:
    """The digest of a published file's rows; None of a damaged one."""
    with root.open(name) as f:
        try:
            return (pq.read_metadata(f).metadata or {}).get(f"{PREFIX}rows_sha256".encode(), b"").decode()
        except (ValueError, pa.ArrowException):
            return None


def _size(root: Root, name: str) -> int:
    with root.open(name) as f:
        return f.seek(0, 2)


def published(root: Root, folder: str, shard: Shard) -> ShardFiles | None:
    """The shard's files if they are there; reads no more than a footer."""
    try:
        return read_files(root, file_name(folder, "embeddings", shard.name, shard.etag))
    except FileNotFoundError:
        return None


def read_files(root: Root, embeddings: str) -> ShardFiles:
    """What a published embeddings file says of itself and of its shard's others; `StorageError` where it is damaged."""
    with root.open(embeddings) as f:
        size = f.seek(0, 2)
        try:
            metadata = pq.read_metadata(f)
            ours = {k.decode().removeprefix(PREFIX): v.decode() for k, v in (metadata.metadata or {}).items()}
            counts = Counts(**json.loads(ours["counts"]))
            shard, etag, beside = ours["shard"], ours["input_etag"], dict(json.loads(ours["files"]))
        except (KeyError, TypeError, ValueError, pa.ArrowException) as e:
            why = " ".join(str(e).split())[:200]
            raise StorageError(f"{embeddings} is damaged or no file of ours ({why}): delete it and run again") from e
    if counts.rows != metadata.num_rows:
        raise StorageError(f"{embeddings} holds {metadata.num_rows} rows, its metadata says {counts.rows}")
    sizes = {"embeddings": size}
    for kind, name in beside.items():
        try:
            sizes[kind] = _size(root, name)
        except FileNotFoundError:
            raise StorageError(f"{name} is gone: delete {embeddings} to have its shard embedded again") from None
    return ShardFiles(shard, etag, {"embeddings": embeddings, **beside}, sizes, counts)


# the output


def open_output(url: str) -> Root:
    """The output root. Raises `UsageError` where it is a file or holds other things."""
    root = Root(url)
    try:
        strangers = [name for name in root.top() if name not in OURS]
    except NotADirectoryError:
        raise UsageError(f"output {root.url} is a file: name a folder") from None
    except (PermissionError, StorageError) as e:
        raise UsageError(f"output {root.url} cannot be listed: {e}") from e
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise UsageError(f"output {root.url} holds other things ({', '.join(strangers[:3])}{more}): choose another")
    return root


def existing_output(url: str) -> Root:
    """An output that some run has written. Raises `UsageError` otherwise."""
    root = open_output(url)
    if not root.top():
        raise UsageError(f"{root.url} holds no output of ours: run `shard2vec embed --output {root.url}` first")
    return root


def create_set(root: Root, folder: str, description: dict[str, Any]) -> None:
    """Puts set.json, the first thing a run writes. Raises `UsageError` where writing is not allowed."""
    content = json.dumps(description, indent=1, sort_keys=True).encode()
    try:
        if not root.put_new(f"{folder}/set.json", content) and root.read(f"{folder}/set.json") != content:
            raise UsageError(f"{root.at(folder)}/set.json describes another set: the output was altered")
    except (OSError, StorageError) as e:
        raise UsageError(f"output {root.url} cannot be written: {e}") from e


def described(root: Root, set_name: str) -> dict[str, Any]:
    """What set.json says: the fields of `config.VectorSet`. Raises `StorageError` where it is damaged or gone."""
    name = f"sets/{set_name}/set.json"
    try:
        found = json.loads(root.read(name))
        if missing := {f.name for f in fields(VectorSet)} - found.keys():
            raise KeyError(f"it lacks {', '.join(sorted(missing))}")
        return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as e:
        raise StorageError(f"{name} is damaged or gone: {e}") from e


def outputs_of(root: Root, version: Version) -> list[str]:
    """What the version's set holds: embedding, classes, tokens …"""
    return list(described(root, version.set)["outputs"])


def done(root: Root, folder: str) -> dict[str, int]:
    """Path → bytes of the embeddings files of a set, from one listing."""
    return {n: size for n, size in root.list(f"{folder}/embeddings").items() if n.endswith(".parquet")}


# versions


def numbers(root: Root) -> list[int]:
    """The committed versions' numbers, oldest first."""
    names = (name.removeprefix("versions/").removesuffix(".json") for name in root.list("versions"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_version(root: Root, number: int | None = None) -> Version | None:
    """A version, the current one by default; None where there is none yet. Raises `UsageError` for an unknown one."""
    known = numbers(root)
    if number is None:
        if not known:
            return None
        number = known[-1]
    elif number not in known:
        raise UsageError(f"{root.url} has no version {number}: it has {', '.join(map(str, known)) or 'none'}")
    name = version_name(number)
    try:
        return Version(**json.loads(root.read(name)))
    except (ValueError, TypeError) as e:
        raise StorageError(f"{name} is damaged: {e}") from e


def current(root: Root, number: int | None = None) -> Version:
    """Like `read_version`, and a `UsageError` where nothing was committed yet."""
    version = read_version(root, number)
    if version is None:
        raise UsageError(f"{root.url} has no committed version yet: run the same `embed` again to finish it")
    return version


def read_list(root: Root, version: Version) -> FileList:
    """The files of a version, by shard. Raises `StorageError` where the list is damaged or gone."""
    try:
        content = root.read(version.files)
    except FileNotFoundError as e:
        raise StorageError(f"{version.files}, the list of version {version.version}, is gone") from e
    try:
        return FileList.decode(content)
    except (ValueError, OSError, pa.ArrowException) as e:  # OSError: a page that does not unpack
        raise StorageError(f"{version.files}, the list of version {version.version}, is damaged: {e}") from e


def collect(root: Root, folder: str, shards: Sequence[Shard], known: FileList) -> FileList:
    """The files of every shard of the listing, in its order, each seen in a fresh listing of the output.

    `known`: from receipts and the version before, believed where all its files are there with their sizes; the rest
    is read from footers. Raises `StorageError` naming a shard that has no files.
    """
    names = pa.chunked_array(
        [
            pa.array([file_name(folder, "embeddings", s.name, s.etag) for s in shards[at : at + ROWS_AT_ONCE]])
            for at in range(0, len(shards), ROWS_AT_ONCE)
        ],
        pa.string(),
    )
    sizes = sizes_of(root, f"{folder}/embeddings", names)
    if sizes.null_count:
        absent = shards[pc.index(pc.is_null(sizes), True).as_py()].name
        raise StorageError(f"{sizes.null_count} of {len(shards)} shards have no output yet, among them {absent}")
    found = known.table.take(pc.index_in(names, value_set=known.column("embeddings")))
    is_known = pc.equal(found["embeddings_bytes"], sizes)
    for kind in FileList(found).kinds()[1:]:
        is_there = pc.equal(found[f"{kind}_bytes"], sizes_of(root, f"{folder}/{kind}", found[kind]))
        is_known = pc.and_kleene(is_known, pc.or_kleene(pc.is_null(found[kind]), is_there))
    unknown = np.flatnonzero(~pc.fill_null(is_known, False).to_numpy())
    if len(unknown):
        read = FileList.of(ordered(lambda i: read_files(root, names[i].as_py()), unknown, FOOTERS_AT_ONCE))
        order = np.arange(len(shards))
        order[unknown] = len(shards) + np.arange(len(unknown))
        found = pa.concat_tables([found, read.table]).take(order)
    files = FileList(found)
    if wrong := files.wrong_sum():
        counts = wrong.counts
        raise StorageError(f"shard {wrong.shard}: {counts.samples} samples, {counts.rows} rows, {counts.rejects}")
    return files


def sizes_of(root: Root, folder: str, names: pa.ChunkedArray) -> pa.ChunkedArray:
    """The bytes of each named object in a fresh listing of the folder; null where it is not there."""
    there = root.list(folder)
    listed, sizes = pa.array(list(there), pa.string()), pa.array(list(there.values()), pa.int64())
    return pa.chunked_array([sizes]).take(pc.index_in(names, value_set=listed))


def commit(
    root: Root,
    set_name: str,
    files: Iterable[ShardFiles],
    stays: Callable[[Version | None], bool] = lambda before: False,
) -> Version | None:
    """Makes the files the current version, unless they already are; the version appears by one create-only write.

    None, and nothing done, where the version before `stays`; that is asked again after a lost race. It is None where
    there is no version yet.
    """
    listed = FileList.of(files)
    name = list_name(set_name, listed)
    total = listed.totals

    def after(before: Version | None) -> Version | None:
        if before is not None and before.set == set_name and before.files == name:
            return before
        if stays(before):
            return None
        root.put_new(name, listed.encode())
        return Version(
            version=before.version + 1 if before else 1,
            set=set_name,
            files=name,
            shards=len(listed),
            samples=total.samples,
            rows=total.rows,
            rejects=dict(sorted(total.rejects.items())),
            created=now(),
            removed=removed(root, before, set_name, set(listed.column("shard").to_pylist())),
        )

    return append(root, after)


def append(root: Root, after: Callable[[Version | None], Version | None]) -> Version | None:
    """Puts the version that `after` makes of the one before, create-only; it is asked again after a lost race.

    Where it gives None, or the version before, that is returned and nothing is put.
    """
    for _ in range(COMMIT_TRIES):
        before = read_version(root)
        version = after(before)
        if version is None or version == before:
            return version
        if root.put_new(version_name(version.version), json.dumps(asdict(version), indent=1).encode()):
            return version
    raise StorageError(f"lost the race for a version number {COMMIT_TRIES} times: too many drivers on {root.url}")


def list_name(set_name: str, files: FileList) -> str:
    """Where the list of these files of the set lies: equal lists have one name."""
    return f"versions/files-{digest(set_name, files.identity())}.parquet"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def removed(root: Root, before: Version | None, set_name: str, shards: set[str]) -> list[str]:
    """The shards of the version before that are not in the input any more; none where it was of another set."""
    if before is None or before.set != set_name:
        return []
    return sorted(set(read_list(root, before).column("shard").to_pylist()) - shards)


def version_name(number: int) -> str:
    return f"versions/{number:08d}.json"
