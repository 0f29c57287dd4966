"""Exact nearest neighbours by cosine: every vector is looked at, a block at a time, and the best of each query kept."""

from collections.abc import Iterable

import numpy as np

from pipeline.vectors import Block


class Nearest:
    """The best k of each query among the blocks so far: highest cosine first, of equal ones the lowest number.

    `queries`: float32 (Q, D), of length 1 or 0. `own`: int64 (Q,), the number that is no neighbour of each query, or
    -1. `wanted`: int64 (Q, C), numbers whose cosine is to be told whatever their rank; -1 for none.
    """

    def __init__(self, queries: np.ndarray, k: int, own: np.ndarray | None = None, wanted: np.ndarray | None = None):
        count = len(queries)
        self._queries = queries
        self._own = np.full(count, -1, np.int64) if own is None else own
        self.numbers = np.full((count, k), -1, np.int64)
        self.scores = np.full((count, k), -np.inf, np.float32)
        wanted = np.empty((count, 0), np.int64) if wanted is None else wanted
        self.wanted = np.full(wanted.shape, -np.inf, np.float32)
        self._order = np.argsort(wanted, axis=None, kind="stable")  # so that a block's are found by bisection
        self._sorted = wanted.reshape(-1)[self._order]

    def add(self, block: Block) -> None:
        scores = self._queries @ block.unit.T  # (Q, n)
        self._tell_wanted(block, scores)
        mine = np.flatnonzero((self._own >= block.first) & (self._own < block.first + len(block.unit)))
        scores[mine, self._own[mine] - block.first] = -np.inf
        better = scores > self.scores[:, -1:]  # equal ones come later, so with higher numbers
        for query in np.flatnonzero(better.any(axis=1)):
            self._merge(int(query), np.flatnonzero(better[query]), scores[query], block.first)

    def add_all(self, blocks: Iterable[Block]) -> "Nearest":
        for block in blocks:
            self.add(block)
        return self

    def _merge(self, query: int, rows: np.ndarray, scores: np.ndarray, first: int) -> None:
        found = np.concatenate([self.scores[query], scores[rows]])
        numbers = np.concatenate([self.numbers[query], first + rows])
        best = np.lexsort((numbers, -found))[: self.numbers.shape[1]]
        self.scores[query], self.numbers[query] = found[best], numbers[best]

    def _tell_wanted(self, block: Block, scores: np.ndarray) -> None:
        begin, end = np.searchsorted(self._sorted, [block.first, block.first + len(block.unit)])
        places = self._order[begin:end]
        if len(places):
            queries = places // self.wanted[0].size
            self.wanted.reshape(-1)[places] = scores[queries, self._sorted[begin:end] - block.first]
