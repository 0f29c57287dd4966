"""Versions written from arrays: the output's own writers, and vectors that a test chose."""

from collections.abc import Mapping

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
