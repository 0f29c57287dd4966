"""Groups of images whose vectors are nearly the same: each vector's neighbours in the index, weighed by exact cosine.

Two images are in one group where a chain of pairs at or above the similarity leads from one to the other. A flat index
is compared with itself as a whole, so no such pair is missed. Of an ivf index each vector's neighbours are asked for,
and more of them while all that came are similar; a pair is missed where neither finds the other. What is held is a few
blocks, pairs up to a bound, and 12 bytes a vector.
"""

from dataclasses import dataclass

import numpy as np

from pipeline import inverted, stored_index
from pipeline.errors import UsageError
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


@dataclass(frozen=True)
class Member:
    """`score`: its highest cosine to another of the group, of the pairs that were weighed."""

    id: str
    score: float
    shard: str
    key: str
    width: int
    height: int


@dataclass(frozen=True)
class Duplicates:
    """`groups`: the largest first, each in the version's order. `cut`: vectors with 1024 similar ones or more."""

    groups: list[list[Member]]
    vectors: int
    how: str
    cut: int


def near_duplicates(root: Root, version: Version, *, above: float = 0.95) -> Duplicates:
    """All groups of a version at a cosine of `above` or more. Raises `UsageError` for a large one without an index."""
    if not 0 < above <= 1:
        raise UsageError(f"--above {above}: must be above 0 and at most 1")
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
    return Duplicates(groups.told(), len(vectors), how, cut)


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
    """Which vectors belong together: a forest over their places in the version."""

    def __init__(self, vectors: Vectors):
        self._vectors = vectors
        self._firsts = np.concatenate([[0], np.cumsum(vectors.counts)])  # place of each file's first vector
        self._parents = np.arange(len(vectors))
        self._scores = np.zeros(len(vectors), np.float32)

    def add(self, number: int, others: np.ndarray, scores: np.ndarray) -> None:
        """`others`: all similar to it, each once."""
        place, places = self._places(np.array([number])), self._places(others)
        self._scores[place] = max(self._scores[place[0]], scores.max())
        self._scores[places] = np.maximum(self._scores[places], scores)
        roots = self._roots(np.concatenate([place, places]))
        self._parents[roots] = roots.min()

    def apart(self, pairs: np.ndarray) -> np.ndarray:
        """Of the pairs, int64 (n, 2), those that are not in one group already."""
        roots = self._roots(self._places(pairs.reshape(-1))).reshape(-1, 2)
        return pairs[roots[:, 0] != roots[:, 1]]

    def told(self) -> list[list[Member]]:
        roots = self._roots(np.arange(len(self._parents)))
        sizes = np.bincount(roots, minlength=len(roots))
        places = np.flatnonzero(sizes[roots] > 1)
        files = np.searchsorted(self._firsts, places, side="right") - 1
        numbers = (files << ROW_BITS) + places - self._firsts[files]
        groups = dict[int, list[Member]]()
        for place, row in zip(places, self._vectors.rows(numbers, TOLD), strict=True):
            member = Member(score=round(float(self._scores[place]), 6), **row)
            groups.setdefault(int(roots[place]), []).append(member)
        return sorted(groups.values(), key=lambda group: -len(group))

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        return self._firsts[numbers >> ROW_BITS] + (numbers & (2**ROW_BITS - 1))

    def _roots(self, places: np.ndarray) -> np.ndarray:
        roots = self._parents[places]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[places] = roots  # so that the next way up is short
        return roots
