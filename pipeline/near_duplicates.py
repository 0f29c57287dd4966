"""Groups of images whose vectors are nearly the same: each vector's neighbours in the index, weighed by exact cosine.

Two images are in one group where a chain of pairs at or above the similarity leads from one to the other. A flat index
is compared with itself as a whole, so no such pair is missed. Of an ivf index each vector's neighbours are asked for,
and more of them while all that came are similar; a pair is missed where neither finds the other. What is held is a few
blocks, pairs up to a bound, and 12 bytes a vector, some 60 for a moment when the groups are told apart. Ids are read
when they are asked for, a block of members at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import inverted, stored_index
from pipeline.errors import UsageError
from pipeline.forest import Forest
from pipeline.index import FLAT_BYTES
from pipeline.output import Root
from pipeline.vectors import ROW_BITS, Vectors
from pipeline.versions import Version

NEIGHBOURS = (16, 128, 1024)  # asked for of each vector: more of those whose neighbours were all similar
LEAST_PROBES = 8
QUERIES_AT_ONCE = 2048
COMPARED_AT_ONCE = 8192
PAIR_BYTES = 256 * 2**20  # of vectors, that pairs are weighed with at once
LEAST_MARGIN = 0.01  # of an index's own scores: pairs so far below are weighed too
TOLD = ("id", "shard", "key", "width", "height")
MEMBERS = pa.schema(
    {"group": pa.int64(), "id": pa.string(), "score": pa.float32(), "shard": pa.string(), "key": pa.string()}
    | {"width": pa.int32(), "height": pa.int32()}
)
TOLD_AT_ONCE = 2**18  # members, as Arrow columns some 50 MB: each block may read ids of the whole version


@dataclass(frozen=True)
class Member:
    """`score`: its highest cosine to another of the group, of the pairs that were weighed."""

    score: float
    id: str
    shard: str
    key: str
    width: int
    height: int


@dataclass(frozen=True)
class Duplicates:
    """The groups, the largest first, those of one size by similarity; their members in the version's order.

    `numbers`, int64 (m,), and `scores`, float32 (m,), are the members', group after group; `ends`, int64 (g,), where
    each group ends there; `least`, float32 (g,), its lowest score. `cut`: vectors with 1024 similar ones or more.
    """

    vectors: Vectors
    numbers: np.ndarray
    scores: np.ndarray
    ends: np.ndarray
    least: np.ndarray
    how: str
    cut: int

    @property
    def count(self) -> int:
        """Of groups."""
        return len(self.ends)

    @property
    def images(self) -> int:
        """In any group."""
        return len(self.numbers)

    def sizes(self) -> np.ndarray:
        """int64 (g,)."""
        return np.diff(self.ends, prepend=0)

    def first(self, groups: int, members: int) -> list[list[Member]]:
        """Of the first groups the first members."""
        starts = (self.ends - self.sizes())[:groups].tolist()
        spans = [(at, min(at + members, end)) for at, end in zip(starts, self.ends.tolist(), strict=False)]
        places = np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in spans)])
        rows = iter(self.vectors.rows(self.numbers[places], TOLD))
        return [[Member(round(float(self.scores[at]), 6), **next(rows)) for at in range(*span)] for span in spans]

    def tables(self) -> Iterator[pa.Table]:
        """Every member as the columns of `MEMBERS`, groups from 1 on; a block of them at a time."""
        group_of = np.repeat(np.arange(1, self.count + 1), self.sizes())
        for at in range(0, self.images, TOLD_AT_ONCE):
            span = slice(at, at + TOLD_AT_ONCE)
            told = self.vectors.table(self.numbers[span], TOLD)
            columns = {name: told[name] for name in TOLD}
            columns |= {"group": pa.array(group_of[span], pa.int64()), "score": pa.array(self.scores[span])}
            yield pa.table([columns[name] for name in MEMBERS.names], schema=MEMBERS)


def near_duplicates(root: Root, version: Version, *, above: float = 0.95) -> Duplicates:
    """All groups of a version at a cosine of `above` or more. Raises `UsageError` for a large one without an index."""
    check_above(above)
    vectors = Vectors(root, version)
    index, groups, cut = stored_index.index_of(root, version), _Groups(vectors), 0
    if index is None and len(vectors) * vectors.dim * 4 > FLAT_BYTES:
        raise UsageError(f"{vectors.what} has no index: run `shard2vec index {root.url}` first")
    if index is None or index.kind == "flat":
        how = "every pair was compared"
        if index is None:
            blocks = list(vectors.all_blocks())
            numbers, unit = np.concatenate([b.numbers for b in blocks]), np.concatenate([b.unit for b in blocks])
        else:
            opened = stored_index.open_stored(root, index)
            numbers, unit = inverted.only_list(opened)
        _compare_all(numbers, unit, above, groups)
    else:
        how = f"{index.kind} index of version {version.version}, recall@10 {index.recall_at_10:.3f}"
        pairs = _Pairs(vectors, above, groups)
        least = above - max(LEAST_MARGIN, 2 * index.score_error)
        opened = stored_index.open_stored(root, index)
        cut = _join(vectors, opened, max(index.probes, LEAST_PROBES), least, pairs)
        pairs.weigh()
    return groups.told(how, cut)


def check_above(above: float) -> None:
    """Raises `UsageError`."""
    if not 0 < above <= 1:
        raise UsageError(f"--above {above}: must be above 0 and at most 1")


def _compare_all(numbers: np.ndarray, unit: np.ndarray, above: float, groups: "_Groups") -> None:
    for start in range(0, len(unit), QUERIES_AT_ONCE):
        queries = unit[start : start + QUERIES_AT_ONCE]
        for at in range(start, len(unit), COMPARED_AT_ONCE):
            scores = queries @ unit[at : at + COMPARED_AT_ONCE].T
            is_similar = scores >= above
            rows = np.arange(len(queries))
            inside = rows[(rows + start >= at) & (rows + start - at < scores.shape[1])]
            is_similar[inside, inside + start - at] = False  # each with itself
            for row in np.flatnonzero(is_similar.any(axis=1)):
                found = np.flatnonzero(is_similar[row])
                groups.add(int(numbers[start + row]), numbers[at + found], scores[row, found])


def _join(vectors: Vectors, index: object, probes: int, least: float, pairs: "_Pairs") -> int:
    """Gives `pairs` what the index finds for each vector; returns how many had more similar ones than it was asked."""
    cut = 0
    for block in vectors.all_blocks():
        for start in range(0, len(block.unit), QUERIES_AT_ONCE):
            span = slice(start, start + QUERIES_AT_ONCE)
            unit, own = block.unit[span], block.numbers[span]
            for count in NEIGHBOURS:
                scores, numbers = inverted.find(index, unit, count + 1, probes)
                is_similar = (scores >= least) & (numbers >= 0) & (numbers != own[:, None])
                rows, places = np.nonzero(is_similar)
                pairs.add(own[rows], numbers[rows, places])
                is_full = is_similar.sum(axis=1) >= count
                unit, own = unit[is_full], own[is_full]
                if not len(own):
                    break
            cut += len(own)
    return cut


class _Pairs:
    """Pairs of numbers that wait to be weighed by their exact cosine."""

    def __init__(self, vectors: Vectors, above: float, groups: "_Groups"):
        self._vectors, self._above, self._groups = vectors, above, groups
        self._most = max(1, PAIR_BYTES // (8 * vectors.dim))
        self._waiting = list[np.ndarray]()
        self._count = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        self._waiting.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1))
        self._count += len(a)
        if self._count >= self._most:
            self.weigh()

    def weigh(self) -> None:
        pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *self._waiting]), axis=0)
        self._waiting, self._count = [], 0
        for start in range(0, len(pairs), self._most):
            some = self._groups.apart(pairs[start : start + self._most])
            numbers, back = np.unique(some, return_inverse=True)
            unit, back = self._vectors.fetch(numbers), back.reshape(-1, 2)
            scores = np.einsum("ij,ij->i", unit[back[:, 0]], unit[back[:, 1]])
            is_similar = scores >= self._above
            some, scores = some[is_similar], scores[is_similar]
            firsts = np.flatnonzero(np.diff(some[:, 0], prepend=-1))
            for begin, end in zip(firsts, np.append(firsts[1:], len(some)), strict=False):
                self._groups.add(int(some[begin, 0]), some[begin:end, 1], scores[begin:end])


class _Groups:
    """Which vectors belong together, by their places in the version."""

    def __init__(self, vectors: Vectors):
        self._vectors = vectors
        self._firsts = np.concatenate([[0], np.cumsum(vectors.counts)])  # place of each file's first vector
        self._forest = Forest(len(vectors))
        self._scores = np.zeros(len(vectors), np.float32)

    def add(self, number: int, others: np.ndarray, scores: np.ndarray) -> None:
        """`others`: all similar to it, each once."""
        place, places = self._places(np.array([number])), self._places(others)
        self._scores[place] = max(self._scores[place[0]], scores.max())
        self._scores[places] = np.maximum(self._scores[places], scores)
        self._forest.join(np.concatenate([place, places]))

    def apart(self, pairs: np.ndarray) -> np.ndarray:
        """Of the pairs, int64 (n, 2), those that are not in one group already."""
        roots = self._forest.roots(self._places(pairs))
        return pairs[roots[:, 0] != roots[:, 1]]

    def told(self, how: str, cut: int) -> Duplicates:
        places, ends, least = self._forest.groups(self._scores)
        files = np.searchsorted(self._firsts, places, side="right") - 1
        numbers = (files << ROW_BITS) + places - self._firsts[files]
        return Duplicates(self._vectors, numbers, self._scores[places], ends, least, how, cut)

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        return self._firsts[numbers >> ROW_BITS] + (numbers & (2**ROW_BITS - 1))
