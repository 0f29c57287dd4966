"""Versions of given vectors, written as a run writes them and committed, without images or a model."""

from collections.abc import Mapping
from pathlib import Path

import made
import numpy as np

from pipeline import index, versions
from pipeline.backbone import Arrays
from pipeline.config import VectorSet
from pipeline.listing import Shard
from pipeline.output import Root
from pipeline.rows import ShardWriter
from pipeline.shards import Sample
from pipeline.storage import digest

CLASSES = 10
DIM = 24  # of `clusters`


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


def clusters(count: int, seed: int, centres: int = 60) -> np.ndarray:
    """float32 (count, DIM): points about a few centres, of any length."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(0).standard_normal((centres, DIM))
    points = middle[rng.integers(centres, size=count)] + 0.4 * rng.standard_normal((count, DIM))
    return np.float32(points * rng.uniform(0.5, 2, (count, 1)))


def built(root: Root, version: versions.Version, kind: str = "ivf", least: float = 0.9) -> index.Built:
    return index.build(root, version, kind=kind, least=least, say=lambda line: None)


def four_parts() -> dict[str, np.ndarray]:
    """Three files of 700, 500 and 300 vectors, one of none."""
    return {"a": clusters(700, 1), "b/c": clusters(500, 2), "d": clusters(300, 3), "none": clusters(0, 4)}
