"""A store of any number of shards and of their output, listed as S3 lists them, and without a byte behind the names.

What is put there is kept. A read of the shards or of their output is counted, and fails unless `footers` gives it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, ClassVar

import fsspec

from pipeline.embed import STAGES, Receipt
from pipeline.listing import Shard
from pipeline.lists import ShardFiles
from pipeline.rows import Counts
from pipeline.storage import digest
from pipeline.versions import file_name

INPUT, OUTPUT = "listed://in", "listed://out"
KINDS = {"embeddings": 2_000_000, "rejects": 3000}  # bytes of a file of each, and a little more


class ListedStore(fsspec.AbstractFileSystem):
    """`shards` tars below `listed://in`; below `listed://out` the files of the first `done` of the set `folder`."""

    protocol = ("listed", "gs")  # a bucket, whose `mode="create"` is its own
    shards: ClassVar[int] = 0
    done: ClassVar[int] = 0
    folder: ClassVar[str] = "sets/made@000000000000"
    objects: ClassVar[dict[str, bytes]] = {}
    calls: ClassVar[Counter[str]] = Counter()
    footers: ClassVar[Callable[[str], bytes] | None] = None

    @classmethod
    def empty(cls, shards: int, done: int = 0) -> None:
        cls.shards, cls.done, cls.footers = shards, done, None
        cls.objects.clear()
        cls.calls.clear()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("listed://").rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        return f"listed://{name}"

    def find(self, path: str, detail: bool = True, **_: Any) -> Any:
        self.calls["find"] += 1
        found = {info["name"]: info for info in self._below(f"{path}/")}
        return found if detail else list(found)

    def _below(self, folder: str) -> Iterator[dict[str, Any]]:
        if folder == "in/":
            yield from (_info(name_of(i), size_of(i), i) for i in range(self.shards))
        for kind in KINDS:
            if f"out/{self.folder}/{kind}/".startswith(folder):
                for i in range(self.done):
                    files = files_of(i)
                    yield _info(f"out/{files.names[kind]}", files.sizes[kind], i)
        yield from (_info(name, len(data), 0) for name, data in self.objects.items() if name.startswith(folder))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        self.calls["ls"] += 1
        inside = path.rstrip("/") + "/"
        names = {name.removeprefix(inside).split("/")[0] for name in self.objects if name.startswith(inside)}
        names |= {"sets"} if self.done and path == "out" else set()
        return [{"name": inside + name, "size": 0, "type": "directory"} for name in sorted(names)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.calls["info"] += 1
        if path in self.objects:
            return _info(path, len(self.objects[path]), 0)
        if path == "in":
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        if path in self.objects:
            self.calls["get"] += 1
            return self.objects[path][start:end]
        self.calls["read"] += 1
        if self.footers is None:
            raise AssertionError(f"{path} was read")
        return self.footers(path)[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.calls["put"] += 1
        if mode == "create" and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = bytes(value)

    def rm_file(self, path: str) -> None:
        self.calls["delete"] += 1
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)


def _info(name: str, size: int, i: int) -> dict[str, Any]:
    """As s3fs gives it, field for field."""
    return {
        "Key": name,
        "LastModified": datetime.fromtimestamp(1_700_000_000 + i, UTC),
        "ETag": f'"{i:032x}"',
        "ChecksumAlgorithm": ["CRC64NVME"],
        "ChecksumType": "FULL_OBJECT",
        "Size": size,
        "StorageClass": "STANDARD",
        "type": "file",
        "size": size,
        "name": name,
    }


def name_of(i: int) -> str:
    return f"in/{i // 1000:04d}/shard-{i:07d}.tar"


def size_of(i: int) -> int:
    return 100_000_000 + i % 9973


def files_of(i: int) -> ShardFiles:
    """The output of shard i, whose name and etag `list_shards` must find again."""
    shard, etag = name_of(i)[len("in/") : -len(".tar")], digest(digest(f"{i:032x}", size_of(i)), "webdataset")
    names = {kind: file_name(ListedStore.folder, kind, shard, etag) for kind in KINDS}
    rejects = {"corrupt": 1, "truncated": i % 2} if i % 5 == 0 else {}
    counts = Counts(1000, 1000 - sum(rejects.values()), rejects, 1000, i % 700, i % 900)
    return ShardFiles(shard, etag, names, {kind: size + i % 100 for kind, size in KINDS.items()}, counts)


def receipt_of(shard: Shard, files: ShardFiles) -> Receipt:
    """What one of eight workers says of that shard."""
    return Receipt(
        shard=shard.name,
        files=files,
        error=None,
        embedded=True,
        bytes_read=shard.size,
        seconds=dict.fromkeys(STAGES, 0.5),
        started=0.0,
        ended=2.0,
        worker=f"host:{int(shard.etag, 16) % 8}:0000",
    )


fsspec.register_implementation("listed", ListedStore, clobber=True)
