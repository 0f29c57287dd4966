"""The numbers of a model card for any timm name: no weights, and no download but the config of an `hf-hub:…`.

A name enters, a JSON-able dict leaves. The model is built and run on the meta device (shapes without numbers); the
few that cannot run there run on the CPU with random weights. An unknown name is refused with the nearest ones.
"""

import difflib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_deprecated_models, get_pretrained_cfg, load_model_config_from_hf, parse_model_name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import UsageError

Result = TypeVar("Result")
aten = torch.ops.aten

# Digits after the point, as model cards print them: 73.765 M parameters, 12.402 GMACs, 32.94 M activations.
PARAMS_DIGITS, GMACS_DIGITS, ACTIVATIONS_DIGITS = 3, 3, 2


def describe(model_name: str) -> dict[str, Any]:
    """What `model_name` costs, wants and gives, for one image at the model's own input size.

    Returns `model`, `params_m`, `gmacs` (attention's products counted), `activations_m` (outputs of convolutions,
    linear layers and attention's products), `input_size` [C, H, W], `resize` (the shorter side before the crop, or
    the box [H, W] that images are squashed or fitted to), `crop_pct`, `interpolation`, `mean`, `std`,
    `embedding_dim` (None for an encoder without a head), `classes`, `tokens` (the shape of `forward_features`, its
    batch of 1 included; a list of shapes where there are several) and `features` ([C, H, W] of each map of
    `features_only=True`; empty where there is none).

    Raises `UsageError` for a name that `check_model_name` refuses and for a model that does not run at its own size.
    """
    check_model_name(model_name)
    try:
        card = _on_meta_or_cpu(lambda: _card(model_name))
    except RuntimeError as error:
        raise UsageError(f"model {model_name} cannot be built and run at its own input size: {error}") from error
    try:
        features = _on_meta_or_cpu(lambda: _feature_shapes(model_name, card["input_size"]))
    except RuntimeError:  # timm has no feature maps of it
        features = []
    return {**card, "features": features}


def check_model_name(name: str) -> None:
    """Raises `UsageError` unless timm can build `name`; the message holds the nearest names.

    Reads `config.json` of `local-dir:…` and `hf-hub:…` (the latter from the cache or the Hub), never weights.
    """
    try:
        source, architecture = parse_model_name(name)
        if source == "local-dir":
            architecture = json.loads((Path(architecture) / "config.json").read_bytes())["architecture"]
        elif source == "hf-hub":
            _, architecture, _ = load_model_config_from_hf(architecture)
    except KeyError as error:
        raise UsageError(f"model {name}: its config.json has no key {error}") from error
    except (OSError, ValueError) as error:  # no such folder or repository, no connection, not JSON, a wrong prefix
        raise UsageError(f"model {name}: {error}") from error
    if not _is_known(architecture):
        near = ", ".join(_nearest_names(architecture)) or "none"
        raise UsageError(f"timm {timm.__version__} has no model {architecture!r}; nearest names: {near}")


def _is_known(name: str) -> bool:
    architecture = name.partition(".")[0]
    if not timm.is_model(name) or get_deprecated_models().get(architecture, name) is None:  # None: removed from timm
        return False
    try:
        get_pretrained_cfg(name)
    except RuntimeError:  # the architecture is known, the tag is not
        return False
    return True


def _nearest_names(name: str) -> list[str]:
    """Up to five: the tags of a known architecture, else names spelled alike."""
    architecture = name.partition(".")[0]
    names = timm.list_models() + timm.list_pretrained()
    tags = [known for known in names if known.startswith(f"{architecture}.")]
    return difflib.get_close_matches(name, tags, 5, cutoff=0) or difflib.get_close_matches(name, names, 5)


def _on_meta_or_cpu(compute: Callable[[], Result]) -> Result:
    """Runs `compute` on the meta device, and on the CPU where it fails; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # MATH: products one by one
        try:
            with torch.device("meta"):
                return compute()
        except RuntimeError:  # NotImplementedError of a kernel, or a value read off a tensor without values
            with torch.device("cpu"):
                return compute()


def _card(model_name: str) -> dict[str, Any]:
    model = timm.create_model(model_name, pretrained=False).eval()
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    image = torch.zeros(1, *config["input_size"])
    with _Products() as products:
        model(image)
    tokens = model.forward_features(image)
    return {
        "model": model_name,
        "params_m": round(sum(weight.numel() for weight in model.parameters()) / 1e6, PARAMS_DIGITS),
        "gmacs": round(products.multiply_adds / 1e9, GMACS_DIGITS),
        "activations_m": round(products.outputs / 1e6, ACTIVATIONS_DIGITS),
        "input_size": list(config["input_size"]),
        "resize": _resize(config),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "embedding_dim": _embedding_dim(model, tokens),
        "classes": model.num_classes,
        "tokens": _shape(tokens),
    }


def _resize(config: dict[str, Any]) -> int | list[int]:
    """The target of timm's eval transform before its crop (`timm.data.transforms_factory.transforms_imagenet_eval`)."""
    height, width = (math.floor(side / config["crop_pct"]) for side in config["input_size"][1:])
    return height if height == width and config["crop_mode"] == "center" else [height, width]


def _embedding_dim(model: torch.nn.Module, tokens: Any) -> int | None:
    head: Any = model.forward_head
    if "pre_logits" not in inspect.signature(head).parameters:  # MobileNetV5's encoder
        return None
    try:
        return int(head(tokens, pre_logits=True).shape[-1])
    except NotImplementedError as error:
        if "does not support classification" in str(error):  # timm's word for an encoder without a head
            return None
        raise


def _shape(tokens: Any) -> list[Any]:
    return list(tokens.shape) if isinstance(tokens, torch.Tensor) else [_shape(part) for part in tokens]


def _feature_shapes(model_name: str, input_size: list[int]) -> list[list[int]]:
    model = timm.create_model(model_name, pretrained=False, features_only=True).eval()
    shapes = [list(fmap.shape[1:]) for fmap in model(torch.zeros(1, *input_size))]
    channels = model.feature_info.channels()  # Swin, MambaOut and Sequencer give their maps as [H, W, C]
    return [shape if shape[0] == count else [count, *shape[:-1]] for shape, count in zip(shapes, channels, strict=True)]


class _Products(TorchDispatchMode):
    """Counts multiply-adds and output elements of all convolutions and matrix products run within.

    Linear layers, einsum, recurrent layers and attention (under `SDPBackend.MATH`) are made of these.
    `FlopCounterMode` gives the same count, but fails on PiT: its module tracker does not see through tuples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds, self.outputs = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (multiply_adds := _multiply_adds(func.overloadpacket, args, out)) is not None:
            self.multiply_adds += multiply_adds
            self.outputs += out.numel()
        return out


def _multiply_adds(op: Any, args: tuple[Any, ...], out: Any) -> int | None:
    """None where `op` is neither a convolution nor a matrix product."""
    if op in (aten.mm, aten.bmm, aten.mv):
        return int(out.numel() * args[0].shape[-1])
    if op in (aten.addmm, aten.baddbmm, aten.addmv):
        return int(out.numel() * args[1].shape[-1])
    if op is aten.convolution:
        image, weight, transposed = args[0], args[1], args[6]
        return int((image if transposed else out).numel() * weight[0].numel())
    return None
