"""What a run has made so far, put every minute as a list beside the versions: a resumed run reads these, not footers.

It is a memory and no truth. What it says of a file counts only where a fresh listing shows that file with that size
(`versions.collect`), and a part that is gone or damaged costs the footers of its shards. Readers do not see the parts;
a commit deletes those that it has used, `gc` the others.
"""

import time
import uuid
from contextlib import suppress

import pyarrow as pa

from pipeline.errors import StorageError
from pipeline.flow import ordered
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root

PART_S, PART_SHARDS = 60.0, 10_000  # a part is put after so long, or with so many; a kill costs no more footers
AT_ONCE = 32  # requests


class Journal:
    """The files of one set's shards: of this run as they are added, and of runs before it that made no version."""

    def __init__(self, root: Root, set_name: str):
        self._root, self._prefix = root, f"versions/part-{set_name.rpartition('@')[2]}-"
        self._waiting: list[ShardFiles] = []
        self._used: list[str] = []  # parts that were read
        self._since = time.monotonic()

    def add(self, files: ShardFiles) -> None:
        self._waiting.append(files)
        if len(self._waiting) >= PART_SHARDS or time.monotonic() - self._since >= PART_S:
            self.put()

    def put(self) -> None:
        """Puts what waits as a part, if the store takes it: else it waits on, for the commit or the next time."""
        self._since = time.monotonic()
        if self._waiting:
            with suppress(OSError, StorageError):
                self._root.put_new(f"{self._prefix}{uuid.uuid4().hex}.parquet", FileList.of(self._waiting).encode())
                self._waiting = []

    def read(self) -> FileList:
        """The files of all parts that are there now, and those that wait."""
        self._used = [name for name in self._root.list("versions") if name.startswith(self._prefix)]
        parts = ordered(self._read, self._used, AT_ONCE)
        return FileList(pa.concat_tables([FileList.of(self._waiting).table, *parts]))

    def _read(self, part: str) -> pa.Table:
        try:
            return FileList.decode(self._root.read(part)).table
        except (OSError, ValueError, StorageError, pa.ArrowException):  # another run's commit used and deleted it
            return FileList.of([]).table

    def drop(self) -> None:
        """After a commit, which needs neither the parts that were read for it nor what waits.

        Where the store does not delete, as for a role that may not, they stay for `gc`: the commit stands.
        """
        self._waiting = []
        with suppress(OSError, StorageError):  # the first failure is enough: each may be one of 90 s
            for _ in ordered(self._root.delete, self._used, AT_ONCE):
                pass
