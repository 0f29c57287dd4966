"""What lies below `index/`: which version has an index, what it is made of, and its copy on this node's disk.

    index/<version>-<digest>.json                                the index: written last, create-only, binds all below
    index/<set>/<training>/training.faiss                        centroids and the range of each dimension
    index/<set>/<training>/parts/<shard>-<etag>.parquet          one embeddings file as lists and codes
    index/<set>/<training>/<list of files>.lists                 the parts of one version, merged: what is searched

A training's name holds the digest of the list of files that it was made from, a part's the shard and its etag.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import inverted
from pipeline.cache import cache_folder, clear_old
from pipeline.errors import StorageError
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.retries import is_local
from pipeline.storage import digest
from pipeline.versions import Version

FOLDER = "index"
COPY_BYTES = 8 * 2**20
FORMAT = 1  # raise it with any change of what parts or lists hold


@dataclass(frozen=True, kw_only=True)
class StoredIndex:
    """One index, as its JSON says."""

    version: int
    set: str
    files: str  # the version's list of files, below the output root
    kind: str  # flat or ivf
    metric: str  # cosine
    dim: int
    vectors: int
    lists: int
    code: str  # float32 or sq8
    training: str  # its folder
    data: str  # the merged lists
    sha256: dict[str, str]  # of `training.faiss` and of the lists, by name
    bytes: int  # of both together
    bytes_of_parts: int
    probes: int  # lists to look into
    candidates: int  # to weigh again by exact cosine, for ten hits
    recall_at_10: float  # with these two, against exact search
    queries: int  # that it was measured with
    score_error: float  # the largest seen between a score of the index and the exact cosine
    points: list[dict[str, float]]  # what else was measured
    faiss: str
    created: str

    @property
    def trained(self) -> str:
        return f"{self.training}/training.faiss"


def training_folder(set_name: str, kind: str, lists: int, files: str) -> str:
    return f"{FOLDER}/{set_name}/{kind}{lists}-{_digest_of(files)}-{FORMAT}"


def part_name(training: str, shard: str, etag: str) -> str:
    return f"{training}/parts/{shard}-{etag}.parquet"


def data_name(training: str, files: str) -> str:
    return f"{training}/{_digest_of(files)}.lists"


def _digest_of(files: str) -> str:
    """Of a list of files, `versions/files-<digest>.parquet`."""
    return files.rpartition("-")[2].removesuffix(".parquet")


def index_names(
    version: Version, files: FileList, indexes: Mapping[str, StoredIndex], there: Iterable[str]
) -> Iterator[str]:
    """What below `index/` belongs to a version: its indexes, all that they are made of, and what may become one.

    Where it has none yet, it is the newest one of its set, for its training, and the parts made with it.
    """
    of_set = {name: i for name, i in indexes.items() if i.set == version.set}
    own = {name: i for name, i in of_set.items() if i.files == version.files} or dict(list(of_set.items())[-1:])
    unfinished = {
        "/".join(parts[:3])
        for name in there
        if len(parts := name.split("/")) > 3 and parts[:2] == [FOLDER, version.set]
        if f"-{_digest_of(version.files)}-" in parts[2]
    }
    keys = list(zip(files.column("shard").to_pylist(), files.column("etag").to_pylist(), strict=True))
    yield from own
    for training in {i.training for i in own.values()} | unfinished:
        yield f"{training}/training.faiss"
        yield data_name(training, version.files)
        for shard, etag in keys:
            yield part_name(training, shard, etag)


def store(root: Root, index: StoredIndex) -> None:
    content = json.dumps(asdict(index), indent=1).encode()
    root.put_new(f"{FOLDER}/{index.version:08d}-{digest(index.training, index.probes, index.candidates)}.json", content)


def read_all(root: Root) -> dict[str, StoredIndex]:
    """Every index of the output, by its JSON's name, oldest first. Raises `StorageError` where one is damaged."""
    found = {}
    for name in root.list(FOLDER):
        if name.count("/") == 1 and name.endswith(".json"):
            try:
                found[name] = StoredIndex(**json.loads(root.read(name)))
            except FileNotFoundError:  # `gc` deletes it meanwhile
                continue
            except (ValueError, TypeError) as e:
                raise StorageError(f"{name} is damaged ({e}): delete it and run `index` again") from e
    return dict(sorted(found.items(), key=lambda item: (item[1].version, item[1].created, item[0])))


def index_of(root: Root, version: Version) -> StoredIndex | None:
    """The newest index of just this version's files; None where there is none."""
    numbered = [i for i in read_all(root).values() if (i.set, i.files) == (version.set, version.files)]
    return numbered[-1] if numbered else None


def open_stored(root: Root, index: StoredIndex) -> Any:
    """faiss' own object, its lists mapped from disk. Of a remote output they are fetched once, and verified."""
    if is_local(root.fs):
        trained, data = Path(root.at(index.trained)), Path(root.at(index.data))
    else:
        trained, data = (_copied(root, name, index.sha256[name]) for name in (index.trained, index.data))
    try:
        opened = inverted.open_lists(inverted.from_bytes(trained.read_bytes(), index.trained), data)
    except FileNotFoundError as e:
        raise StorageError(f"{e.filename} is gone: run `index` again") from e
    if opened.ntotal != index.vectors or opened.d != index.dim:
        raise StorageError(f"{index.data} holds {opened.ntotal} vectors, its index {index.vectors}: run `index` again")
    return opened


def _copied(root: Root, name: str, sha256: str) -> Path:
    """The object in this node's cache, under its SHA-256."""
    folder = cache_folder() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / sha256
    if final.exists():
        final.touch()
        return final
    partial = folder / f".{sha256[:16]}.{uuid.uuid4().hex}"
    try:
        with root.open(name) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        if sha256_of(partial) != sha256:
            raise StorageError(f"{name} is damaged: its SHA-256 is not what its index says: delete it, `index` again")
        os.replace(partial, final)
    except FileNotFoundError:
        raise StorageError(f"{name} is gone: run `index` again") from None
    finally:
        partial.unlink(missing_ok=True)
    clear_old(folder)
    return final


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
