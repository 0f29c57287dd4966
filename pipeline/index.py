"""Builds the nearest-neighbour index of a version: train once → one part a file → merge → measure → publish.

Similarity is the cosine. A training and the parts made with it are used again by later versions of the set, so that a
version costs the files that it changed; a file that it does not list is not merged. The same command goes on with what
is there, and makes again what is gone or damaged. Recall is measured on the version's own vectors each time; where an
older training falls below what was asked, the version gets a training of its own, and where that does not reach it,
nothing is published.
"""

import hashlib
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import inverted, recall, stored_index
from pipeline.errors import UsageError
from pipeline.index_parts import Parts
from pipeline.output import Root
from pipeline.recall import Measured, Point
from pipeline.storage import digest
from pipeline.stored_index import StoredIndex, data_name, training_folder
from pipeline.vectors import ROW_BITS, Vectors
from pipeline.versions import OLD_SCRATCH_S, Version

FLAT_BYTES = 128 * 2**20  # of float32: a search through all of it takes some 20 ms
LISTS_PER_ROOT = 2  # lists for each square root of the vectors, as a power of two
LEAST_PER_LIST = 32  # vectors
SAMPLE_PER_LIST = 64  # vectors to train with; faiss itself wants 39 or more
SAMPLE_BYTES = 512 * 2**20  # … and fewer where there are very many lists
LEAST_SAMPLE_PER_LIST = 8  # below it there are fewer lists than the vectors want: each is a mean of these
SAMPLED_FILES = 512  # that are read for a sample; of small files as many as it needs
QUERIES = 500  # of ten neighbours each: recall to half a percent
GROWTH = 2  # an older training will do while it has at least half as many lists as the vectors want, at most twice
CODES = {"flat": "float32", "ivf": "sq8"}


class LowRecall(Exception):
    """The index finds too few of the true neighbours; nothing was published."""


@dataclass(frozen=True)
class Built:
    """`parts_made`: files encoded by this call. `trained`: whether the training was made by this call."""

    index: StoredIndex
    is_new: bool
    parts_made: int = 0
    trained: bool = False


def build(
    root: Root, version: Version, *, kind: str = "auto", least: float = 0.95, say: Callable[[str], None] = print
) -> Built:
    """Makes the version's index, or finds it where it is there. `least`: recall@10.

    Raises `UsageError`, `LowRecall`, `StorageError`.
    """
    if kind not in ("auto", *inverted.KINDS):
        raise UsageError(f"--kind {kind}: choose one of auto, {', '.join(inverted.KINDS)}")
    if not 0 < least <= 1:
        raise UsageError(f"--recall {least}: must be above 0 and at most 1")
    inverted.faiss()
    vectors = Vectors(root, version)
    if kind == "auto":
        kind = "flat" if len(vectors) * vectors.dim * 4 <= FLAT_BYTES else "ivf"
    known = [i for i in stored_index.read_all(root).values() if (i.set, i.kind) == (version.set, kind)]
    for index in reversed(known):
        is_ours = (index.files, index.version) == (version.files, version.version) and index.recall_at_10 >= least
        if is_ours and stored_index.bytes_there(root, index) == index.bytes:
            return Built(index, is_new=False)
    root.clear_scratch(OLD_SCRATCH_S)
    lists = lists_for(len(vectors), kind, vectors.dim)
    own = training_folder(version.set, kind, lists, version.files)
    older = known[-1] if known and root.size(known[-1].trained) is not None else None
    if older and older.training != own and lists <= GROWTH * older.lists and older.lists <= GROWTH * lists:
        try:
            return _build(vectors, kind, older.lists, older.training, least, say)
        except LowRecall as e:
            say(f"{e}, with the training of version {older.version}: training anew")
    return _build(vectors, kind, lists, own, least, say)


def lists_for(count: int, kind: str, dim: int) -> int:
    """How many lists so many vectors want: a power of two near twice their root, as far as a sample trains them."""
    if kind == "flat":
        return 1
    wanted = min(LISTS_PER_ROOT * math.sqrt(count), max(1, count / LEAST_PER_LIST))
    trained = max(1, SAMPLE_BYTES // (4 * dim * LEAST_SAMPLE_PER_LIST))
    return 2 ** min(max(0, round(math.log2(wanted))), math.floor(math.log2(trained)))


def _build(vectors: Vectors, kind: str, lists: int, folder: str, least: float, say: Callable[[str], None]) -> Built:
    root, version = vectors.root, vectors.version
    trained, is_trained_now = _training(vectors, kind, lists, folder, say)
    index = inverted.from_bytes(trained, f"{folder}/training.faiss")
    trained_sha256 = hashlib.sha256(trained).hexdigest()
    parts = Parts(vectors, index, folder, trained_sha256)
    say(f"index of version {version.version}: {vectors.files:,} files, {len(parts.missing):,} to encode")
    bytes_of_parts = parts.make()
    if parts.damaged:
        say(f"{len(parts.damaged):,} parts were damaged or of another training: made again")
    local = Path(root.scratch()) / f"{uuid.uuid4().hex}.lists"
    try:
        parts.merge(local)
        measured = recall.measure(vectors, inverted.open_lists(index, local), _queries(vectors))
        point = _chosen(measured, least)
        data, data_sha256 = data_name(folder, version.files), stored_index.sha256_of(local)
        stored = StoredIndex(
            version=version.version,
            set=version.set,
            files=version.files,
            kind=kind,
            metric="cosine",
            dim=vectors.dim,
            vectors=len(vectors),
            lists=lists,
            code=CODES[kind],
            training=folder,
            data=data,
            sha256={f"{folder}/training.faiss": trained_sha256, data: data_sha256},
            bytes=len(trained) + local.stat().st_size,
            bytes_of_parts=bytes_of_parts,
            probes=point.probes,
            candidates=point.candidates,
            recall_at_10=point.recall,
            queries=measured.queries,
            score_error=measured.score_error,
            points=[vars(p) | {"recall": round(p.recall, 6)} for p in measured.points],
            faiss=inverted.faiss().__version__,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        if not root.put_new(data, local) and stored_index.sha256_there(root, data) != data_sha256:
            root.delete(data)  # damaged, or of an earlier training; who searches it has it open, or a copy
            root.put_new(data, local)
    finally:
        local.unlink(missing_ok=True)
    stored_index.store(root, stored)
    made = len(parts.missing) + len(parts.damaged)
    return Built(stored, is_new=True, parts_made=made, trained=is_trained_now)


def _chosen(measured: Measured, least: float) -> Point:
    point = measured.cheapest(least)
    if point is None:
        best = measured.best
        raise LowRecall(
            f"recall@10 is {best.recall:.6g} at most, with {best.probes} lists probed and {best.candidates} candidates "
            f"({measured.queries} queries), and --recall asks for {least}"
        )
    return point


# training


def _training(vectors: Vectors, kind: str, lists: int, folder: str, say: Callable[[str], None]) -> tuple[bytes, bool]:
    """The trained index's bytes, those that are in the store, and whether they were made now."""
    root, name = vectors.root, f"{folder}/training.faiss"
    try:
        return root.read(name), False
    except FileNotFoundError:
        pass
    if kind == "flat":
        sample = np.empty((0, vectors.dim), np.float32)
    else:
        numbers = _sample(vectors, lists)
        say(f"training {lists:,} lists with {len(numbers):,} of {len(vectors):,} vectors")
        sample = vectors.fetch(numbers)
    root.put_new(name, inverted.to_bytes(inverted.train(sample, kind, lists)))
    return root.read(name), True  # another builder's, where it was first


def _queries(vectors: Vectors) -> np.ndarray:
    """int64: the version's own vectors that recall is measured with; the same ones each time."""
    return _drawn(vectors, min(QUERIES, max(1, len(vectors) // 10)), "queries")


def _sample(vectors: Vectors, lists: int) -> np.ndarray:
    """int64: what to train with, none of it among the queries."""
    count = min(SAMPLE_PER_LIST * lists, SAMPLE_BYTES // (4 * vectors.dim))
    found = np.setdiff1d(_drawn(vectors, count, "sample"), _queries(vectors))
    return found if len(found) else _queries(vectors)


def _drawn(vectors: Vectors, count: int, what: str) -> np.ndarray:
    """About `count` numbers, ascending, spread over the files by their rows; at random, the same ones each time."""
    rng = np.random.default_rng(int(digest(vectors.version.set, vectors.version.files, what), 16))
    shuffled = rng.permutation(np.flatnonzero(vectors.counts))
    enough = int(np.searchsorted(np.cumsum(vectors.counts[shuffled]), 2 * count)) + 1  # files of twice the rows
    files = np.sort(shuffled[: max(SAMPLED_FILES, enough)])
    rows = vectors.counts[files]
    shares = np.diff(np.floor(np.cumsum(rows) * min(1.0, count / rows.sum())).astype(np.int64), prepend=0)
    found = [
        (int(file) << ROW_BITS) + np.sort(rng.choice(n, min(n, share), replace=False))
        for file, n, share in zip(files, rows, shares, strict=True)
    ]
    return np.concatenate(found).astype(np.int64)
