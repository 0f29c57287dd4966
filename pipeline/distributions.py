"""A version's rows → norms, classes, confidence and, where there are labels, accuracy: exact, from a few columns.

Vectors are not read. Of more rows or files than `MOST_ROWS` and `MOST_FILES` some files are left out, evenly over the
list, and `rows` is less than `of`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.flow import ordered
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.parquet_files import open_parquet

MOST_ROWS = 10_000_000  # 17 bytes each are held, and a column of 4 more while it is joined
MOST_FILES = 20_000  # at 16 a moment, a few minutes of a store's answers
AT_ONCE = 16
COLUMNS = ("label", "norm", "topk_index", "topk_score")
NORM_BINS, CONFIDENCE_BINS, CALIBRATION_BINS = 40, 25, 10
CLASSES, WORST, CONFUSIONS, GRID = 20, 12, 12, 10  # shown
LEAST_LABELLED = 5  # images of a class that can be among the worst: one of one is no finding


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """`edges` has one more than `counts`; what lies beyond them is in the first and the last."""

    edges: list[float]
    counts: list[int]
    least: float
    median: float
    most: float


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    index: int
    name: str
    images: int  # that have it first
    confidence: float  # mean score of these


@dataclass(frozen=True, kw_only=True)
class ClassAccuracy:
    index: int
    name: str
    images: int  # labelled so
    top1: float


@dataclass(frozen=True, kw_only=True)
class Confusion:
    true: str
    predicted: str
    images: int
    share: float  # of the images with that label


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Over the images whose label is one of the model's classes."""

    labelled: int
    top1: float
    top5: float | None  # None: fewer than five classes a row are kept
    classes: int  # with a label
    worst: list[ClassAccuracy]
    confusions: list[Confusion]
    grid_classes: list[str]  # those of the confusions
    grid: list[list[int]]  # images, true by predicted
    calibration: list[dict[str, float]]  # a bin each: images, confidence (mean), accuracy
    calibration_error: float  # mean distance of both, weighted by images


@dataclass(frozen=True, kw_only=True)
class Distributions:
    rows: int  # looked at
    of: int
    norm: Histogram | None
    confidence: Histogram | None  # of the first class; None: no classes are kept
    classes: list[ClassCount]  # the most frequent
    classes_predicted: int  # at least once
    classes_there: int
    accuracy: Accuracy | None


class _Columns(NamedTuple):
    """Of one file, or all: a row each."""

    norm: np.ndarray  # float32
    first: np.ndarray  # int32: the first class
    score: np.ndarray  # float32: its probability
    label: np.ndarray  # int32, -1 where unknown
    in_top5: np.ndarray  # bool: the label is among the first five
    top_k: int


@dataclass
class _Names:
    """The names of classes, read where a row has them; the files that have them are remembered by class.

    `rest`: gives the names of all, where that can be, for classes that no row has among its first k.
    """

    root: Root
    paths: list[str]
    rest: Callable[[], Sequence[str]]
    seen_in: dict[int, int] = field(default_factory=dict)  # class → place in `paths`
    known: dict[int, str] = field(default_factory=dict)

    def learn(self, classes: Iterable[int]) -> None:
        """Reads the names of these, a file for several; one that nobody names keeps its number."""
        wanted = {c for c in classes if c not in self.known}
        for place in sorted({self.seen_in[c] for c in wanted if c in self.seen_in}):
            with open_parquet(self.root, self.paths[place]) as file:
                table = file.read(columns=["topk_index", "topk_label"])
            index = _flat(table["topk_index"]).astype(np.int64)
            classes_here, firsts = np.unique(index, return_index=True)
            labels = table["topk_label"].combine_chunks().flatten()
            for c, at in zip(classes_here.tolist(), firsts.tolist(), strict=True):
                if c in wanted and len(labels) == len(index) and labels[at].is_valid:
                    self.known[c] = labels[at].as_py()
        if wanted - self.seen_in.keys():
            rest = self.rest()
            self.known |= {c: rest[c] for c in wanted - self.known.keys() if c < len(rest)}

    def __call__(self, index: int) -> str:
        return self.known.get(index, f"class {index}")

    def distinct(self, indices: list[int]) -> list[str]:
        """Two classes of ImageNet are called crane: such get their numbers."""
        names = [self(i) for i in indices]
        twice = {name for name, n in Counter(names).items() if n > 1}
        return [f"{name} ({i})" if name in twice else name for i, name in zip(indices, names, strict=True)]


def distributions(
    root: Root, files: FileList, classes: int, names_of_all: Callable[[], Sequence[str]] = tuple
) -> Distributions | None:
    """`classes`: of the model, 0 for one without. `names_of_all`: see `_Names.rest`. None of a version without rows."""
    table = files.table.filter(_has_rows(files))
    total = int(np.sum(table["rows"].to_numpy())) if table.num_rows else 0
    if not total:
        return None
    kept = _evenly(table["rows"].to_numpy())
    paths = table["embeddings"].take(kept).to_pylist()
    sizes = table["embeddings_bytes"].take(kept).to_pylist()
    names, top_k = _Names(root, paths, names_of_all), 0
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _Columns._fields if name != "top_k"}
    reads = ordered(lambda one: _read(root, *one), zip(paths, sizes, strict=True), AT_ONCE)
    for place, (columns, seen) in enumerate(reads):
        top_k = max(top_k, columns.top_k)
        for name, of_file in parts.items():
            of_file.append(getattr(columns, name))
        for c in seen:
            names.seen_in.setdefault(c, place)
    rows = _Columns(**{name: np.concatenate(parts.pop(name)) for name in list(parts)}, top_k=top_k)
    counts = np.bincount(rows.first, minlength=classes) if top_k else np.zeros(0, np.int64)
    return Distributions(
        rows=len(rows.norm),
        of=total,
        norm=_norms(rows.norm),
        confidence=_confidence(rows.score) if top_k else None,
        classes=_most_frequent(rows, counts, names),
        classes_predicted=int((counts > 0).sum()),
        classes_there=classes,
        accuracy=_accuracy(rows, classes, names) if top_k else None,
    )


def _has_rows(files: FileList) -> pa.Array:
    return pa.array(files.table["rows"].to_numpy() > 0, pa.bool_())


def _evenly(rows: np.ndarray) -> np.ndarray:
    """Places of files, evenly spaced, that together have no more than the most files and about the most rows."""
    count = min(len(rows), MOST_FILES, max(1, int(len(rows) * MOST_ROWS / max(1, int(rows.sum())))))
    return np.unique(np.floor((np.arange(count) + 0.5) * len(rows) / count).astype(np.int64))


def _read(root: Root, path: str, size: int) -> tuple[_Columns, list[int]]:
    """The file's columns, and the classes that any of its rows has."""
    with open_parquet(root, path, size) as file:
        table = file.read(columns=[c for c in COLUMNS if c in file.schema_arrow.names])
    n, norm = table.num_rows, table["norm"].to_numpy().astype(np.float32)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int32)
    if "topk_index" not in table.column_names:
        nothing = np.zeros(n, np.int32)
        return _Columns(norm, nothing, nothing.astype(np.float32), label, nothing.astype(bool), 0), []
    index = _flat(table["topk_index"]).reshape(n, -1)
    score = _flat(table["topk_score"]).reshape(n, -1)
    in_top5 = (index[:, :5] == label[:, None]).any(axis=1)
    seen: list[int] = np.unique(index).tolist()
    return _Columns(norm, index[:, 0].copy(), score[:, 0].copy(), label, in_top5, index.shape[1]), seen


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a list column without nulls, one after the other."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks] or [np.zeros(0)])


def _norms(norm: np.ndarray) -> Histogram:
    """Over the middle 99.8 %: one wild row must not squeeze the others into one bar."""
    low, high = (float(x) for x in np.quantile(norm, (0.001, 0.999)))
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return _histogram(norm, np.linspace(low, high, NORM_BINS + 1))


def _confidence(score: np.ndarray) -> Histogram:
    """From 0 to 1; of a model that is sure of nothing, to what it reaches."""
    most = float(score.max())
    return _histogram(score, np.linspace(0, 1.0 if most > 0.5 else max(most, 1e-6), CONFIDENCE_BINS + 1))


def _histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(
        edges=edges.tolist(),
        counts=counts.tolist(),
        least=float(values.min()),
        median=float(np.median(values)),
        most=float(values.max()),
    )


def _most_frequent(rows: _Columns, counts: np.ndarray, names: _Names) -> list[ClassCount]:
    top = [int(c) for c in np.argsort(-counts, kind="stable")[:CLASSES] if counts[c]]
    if not top:
        return []
    sums = np.bincount(rows.first, weights=rows.score, minlength=len(counts))
    names.learn(top)
    return [
        ClassCount(index=c, name=name, images=int(counts[c]), confidence=float(sums[c] / counts[c]))
        for c, name in zip(top, names.distinct(top), strict=True)
    ]


def _accuracy(rows: _Columns, classes: int, names: _Names) -> Accuracy | None:
    known = (rows.label >= 0) & (rows.label < classes)
    labelled = int(known.sum())
    if not labelled:
        return None
    label, first, score = rows.label[known].astype(np.int64), rows.first[known], rows.score[known]
    right = label == first
    bins, error = _calibration(score, right)
    of_class, hits = np.bincount(label, minlength=classes), np.bincount(label[right], minlength=classes)
    pairs, counts = np.unique(label[~right] * classes + first[~right], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs, counts = pairs[order], counts[order]
    worst = _worst(of_class, hits)
    grid = list(dict.fromkeys(int(c) for pair in pairs.tolist() for c in divmod(pair, classes)))[:GRID]
    names.learn({*worst, *grid, *(int(c) for pair in pairs[:CONFUSIONS].tolist() for c in divmod(pair, classes))})
    return Accuracy(
        labelled=labelled,
        top1=float(right.mean()),
        top5=float(rows.in_top5[known].mean()) if rows.top_k >= 5 else None,
        classes=int((of_class > 0).sum()),
        worst=[
            ClassAccuracy(index=c, name=name, images=int(of_class[c]), top1=float(hits[c] / of_class[c]))
            for c, name in zip(worst, names.distinct(worst), strict=True)
        ],
        confusions=[
            _confusion(pair // classes, pair % classes, n, of_class, names)
            for pair, n in zip(pairs[:CONFUSIONS].tolist(), counts[:CONFUSIONS].tolist(), strict=True)
        ],
        grid_classes=names.distinct(grid),
        grid=_grid(label, first, grid, classes),
        calibration=bins,
        calibration_error=error,
    )


def _worst(of_class: np.ndarray, hits: np.ndarray) -> list[int]:
    """Of the classes with enough images, or with any where none has."""
    enough = np.flatnonzero(of_class >= min(LEAST_LABELLED, int(of_class.max())))
    order = np.lexsort((-of_class[enough], hits[enough] / of_class[enough]))
    return [int(c) for c in enough[order][:WORST]]


def _confusion(true: int, predicted: int, images: int, of_class: np.ndarray, names: _Names) -> Confusion:
    one, other = names.distinct([true, predicted])
    return Confusion(true=one, predicted=other, images=images, share=float(images / of_class[true]))


def _grid(label: np.ndarray, first: np.ndarray, chosen: list[int], classes: int) -> list[list[int]]:
    place = np.full(classes, -1)
    place[chosen] = np.arange(len(chosen))
    both = (place[label] >= 0) & (place[first] >= 0)
    flat = place[label[both]] * len(chosen) + place[first[both]]
    cells: list[list[int]] = np.bincount(flat, minlength=len(chosen) ** 2).reshape(len(chosen), -1).tolist()
    return cells


def _calibration(score: np.ndarray, right: np.ndarray) -> tuple[list[dict[str, float]], float]:
    """Equal bins of confidence; those without images are left out."""
    place = np.minimum((score * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    images = np.bincount(place, minlength=CALIBRATION_BINS)
    sums = {
        "confidence": np.bincount(place, weights=score, minlength=CALIBRATION_BINS),
        "accuracy": np.bincount(place, weights=right, minlength=CALIBRATION_BINS),
    }
    bins: list[dict[str, Any]] = [
        {"images": int(images[i]), **{name: float(values[i] / images[i]) for name, values in sums.items()}}
        for i in np.flatnonzero(images)
    ]
    error = sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(score)
    return bins, float(error)
