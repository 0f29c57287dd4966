"""Which things belong together, when told of a few at a time: a union-find over places 0…n-1, 8 bytes each."""

import numpy as np


class Forest:
    """Each place alone at first; a tree's root is its smallest place."""

    def __init__(self, count: int):
        self._parents = np.arange(count)

    def join(self, places: np.ndarray) -> None:
        """int64 (n,), at least one: they, and all that belongs to them, are one tree from now on."""
        roots = self.roots(places)
        self._parents[roots] = roots.min()

    def roots(self, places: np.ndarray) -> np.ndarray:
        """int64, of the shape of `places`: equal where they belong together."""
        roots = self._parents[places]
        while not np.array_equal(above := self._parents[roots], roots):
            roots = above
        self._parents[places] = roots  # so that the next way up is short
        return roots

    def groups(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The trees of two or more: their places, group after group; where each group ends; its least score.

        int64 (m,), int64 (g,) and float32 (g,). The largest first, those of one size by their least score, the highest
        first, then by their first place; each in the order of places. `scores`: float32, of every place.
        """
        roots = self.roots(np.arange(len(self._parents)))
        sizes = np.bincount(roots, minlength=len(roots))
        places = np.flatnonzero(sizes[roots] > 1)
        places = places[np.argsort(roots[places], kind="stable")]
        of_group = roots[places]
        starts = np.flatnonzero(np.diff(of_group, prepend=-1))
        if not len(starts):
            return places, np.empty(0, np.int64), np.empty(0, np.float32)
        sizes, least = sizes[of_group[starts]], np.minimum.reduceat(scores[places], starts)
        order = np.lexsort((-least, -sizes))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        places = places[np.argsort(np.repeat(rank, sizes), kind="stable")]
        return places, np.cumsum(sizes[order]), least[order]
