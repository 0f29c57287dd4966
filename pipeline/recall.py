"""How good an index is: its ten nearest of a sample of queries against exact search, at each number of lists probed.

A neighbour counts as found where its exact cosine is at least that of the true tenth: of equal images any will do. What
an index gives beyond ten is weighed again by exact cosine, so recall with 50 candidates is the share of the true ten
among the 50.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import inverted
from pipeline.exact import Nearest
from pipeline.vectors import Vectors

TOP = 10
CANDIDATES = (10, 20, 50, 100)  # each is read from Parquet for every search: as few as will do
PROBED_SHARE = 0.25  # of the lists, at most: beyond, exact search is as quick
SETTLED = 0.9995  # of the first ten stay where twice the lists are probed: more would find nothing else
SAME = 1e-6  # cosines nearer than this are equal in float32


@dataclass(frozen=True)
class Point:
    """One way to search, and what it finds."""

    probes: int
    candidates: int
    recall: float


@dataclass(frozen=True)
class Measured:
    """`score_error`: the largest difference between a score of the index and the exact cosine."""

    points: list[Point]
    queries: int
    score_error: float

    def cheapest(self, recall: float) -> Point | None:
        """Fewest candidates first, as each is read from Parquet; then fewest lists."""
        return next((p for p in self.points if p.recall >= recall), None)

    @property
    def best(self) -> Point:
        return max(self.points, key=lambda p: p.recall)


def measure(vectors: Vectors, index: Any, queries: np.ndarray) -> Measured:
    """`queries`: int64 (Q,), numbers of the version's own vectors; one is no neighbour of itself. One pass over all."""
    unit = vectors.fetch(queries)
    probes, found = list[int](), list[tuple[np.ndarray, np.ndarray]]()
    for p in _steps(index.nlist):
        probes.append(p)
        found.append(_without(queries, *inverted.find(index, unit, CANDIDATES[-1] + 1, p)))
        if len(found) > 1 and (found[-1][1][:, :TOP] == found[-2][1][:, :TOP]).mean() >= SETTLED:
            break
    wanted = np.concatenate([numbers for _, numbers in found], axis=1)
    exact = Nearest(unit, TOP, queries, wanted).add_all(vectors.all_blocks())
    there = np.isfinite(exact.scores)
    least = np.where(there, exact.scores, np.inf).min(axis=1) - SAME  # of the true neighbours
    cosines = exact.wanted.reshape(len(queries), len(probes), CANDIDATES[-1])
    points = []
    for count in CANDIDATES:
        for at, p in enumerate(probes):
            hits = np.minimum((cosines[:, at, :count] >= least[:, None]).sum(axis=1), there.sum(axis=1))
            points.append(Point(p, count, int(hits.sum()) / int(there.sum()) if there.any() else 1.0))
    errors = [
        np.abs(scores - cosines[:, at])[numbers >= 0].max(initial=0) for at, (scores, numbers) in enumerate(found)
    ]
    return Measured(points, len(queries), float(max(errors)))


def _steps(lists: int) -> list[int]:
    """1, 2, 4 … of the lists; of few lists all, as an index of hundreds of vectors may need that."""
    most = max(1, int(lists * PROBED_SHARE)) if lists > 16 else lists
    return sorted({min(2**n, most) for n in range(most.bit_length() + 1)})


def _without(own: np.ndarray, scores: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row without the query itself, and so one shorter."""
    is_own = numbers == own[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    shape = (len(own), numbers.shape[1] - 1)
    return scores[~is_own].reshape(shape), numbers[~is_own].reshape(shape)
