"""The nearest images of a version to a vector, by cosine: through its index, else by looking at every vector.

An index gives candidates; these are read from Parquet and ordered by their exact cosine, so scores are the same on
either way. Its recall was measured for ten hits; for more, as many times more lists are looked into, and always so
many that as many hits come as were asked for. An index of another version is never used: its rows are not those of the
files that readers see.
"""

import math
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np

from pipeline import inverted, stored_index
from pipeline.errors import StorageError, UsageError
from pipeline.exact import Nearest
from pipeline.output import Root
from pipeline.recall import TOP
from pipeline.retries import said
from pipeline.storage import read_bytes, redact
from pipeline.vectors import Vectors, to_unit
from pipeline.versions import Version

MAX_TOP = 1000
TOLD = ("id", "shard", "key", "row", "width", "height", "label", "topk_index", "topk_score", "topk_label")
MAX_VECTOR_BYTES = 2**20  # of a .npy file: one vector of any backbone


@dataclass(frozen=True)
class Hit:
    """`score`: the exact cosine. `class_index` and what follows: the first class; None where the set keeps none."""

    id: str
    score: float
    shard: str
    key: str
    row: int  # position in the shard
    width: int
    height: int
    label: int | None
    class_index: int | None
    class_score: float | None
    class_name: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """`how`: a sentence on what was searched. `recall`: recall@10 as it was measured; 1.0 where all was looked at.

    `is_exact`: whether every vector was looked at; a recall that was measured as 1 is no proof of that.
    """

    hits: list[Hit]
    how: str
    recall: float
    is_exact: bool


class Searcher:
    """One version, opened once for many queries. `exact`: look at every vector, index or not.

    Raises `UsageError` where the index needs faiss and it is not installed.
    """

    def __init__(self, root: Root, version: Version, *, exact: bool = False):
        self.vectors = Vectors(root, version)
        self.index = None if exact else stored_index.index_of(root, version)
        self._opened = stored_index.open_stored(root, self.index) if self.index else None
        count = f"each of its {len(self.vectors):,} vectors was looked at"
        why = "" if exact else f"version {version.version} has no index (`shard2vec index` makes one): "
        self.how = f"{why}{count}"
        if self.index:
            told = f"{self.index.vectors:,} vectors, recall@10 {self.index.recall_at_10:.3f}"
            self.how = f"{self.index.kind} index of version {version.version}, {told}"

    def __call__(self, query: np.ndarray, *, top: int = 10, without: str | None = None) -> Answer:
        """The `top` images nearest to `query`, (D,) of any length but 0. `without`: an id that is no hit.

        Raises `UsageError` for a query that does not fit.
        """
        check_top(top)
        unit = _checked(query, self.vectors)
        own = self.vectors.number_of(without) if without is not None else -1
        if self.index is None:
            nearest = Nearest(unit, top, np.array([own])).add_all(self.vectors.all_blocks())
            there = nearest.numbers[0] >= 0
            hits = hits_of(self.vectors, nearest.numbers[0][there], nearest.scores[0][there])
            return Answer(hits, self.how, 1.0, is_exact=True)
        found, probes = self._found(unit, top, top + (own >= 0))
        numbers = found[0][(found[0] >= 0) & (found[0] != own)]
        scores = self.vectors.fetch(numbers) @ unit[0]
        best = np.lexsort((numbers, -scores))[:top]
        how, is_exact = self.how, self.index.kind == "flat"
        if top > TOP and not is_exact:
            how += f" as measured for {TOP} hits; {probes:,} of {self.index.lists:,} lists were looked into for {top:,}"
        return Answer(hits_of(self.vectors, numbers[best], scores[best]), how, self.index.recall_at_10, is_exact)

    def candidates(self, unit: np.ndarray, top: int) -> np.ndarray:
        """int64 (Q, n): the numbers that are to be ordered by their exact cosine; -1 where there are not as many."""
        return self._found(unit, top, top)[0]

    def _found(self, unit: np.ndarray, top: int, least: int) -> tuple[np.ndarray, int]:
        """The candidates, and the lists that were looked into: twice as many for whom fewer than `least` were found."""
        index = self.index
        assert index is not None
        count = min(index.vectors, math.ceil(least * index.candidates / TOP))
        probes = min(index.lists, math.ceil(index.probes * max(1, top / TOP)))
        found = inverted.find(self._opened, unit, count, probes)[1]
        while probes < index.lists:
            short = np.flatnonzero((found >= 0).sum(axis=1) < min(least, index.vectors))
            if not len(short):
                break
            probes = min(index.lists, 2 * probes)
            found[short] = inverted.find(self._opened, unit[short], count, probes)[1]
        return found, probes

    def vector_of(self, wanted: str) -> np.ndarray:
        """The unit vector of an id, float32 (D,). Raises `UsageError` with similar ids where there is no such row."""
        return self.vectors.fetch(np.array([self.vectors.number_of(wanted)]))[0]

    def own_hit(self, wanted: str) -> Hit:
        """What is told of an id itself."""
        return hits_of(self.vectors, np.array([self.vectors.number_of(wanted)]), np.ones(1))[0]


def check_top(top: int) -> None:
    """Raises `UsageError`."""
    if not 1 <= top <= MAX_TOP:
        raise UsageError(f"--top {top}: must be 1 to {MAX_TOP}")


def search(
    root: Root, version: Version, query: np.ndarray, *, top: int = 10, without: str | None = None, exact: bool = False
) -> Answer:
    """One query of a `Searcher`."""
    return Searcher(root, version, exact=exact)(query, top=top, without=without)


def hits_of(vectors: Vectors, numbers: np.ndarray, scores: np.ndarray) -> list[Hit]:
    """In the order given."""
    return [
        Hit(
            id=row["id"],
            score=round(float(score), 6),
            shard=row["shard"],
            key=row["key"],
            row=row["row"],
            width=row["width"],
            height=row["height"],
            label=row["label"],
            class_index=_first(row, "topk_index"),
            class_score=_first(row, "topk_score"),
            class_name=_first(row, "topk_label"),
        )
        for row, score in zip(vectors.rows(numbers, TOLD), scores, strict=True)
    ]


def _first(row: dict[str, Any], column: str) -> Any:
    return (row.get(column) or [None])[0]


def _checked(query: np.ndarray, vectors: Vectors) -> np.ndarray:
    """float32 (1, D) of length 1."""
    if query.shape != (vectors.dim,):
        shape = "x".join(map(str, query.shape)) or "a number"
        raise UsageError(f"the vector to search for is {shape}, those of {vectors.what} have {vectors.dim} values")
    if not np.isfinite(query).all():
        raise UsageError("the vector to search for holds NaN or infinity")
    largest = np.abs(query).max()
    if not largest:
        raise UsageError("the vector to search for is zero: it has no direction, and so no neighbours")
    return to_unit((query / largest).astype(np.float32)[None])


# queries


def read_vector(url: str) -> np.ndarray:
    """One vector, float64 (D,), out of a .npy file of floats, (D,) or (1, D). Raises `UsageError`."""
    try:
        content = read_bytes(url)
    except (OSError, StorageError) as e:
        raise UsageError(f"--vector {redact(url)} cannot be read: {said(e)}") from e
    if len(content) > MAX_VECTOR_BYTES:
        raise UsageError(f"--vector {redact(url)} has {len(content):,} bytes: give a file of one vector")
    try:
        vector = np.load(BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as e:
        raise UsageError(f"--vector {redact(url)} is no .npy file: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
        kind = vector.dtype if isinstance(vector, np.ndarray) else "several arrays"
        raise UsageError(f"--vector {redact(url)} holds {kind}: floats are wanted")
    if vector.ndim == 2 and len(vector) == 1:
        vector = vector[0]
    if vector.ndim != 1:
        shape = "x".join(map(str, vector.shape)) or "a number"
        raise UsageError(f"--vector {redact(url)} holds {shape}: one vector is wanted, as (D,) or (1, D)")
    return vector.astype(np.float64)
