"""A set's own backbone, made again from its set.json, for one more image: the same weights, pixels and precision.

Vectors of two configurations must not be compared, so whatever cannot be had again as it was is refused.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config import Adapt
from pipeline.errors import Reject, StorageError, UsageError
from pipeline.images import Decoder, Preprocessing
from pipeline.output import Root
from pipeline.storage import redact
from pipeline.versions import Version


def described(root: Root, version: Version) -> dict[str, Any]:
    """The fields of the set's `VectorSet`, as set.json has them. Raises `StorageError` where it is damaged or gone."""
    name = f"sets/{version.set}/set.json"
    try:
        found = dict(json.loads(root.read(name)))
        found["preprocessing"]["input_size"], found["weights_sha256"]
        return found
    except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
        raise StorageError(f"{name} is damaged or gone: {e}") from e


def embed_image(root: Root, version: Version, image: bytes, weights: str | None = None) -> np.ndarray:
    """float32 (D,): the vector that `embed` would store for the image. Raises `UsageError` where it cannot be had.

    `weights`: as for `embed`; None: what this node keeps of the set's run, else the model's pretrained ones. They must
    be the set's own, by their SHA-256.
    """
    import torch

    from pipeline import backbone, engines

    told = described(root, version)
    model, device = str(told["model"]), backbone.resolve_device("cuda" if told["decode"] == "cuda" else "auto")
    preprocessing = _preprocessing(told)
    try:
        decode = Decoder(preprocessing, exif_orientation=bool(told["exif_orientation"]), how=told["decode"])
        pixels = decode(image).pixels
    except Reject as e:
        raise UsageError(f"the image to search for gives no vector: {e.reason}: {e.message}") from e
    module = _module(told, model, weights)
    if backbone.preprocessing_of(module) != preprocessing:
        raise UsageError(f"{version.set} cannot be made again: this timm prepares images for {model} in another way")
    try:
        made = backbone.Backbone(
            module, engine=told["engine"], precision=told["precision"], device=device, classes=False
        )
        vectors = made(torch.from_numpy(pixels[None]))
    except engines.Unavailable as e:
        raise UsageError(f"{version.set} was made with {told['engine']}, which cannot be had here: {e}") from e
    found = vectors.to_numpy().embedding[0]
    if len(found) != told["dim"]:
        raise UsageError(f"{version.set} has {told['dim']}-d vectors, {model} gives {len(found)} here")
    return found.astype(told["vector_type"]).astype(np.float32)


def _preprocessing(told: dict[str, Any]) -> Preprocessing:
    known = told["preprocessing"]
    return Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def _module(told: dict[str, Any], model: str, weights: str | None) -> Any:
    """The torch module with the set's weights."""
    from pipeline import weights as w
    from pipeline.cache import cache_folder

    wanted, adapt = str(told["weights_sha256"]), _adapt(told, model)
    staged = cache_folder() / "weights" / f"{wanted}.safetensors"
    if weights is None and staged.exists():
        return w.load_staged(model, staged, adapt)
    try:
        module = w.load_module(model, weights or "pretrained", adapt)
    except UsageError as e:
        if weights is not None:
            raise
        raise UsageError(
            f"the set's weights are not on this node: name them with --weights, as for `embed` ({e})"
        ) from e
    if (found := w.sha256(module.state_dict())) != wanted:
        what = f"--weights {redact(weights)}" if weights else f"the pretrained weights of {model}"
        raise UsageError(
            f"{what} are not the set's own (SHA-256 {found[:12]}…, the set's {wanted[:12]}…): vectors of two models "
            "must not be compared; name those that it was embedded with as --weights"
        )
    return module


def _adapt(told: dict[str, Any], model: str) -> Adapt:
    """What the set's run asked for beyond the model's own configuration."""
    import torch

    from pipeline.architecture import build

    with torch.device("meta"):
        own = build(model)
    channels, *size = own.pretrained_cfg["input_size"]  # type: ignore[index]
    wanted_channels, *wanted_size = told["preprocessing"]["input_size"]
    adapt = Adapt(num_classes=told["classes"]) if told["classes"] != getattr(own, "num_classes", None) else Adapt()
    if wanted_size != size:
        adapt = replace(adapt, image_size=(int(wanted_size[0]), int(wanted_size[1])))
    return replace(adapt, in_chans=int(wanted_channels)) if wanted_channels != channels else adapt
