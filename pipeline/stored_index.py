"""What lies below `index/`: which version has an index, what it is made of, and its copy on this node's disk.

    index/<version>-<digest>.json                                the index: written last, create-only, binds all below
    index/<set>/<training>/training.faiss                        centroids and the range of each dimension
    index/<set>/<training>/parts/<shard>-<etag>.parquet          one embeddings file as lists and codes
    index/<set>/<training>/<list of files>.lists                 the parts of one version, merged: what is searched

A training's name holds the digest of the list of files that it was made from, a part's the shard and its etag. An
index counts where its training and its lists are there: what somebody deleted, `index` makes again.
"""

import hashlib
import json
import os
import re
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
COPY = re.compile("[0-9a-f]{64}")  # a copy's name: its SHA-256
FORMAT = 2  # raise it with any change of what parts or lists hold


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
    """Puts the index's JSON, in the place of a damaged one of its name too. Another content has another name.

    Indexes of a training or of lists that it found otherwise, and that are not there any more, go.
    """
    of_content = sorted(index.sha256.values())
    name = f"{_beginning(index.version)}{digest(index.training, index.probes, index.candidates, *of_content)}.json"
    content = json.dumps(asdict(index), indent=1).encode()
    if not root.put_new(name, content) and isinstance(_read(root, name), Exception):
        root.delete(name)
        root.put_new(name, content)
    for other, known in read_all(root).items():
        if any(known.sha256.get(object_name, sha256) != sha256 for object_name, sha256 in index.sha256.items()):
            root.delete(other)


def _beginning(version: int) -> str:
    return f"{FOLDER}/{version:08d}-"


def _read(root: Root, name: str) -> StoredIndex | Exception | None:
    """None where it is gone, and what is wrong with a damaged one."""
    try:
        return StoredIndex(**json.loads(root.read(name)))
    except FileNotFoundError:  # `gc` deletes it meanwhile
        return None
    except (ValueError, TypeError) as e:
        return e


def _read_each(root: Root) -> dict[str, StoredIndex | Exception]:
    names = (name for name in root.list_flat(FOLDER) if name.endswith(".json"))
    return {name: found for name in names if (found := _read(root, name)) is not None}


def _sorted(found: Mapping[str, StoredIndex | Exception]) -> dict[str, StoredIndex]:
    """Those that are not damaged, oldest first."""
    whole = {name: i for name, i in found.items() if isinstance(i, StoredIndex)}
    return dict(sorted(whole.items(), key=lambda item: (item[1].version, item[1].created, item[0])))


def read_all(root: Root) -> dict[str, StoredIndex]:
    """Every index of the output, by its JSON's name, oldest first. A damaged one is none."""
    return _sorted(_read_each(root))


def index_of(root: Root, version: Version) -> StoredIndex | None:
    """The newest index of just this version's files whose training and lists are there; None where there is none.

    Raises `StorageError` where there is but a damaged one of this version.
    """
    found = _read_each(root)
    for index in reversed(_sorted(found).values()):
        if (index.set, index.files) == (version.set, version.files) and bytes_there(root, index) is not None:
            return index
    for name, wrong in found.items():
        if isinstance(wrong, Exception) and name.startswith(_beginning(version.version)):
            raise StorageError(f"{name} is damaged ({wrong}): run `index` again")
    return None


def bytes_there(root: Root, index: StoredIndex) -> int | None:
    """Of its training and its lists, as they are in the store; None where one is gone."""
    trained, data = (root.size(name) for name in (index.trained, index.data))
    return None if trained is None or data is None else trained + data


def open_stored(root: Root, index: StoredIndex) -> Any:
    """faiss' own object, its lists mapped from disk. Of a remote output they are fetched once, and verified."""
    if is_local(root.fs):
        trained, data = Path(root.at(index.trained)), Path(root.at(index.data))
    else:
        trained, data = _copies(root, index)
    try:
        opened = inverted.open_lists(inverted.from_bytes(trained.read_bytes(), index.trained), data)
    except FileNotFoundError as e:
        raise StorageError(f"{e.filename} is gone: run `index` again") from e
    if opened.ntotal != index.vectors or opened.d != index.dim:
        told = f"{opened.ntotal} {opened.d}-d vectors, its index {index.vectors} of {index.dim}"
        raise StorageError(f"{index.data} holds {told}: delete it and run `index` again")
    return opened


def _copies(root: Root, index: StoredIndex) -> list[Path]:
    """Training and lists in this node's cache; of this output's, what no index names any more goes from there."""
    folder = cache_folder() / FOLDER / digest(root.url)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    copies = [_copied(root, name, folder / index.sha256[name]) for name in (index.trained, index.data)]
    if not before.issuperset(copies):
        named = {sha256 for i in (index, *read_all(root).values()) for sha256 in i.sha256.values()}
        for old in folder.iterdir():
            if COPY.fullmatch(old.name) and old.name not in named:
                old.unlink(missing_ok=True)  # who has it mapped keeps it
        for of_output in folder.parent.iterdir():
            if of_output.is_dir():
                clear_old(of_output)
    return copies


def _copied(root: Root, name: str, final: Path) -> Path:
    """The object as the file `final`, whose name is its SHA-256."""
    folder, sha256 = final.parent, final.name
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
    return final


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_there(root: Root, name: str) -> str | None:
    """Of an object as the store has it, all of which is read; None where it is gone."""
    try:
        with root.open(name) as opened:
            file: Any = opened  # which has `readinto` too, local or not
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
