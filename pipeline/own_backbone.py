"""A set's own backbone, made again from its set.json, for one more image: the same weights, pixels and precision.

Vectors of two configurations must not be compared, so whatever cannot be had again as it was is refused. The image goes
through the very pipeline that embeds shards, as a shard of one.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.cache import cache_folder
from pipeline.config import Adapt, VectorSet
from pipeline.errors import StorageError, UsageError
from pipeline.images import Preprocessing
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.storage import redact
from pipeline.versions import Version, file_name


def described(root: Root, version: Version) -> VectorSet:
    """The set without what it keeps beside the embedding. Raises `StorageError` where set.json is damaged or gone."""
    name = f"sets/{version.set}/set.json"
    try:
        told: dict[str, Any] = json.loads(root.read(name))
        told.pop("set")
        if hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12] != version.set[-12:]:
            raise StorageError(f"{name} does not describe the set {version.set}")
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in told.pop("preprocessing").items()
        }
        told |= {"preprocessing": Preprocessing(**known), "tensors": (), "outputs": ("embedding",), "top_k": 0}
        return VectorSet(**told)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as e:
        raise StorageError(f"{name} is damaged, gone, or of another release: {e}") from e


def embed_image(root: Root, version: Version, image: bytes, weights: str | None = None) -> np.ndarray:
    """float32 (D,): the vector that `embed` stores for the image. Raises `UsageError` where it cannot be had.

    `weights`: as for `embed`; None: what this node keeps of the set's run, else the model's pretrained ones. They must
    be the set's own, by their SHA-256.
    """
    from pipeline import backbone, embed, engines, feed

    vectors = described(root, version)
    if vectors.decode == "cuda" and backbone.resolve_device("auto") != "cuda":
        raise UsageError(f"{version.set} was decoded on a CUDA device, and none is here")
    adapt = _adapt(vectors)
    staged = _staged(vectors, weights, adapt)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in" / "image.jpg"  # whatever it is: decoding goes by the bytes
        source.parent.mkdir()
        source.write_bytes(image)
        job = embed.Job(
            vectors=vectors,
            labels=(),
            weights=str(staged),
            adapt=adapt,
            output=f"{folder}/out",
            device=backbone.resolve_device("auto"),
            batch_size=1 if vectors.engine == "eager" else None,  # an engine is compiled for the shape of before
            decode_threads=1,
            torch_threads=1,
        )
        try:
            made = embed.backbone_of(job)
        except engines.Unavailable as e:
            raise UsageError(f"{version.set} was made with {vectors.engine}, which cannot be had here: {e}") from e
        if made.preprocessing != vectors.preprocessing:
            raise UsageError(f"{version.set}: timm prepares images for {vectors.model} in another way now")
        feeds = feed.LocalFeed(vectors, 1, made.batch_size, lambda shard: 0)
        receipts: list[embed.Receipt] = []
        (shard,) = list_shards([str(source.parent)], format="folder")
        embed.Embedder(job, made, feeds)([shard], receipts.append)
        return _vector(
            Root(job.output), vectors, receipts[0], file_name(vectors.folder, "rejects", shard.name, shard.etag)
        )


def _vector(root: Root, vectors: VectorSet, receipt: Any, rejects: str) -> np.ndarray:
    if receipt.error:
        raise UsageError(f"the image to search for cannot be embedded: {receipt.error}")
    with root.open(receipt.files.embeddings) as f:
        column = pq.read_table(f, columns=["embedding"])["embedding"].combine_chunks()
    if not len(column):
        with root.open(rejects) as f:
            why = pq.read_table(f).to_pylist()[0]
        raise UsageError(f"the image to search for gives no vector: {why['reason']}: {why['message']}")
    found = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if len(found) != vectors.dim:
        raise UsageError(f"the set has {vectors.dim}-d vectors, {vectors.model} gives {len(found)} here")
    return found


def _staged(vectors: VectorSet, weights: str | None, adapt: Adapt) -> Path:
    """The set's weights as a file on this node."""
    from pipeline import weights as w

    wanted = vectors.weights_sha256
    staged = cache_folder() / "weights" / f"{wanted}.safetensors"
    if weights is None and staged.exists():
        return staged
    try:
        module = w.load_module(vectors.model, weights or "pretrained", adapt)
    except UsageError as e:
        if weights is not None:
            raise
        raise UsageError(
            f"the set's weights are not on this node: name those it was embedded with as --weights ({e})"
        ) from e
    if (found := w.sha256(module.state_dict())) != wanted:
        what = f"--weights {redact(weights)}" if weights else f"the pretrained weights of {vectors.model}"
        raise UsageError(
            f"{what} are not the set's own (SHA-256 {found[:12]}…, the set's {wanted[:12]}…): vectors of two models "
            "must not be compared; name those that it was embedded with as --weights"
        )
    return w.stage(module, wanted)


def _adapt(vectors: VectorSet) -> Adapt:
    """What the set's run asked for beyond the model's own configuration."""
    import torch

    from pipeline.architecture import build

    with torch.device("meta"):
        own = build(vectors.model)
    channels, *size = own.pretrained_cfg["input_size"]  # type: ignore[index]
    wanted_channels, *wanted_size = vectors.preprocessing.input_size
    return Adapt(
        image_size=(wanted_size[0], wanted_size[1]) if list(wanted_size) != list(size) else None,
        in_chans=wanted_channels if wanted_channels != channels else None,
        num_classes=vectors.classes if vectors.classes != getattr(own, "num_classes", None) else None,
    )
