"""Ids of a version → the images behind them, out of the input's shards, as thumbnails.

Each shard is read as `embed` reads it, to the last row that is wanted of it, and no shard that has changed since.
"""

import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import Reject, StorageError, UsageError
from pipeline.fetching import fetch
from pipeline.flow import ordered
from pipeline.images import FORMATS
from pipeline.listing import Shard
from pipeline.shards import Sample, read_samples
from pipeline.shrinking import SIDE, Shrinker

SHARDS_AT_ONCE = 4
READ_BYTES = 2 * 2**30  # of images passed on the way, for all thumbnails of a page


@dataclass
class Originals:
    """`pictures`: JPEGs by id, of those that were found and decode. The counts are of ids wanted."""

    pictures: dict[str, bytes] = field(default_factory=dict)
    wanted: int = 0
    changed: int = 0  # their shard is not in the input any more, or is another object now
    unread: int = 0  # the store failed, or all that may be read was read


def check_input(shards: Sequence[Shard], names: Collection[str]) -> None:
    """Raises `UsageError` where none of the input's shards is among the version's, by `names`."""
    if names and not any(shard.name in names for shard in shards):
        raise UsageError(
            f"--input lists {len(shards)} shards, such as {shards[0].name if shards else 'none'}, and none of this "
            f"version's, such as {next(iter(names))}: give --input as it was given to embed"
        )


def originals(
    shards: Sequence[Shard], etags: Mapping[str, str], wanted: Mapping[str, str], side: int = SIDE
) -> Originals:
    """`etags`: of the version's shards, by name. `wanted`: id → shard. `side`: pixels of the longer one, at most."""
    by_name = {s.name: s for s in shards}
    ids = defaultdict[str, set[str]](set)
    for image_id, shard in wanted.items():
        ids[shard].add(image_id)
    usable = [name for name in ids if name in by_name and by_name[name].etag == etags.get(name)]
    found, budget = Originals(wanted=len(wanted)), _Budget(READ_BYTES)
    found.changed = len(wanted) - sum(len(ids[name]) for name in usable)
    with Shrinker(FORMATS, side) as shrink:
        for pictures, unread in ordered(
            lambda name: _read(by_name[name], ids[name], shrink, budget), usable, SHARDS_AT_ONCE
        ):
            found.pictures |= pictures
            found.unread += unread
    return found


def _read(shard: Shard, ids: set[str], shrink: Shrinker, budget: "_Budget") -> tuple[dict[str, bytes], int]:
    """JPEGs by id, and how many ids were not come to."""
    pictures, left = dict[str, bytes](), set(ids)
    try:
        for sample in read_samples(shard) if not budget.is_spent else ():
            budget.take(len(sample.image))
            image_id = f"{shard.name}/{sample.id_key}"
            if image_id in left:
                left.discard(image_id)
                if (image := _image(sample)) and (picture := shrink(image)):
                    pictures[image_id] = picture
            if not left or budget.is_spent:
                break
    except (StorageError, OSError):
        pass  # a page goes without those pictures, and tells how many
    return pictures, len(left)


def _image(sample: Sample) -> bytes:
    """Empty where it cannot be had any more."""
    if sample.url is None or sample.reject is not None:
        return sample.image
    try:
        return fetch(sample)
    except Reject:
        return b""


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
