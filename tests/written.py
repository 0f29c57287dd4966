"""Versions written from arrays: the output's own writers, and vectors that a test chose."""

from collections.abc import Mapping
from pathlib import Path

import made
import numpy as np

from pipeline import versions
from pipeline.backbone import Arrays
from pipeline.config import VectorSet
from pipeline.listing import Shard
from pipeline.lists import ShardFiles
from pipeline.output import Root
from pipeline.rows import ShardWriter
from pipeline.shards import Sample
from pipeline.storage import digest

CLASSES = 10
Rows = Mapping[str, tuple[np.ndarray, int]]  # key → vector, first class


def vectors_of(dim: int, **changes: object) -> VectorSet:
    return made.vector_set(**({"dim": dim, "classes": 10, "top_k": 2} | changes))


def shard_files(
    root: Root, vectors: VectorSet, name: str, rows: Rows, etag: str = "0" * 16, labels: tuple[str, ...] = ()
) -> ShardFiles:
    """One shard, published."""
    shard = Shard(name=name, format="webdataset", url=name, size=1, etag=etag)
    with ShardWriter(vectors, shard, labels, root.scratch()) as writer:
        values = np.array([v for v, _ in rows.values()], np.float32).reshape(-1, vectors.dim)
        first = np.array([c for _, c in rows.values()], np.int32)
        top = np.stack([first, (first + 1) % 10], axis=1)
        arrays = Arrays(values, np.linalg.norm(values, axis=1), top, np.full(top.shape, 0.5, np.float32))
        samples = [Sample(row=i, key=key) for i, key in enumerate(rows)]
        writer.rows(samples, [(8, 8)] * len(samples), arrays)
        return versions.publish(root, vectors.folder, shard, writer)[0]


def version(
    root: Root, vectors: VectorSet, shards: Mapping[str, Rows], etags: Mapping[str, str] = {}, **more: tuple[str, ...]
) -> versions.Version:
    """All shards, committed as the current version. `etags`: of shards whose input is another one than usual."""
    versions.create_set(root, vectors.folder, vectors.as_dict() | {"set": vectors.name})
    default = "0" * 16
    files = [shard_files(root, vectors, s, rows, etags.get(s, default), **more) for s, rows in shards.items()]
    committed = versions.commit(root, vectors.name, files)
    assert committed is not None
    return committed


def vector_set(dim: int, **changes: object) -> VectorSet:
    return made.vector_set(dim=dim, classes=CLASSES, top_k=2, **changes)  # type: ignore[arg-type]


def commit(root: Root, shards: Mapping[str, np.ndarray], **changes: object) -> versions.Version:
    """`shards`: name → float32 (n, D). Keys are the rows' numbers, as in `a/7`; an etag goes by the vectors."""
    dim = next(iter(shards.values())).shape[1]
    vectors = vector_set(dim, **changes)
    versions.create_set(root, vectors.folder, vectors.as_dict() | {"set": vectors.name})
    files = [_published(root, vectors, name, shards[name]) for name in sorted(shards)]
    version = versions.commit(root, vectors.name, files)
    assert version is not None
    return version


def _published(root: Root, vectors: VectorSet, name: str, rows: np.ndarray) -> versions.ShardFiles:
    shard = Shard(name=name, format="webdataset", url=name, size=0, etag=digest(rows.tobytes()))
    if (there := versions.published(root, vectors.folder, shard)) is not None:
        return there
    Path(root.scratch()).mkdir(parents=True, exist_ok=True)
    with ShardWriter(vectors, shard, tuple(f"class {n}" for n in range(CLASSES)), root.scratch()) as writer:
        for at in range(0, len(rows), 1000):
            block = rows[at : at + 1000].astype(np.float32)
            samples = [Sample(at + i, str(at + i)) for i in range(len(block))]
            writer.rows(samples, [(640, 480)] * len(block), arrays(block))
        return versions.publish(root, vectors.folder, shard, writer)[0]


def arrays(rows: np.ndarray) -> Arrays:
    """As a backbone gives them: the first class is the largest value's place."""
    top = np.stack([rows.argmax(axis=1) % CLASSES, rows.argmin(axis=1) % CLASSES], axis=1)
    score = np.tile(np.array([0.75, 0.25], np.float32), (len(rows), 1))
    return Arrays(rows, np.linalg.norm(rows, axis=1), np.hstack([top, top, top]), np.hstack([score, score, score]))
