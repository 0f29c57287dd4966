"""Rows of a version → the images that they were made of, out of the input's shards, as thumbnails.

Each shard is read as `embed` reads it, to the last row that is wanted of it, and no shard that has changed since.
"""

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pipeline.errors import Reject, StorageError, UsageError
from pipeline.fetching import fetch
from pipeline.flow import ordered
from pipeline.images import FORMATS
from pipeline.listing import Shard
from pipeline.shards import read_samples
from pipeline.thumbnails import Thumbnailer

Place = tuple[str, int]  # shard, row
SHARDS_AT_ONCE = 4
READ_BYTES = 2 * 2**30  # of images passed on the way, for all thumbnails of a report


@dataclass
class Originals:
    """`pictures`: JPEGs of those that were found and decode. The counts are of places wanted."""

    pictures: dict[Place, bytes] = field(default_factory=dict)
    wanted: int = 0
    changed: int = 0  # their shard is not in the input any more, or is another object now
    unread: int = 0  # the store failed, or all that may be read was read


def originals(shards: Sequence[Shard], etags: dict[str, str], wanted: Collection[Place]) -> Originals:
    """`etags`: of the version's shards, by name. Raises `UsageError` where none of the input's shards is among them."""
    by_name = {s.name: s for s in shards}
    if etags and not by_name.keys() & etags.keys():
        raise UsageError(
            f"--input lists {len(shards)} shards, such as {next(iter(by_name), 'none')}, and none of this version's, "
            f"such as {next(iter(etags))}: give --input as it was given to embed"
        )
    rows = defaultdict[str, set[int]](set)
    for shard, row in wanted:
        rows[shard].add(row)
    found, budget = Originals(wanted=len(wanted)), _Budget(READ_BYTES)
    usable = [name for name in rows if name in by_name and by_name[name].etag == etags.get(name)]
    found.changed = sum(len(rows[name]) for name in rows if name not in usable)
    with Thumbnailer(FORMATS) as thumbnailer:
        for name, (pictures, unread) in zip(
            usable,
            ordered(lambda n: _read(by_name[n], rows[n], thumbnailer, budget), usable, SHARDS_AT_ONCE),
            strict=True,
        ):
            found.pictures |= {(name, row): picture for row, picture in pictures.items()}
            found.unread += unread
    return found


def _read(shard: Shard, rows: set[int], thumbnailer: Thumbnailer, budget: "_Budget") -> tuple[dict[int, bytes], int]:
    """JPEGs by row, and how many rows were not come to."""
    pictures, left = dict[int, bytes](), set(rows)
    try:
        if budget.is_spent:
            return pictures, len(left)
        for sample in read_samples(shard):
            budget.take(len(sample.image))
            if sample.row in left:
                left.discard(sample.row)
                if sample.url and sample.reject is None:
                    try:
                        sample.image = fetch(sample)
                    except Reject:
                        continue
                if sample.image and (picture := thumbnailer(sample.image)):
                    pictures[sample.row] = picture
            if not left or budget.is_spent:
                break
    except (StorageError, OSError):
        pass  # a report goes without those pictures, and tells how many
    return pictures, len(left)


class _Budget:
    """Bytes that all readers together may take."""

    def __init__(self, most: int):
        self._left, self._lock = most, threading.Lock()

    def take(self, count: int) -> None:
        with self._lock:
            self._left -= count

    @property
    def is_spent(self) -> bool:
        return self._left <= 0
