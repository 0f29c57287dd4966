"""A job for tests that need no Ray: a tiny set, its backbone, and one call from shards to receipts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import oracle
import torch

from pipeline.backbone import Backbone, facts_of
from pipeline.config import Adapt, VectorSet
from pipeline.embed import Embedder, Job, Receipt
from pipeline.feed import LocalFeed
from pipeline.images import Decoded
from pipeline.listing import Shard, list_shards
from pipeline.lists import ShardFiles
from pipeline.rows import Counts

MODEL = "test_vit"


def vector_set(
    model: str = MODEL,
    outputs: tuple[str, ...] = ("embedding", "classes"),
    indices: tuple[int, ...] | None = None,
    names: tuple[str, ...] | None = None,
    **changes: object,
) -> VectorSet:
    facts = facts_of(oracle.shared(model), model, outputs, indices, names)
    fields: dict[str, object] = {
        "model": model,
        "architecture": model,
        "weights_sha256": "0" * 64,
        "preprocessing": facts.preprocessing,
        "exif_orientation": True,
        "precision": "fp32",
        "engine": "eager",
        "decode": "exact",
        "outputs": outputs,
        "tensors": facts.tensors,
        "pooling": facts.pooling,
        "dim": facts.dim,
        "classes": facts.classes,
        "top_k": 5,
        "labels_sha256": "",
        "labels_source": "none",
        "normalized": False,
        "vector_type": "float32",
    }
    return VectorSet(**(fields | changes))  # type: ignore[arg-type]


def job(output: Path | str, *, batch_size: int = 4, labels: tuple[str, ...] = (), **changes: object) -> Job:
    return Job(
        vectors=vector_set(**changes),  # type: ignore[arg-type]
        labels=labels,
        weights="",
        adapt=Adapt(),
        output=str(output),
        device="cpu",
        batch_size=batch_size,
        decode_threads=2,
        torch_threads=1,
    )


def embedder(
    job: Job, *, deaths: Callable[[str], int] = lambda shard: 0, net: torch.nn.Module | None = None, **settings: object
) -> Embedder:
    """`net`: the model with its weights; None: the oracle's."""
    vectors = job.vectors
    settings = {
        "batch_size": job.batch_size,
        "classes": bool(vectors.top_k),
        "tensors": vectors.tensors,
    } | settings
    backbone = Backbone(net or oracle.module(vectors.model), **settings)  # type: ignore[arg-type]
    return Embedder(job, backbone, LocalFeed(vectors, job.decode_threads, backbone.batch_size, deaths))


def receipts(embedder: Embedder, shards: Sequence[Shard]) -> list[Receipt]:
    """One a shard, in their order."""
    done: list[Receipt] = []
    embedder(shards, done.append)
    order = [s.name for s in shards]
    return sorted(done, key=lambda r: order.index(r.shard))


def embed(job: Job, shards: list[Shard] | Path) -> list[Receipt]:
    listed = list_shards([str(shards)]) if isinstance(shards, Path) else shards
    return receipts(embedder(job), listed)


def receipt(worker: str, start: float, end: float, rows: int, rejects: int = 0, **changes: object) -> Receipt:
    """As of a shard that took these seconds, by hand; without `seconds` and `cpu_s` no stage took any."""
    counts = Counts(rows + rejects, rows, {"corrupt": rejects} if rejects else {})
    files = ShardFiles("s", "e", {"embeddings": "a.parquet"}, {"embeddings": 1}, counts)
    fields: dict[str, object] = {
        "shard": "s",
        "files": files,
        "error": None,
        "embedded": True,
        "bytes_read": 1,
        "seconds": {},
        "started": start,
        "ended": end,
        "worker": worker,
    }
    return Receipt(**(fields | changes))  # type: ignore[arg-type]


def noise_for(backbone: Backbone, count: int) -> list[Decoded]:
    """`count` images as a decoder hands them on, of the size that the backbone takes: always the same."""
    size = (count, *backbone.preprocessing.input_size)
    return [Decoded(pixels, 9, 9) for pixels in np.random.default_rng(0).integers(0, 256, size, np.uint8)]
