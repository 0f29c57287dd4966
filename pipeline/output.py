"""An output root: objects by name, put whole and create-only, listed, read, deleted; on any fsspec store.

Local files are written beside, synced and hard-linked to their final name; buckets refuse a second object themselves.
"""

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from pipeline.retries import GIVE_UP_S, RangeReader, is_local, read_whole, retrying
from pipeline.storage import LOOK_GIVE_UP_S, below, children, info_of, is_bucket, object_info, resolve

T = TypeVar("T")


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
            found = self._do("list", "", lambda: children(self.fs, self.path, LOOK_GIVE_UP_S), LOOK_GIVE_UP_S)
        except FileNotFoundError:
            return []
        if any(info["name"] == self.path and info["type"] == "file" for info in found):
            raise NotADirectoryError(errno.ENOTDIR, "a file, no folder", self.url)
        cut = len(self.path.rstrip("/")) + 1
        return sorted({name for info in found if (name := info["name"][cut:].rstrip("/"))})

    def list_flat(self, folder: str) -> list[str]:
        """The objects that lie directly in `folder`, by path below the root; none where there is no such folder."""
        cut = len(self.path.rstrip("/")) + 1
        try:
            found = self._do("list", folder, lambda: children(self.fs, self.at(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(info["name"][cut:] for info in found if info["type"] == "file" and not info["name"].endswith("/"))

    def list(self, folder: str) -> dict[str, int]:
        """Path below the root → size in bytes, of every object below `folder`; empty where there is none."""
        cut = len(self.path.rstrip("/")) + 1

        def listing() -> dict[str, int]:
            return {info["name"][cut:]: int(info["size"] or 0) for info in below(self.fs, self.at(folder))}

        try:
            return self._do("list", folder, listing)
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int | None:
        """In bytes, as the store has it now; None where there is no such object."""
        try:
            return int(self._do("look at", name, lambda: object_info(self.fs, self.at(name)))["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        self.fs.invalidate_cache()  # s3fs believes an older listing that a new object is not there
        return read_whole(self.fs, self.at(name))[0]

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """`size`: in bytes, where it is known from a listing; it spares a request."""
        if is_local(self.fs):
            return open(self.at(name), "rb")
        if size is None:
            size = int(self._do("look at", name, lambda: object_info(self.fs, self.at(name)))["size"])
        return cast(BinaryIO, RangeReader(self.fs, self.at(name), size, block_bytes=2**20))

    def put_new(self, name: str, content: bytes | Path) -> bool:
        """Puts bytes, or a file in `scratch()`, under a name that nobody has; False, and nothing done, where it is.

        The object appears whole. Local disks, S3, Google and Azure refuse a second one themselves, so of any number of
        writers at once one gets True. Others are looked at first, and two writers in that moment can both get True:
        memory, SFTP, HDFS, disks without hard links, and S3's imitations for files of 100 MiB and more, which go in
        parts (SeaweedFS 4.48: 1 to 8 winners of 8; of single requests always one). Where the answer to a put that
        succeeded was lost, the retry finds the object and gives False: content under a name is the same whoever wrote
        it. A `Path` is left to its owner, who should delete it soon: on a disk without hard links it may be gone.
        """
        spilled: Path | None = None
        try:
            if is_local(self.fs):
                if isinstance(content, bytes):
                    content = spilled = self._do("write", name, partial(self._spill, content))
                return self._do("write", name, partial(_link_new, content, Path(self.at(name))))
            self._do("write", name, partial(self._put, name, content))
            return True
        except FileExistsError:
            return False
        finally:
            if spilled is not None:
                spilled.unlink(missing_ok=True)

    def _put(self, name: str, content: bytes | Path) -> None:
        if not is_bucket(self.fs):
            self._put_looking(self.at(name), content)
        elif isinstance(content, Path):
            self.fs.put_file(str(content), self.at(name), mode="create")
        else:
            self.fs.pipe_file(self.at(name), content, mode="create")

    def _put_looking(self, path: str, content: bytes | Path) -> None:
        # fsspec's own `mode="create"` looks too, and then fills the file under its final name.
        with suppress(FileNotFoundError):
            info_of(self.fs, path)
            raise FileExistsError(path)
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        part = self.at(f".tmp/{uuid.uuid4().hex}")
        self.fs.makedirs(self.at(".tmp"), exist_ok=True)
        if isinstance(content, Path):
            self.fs.put_file(str(content), part)
        else:
            self.fs.pipe_file(part, content)
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
