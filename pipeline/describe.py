"""The numbers of a model card for any timm name: no weights, and no download but the config of an `hf-hub:…`.

A name enters, a JSON-able dict leaves, with notes where a printed card may say otherwise. The model is built and run on
the meta device (shapes without numbers); the few that cannot run there run on the CPU with random weights. An unknown
name is refused with the nearest ones.
"""

import difflib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_deprecated_models, get_pretrained_cfg, load_model_config_from_hf, parse_model_name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import UsageError
from pipeline.features import heads_of

Result = TypeVar("Result")
aten = torch.ops.aten

# Digits after the point: 73.765 M parameters, 12.402 GMACs, 32.94 M activations. Printed cards round each to one digit.
PARAMS_DIGITS, GMACS_DIGITS, ACTIVATIONS_DIGITS = 3, 3, 2

# The matrix products, and which argument their left operand is; the right one follows it.
LEFT_OPERAND = {aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addmv: 1}

HEADS_NOTE = (
    "This model has two heads: the embedding is the mean of what enters them, the classes come from the mean of what "
    "leaves them; --outputs heads keeps both."
)
NO_FEATURES = "timm has no feature maps of this model."


def describe(model_name: str) -> dict[str, Any]:
    """What `model_name` costs, wants and gives, for one image at the model's own input size.

    Returns `model`, `params_m` (millions), `gmacs` (10⁹ multiply-adds of convolutions and all matrix products,
    attention's included), `activations_m` (millions of numbers that those give), `gmacs_without_attention` and
    `activations_m_without_attention` (the same, less the products of two activations), `input_size` [C, H, W],
    `resize` (the shorter side before the crop, or the box [H, W] that images are squashed or fitted to), `crop_pct`,
    `interpolation`, `mean`, `std`, `embedding_dim` (None for an encoder without a head), `classes`, `tokens` (the shape
    of `forward_features`, its batch of 1 included; a list of shapes where there are several), `features` ([C, H, W] of
    each map of `features_only=True`; empty where there is none) and `notes` (sentences; empty where there are none).

    Raises `UsageError` for a name that `check_model_name` refuses and for a model that does not run at its own size.
    """
    check_model_name(model_name)
    try:
        card, notes = _on_meta_or_cpu(lambda: _card(model_name))
    except RuntimeError as error:
        raise UsageError(f"model {model_name} cannot be built and run at its own input size: {error}") from error
    try:
        features = _on_meta_or_cpu(lambda: _feature_shapes(model_name, card["input_size"]))
    except RuntimeError:
        features, notes = [], [*notes, NO_FEATURES]
    return {**card, "features": features, "notes": notes}


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


def _card(model_name: str) -> tuple[dict[str, Any], list[str]]:
    """The card but for its feature maps, and its notes."""
    model = timm.create_model(model_name, pretrained=False).eval()
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    image = torch.zeros(1, *config["input_size"])
    with _Products(image) as run:
        model(image)
    every = _cost(run.products)
    weighted = _cost([product for product in run.products if not product.is_attention])
    tokens = model.forward_features(image)
    card = {
        "model": model_name,
        "params_m": round(sum(weight.numel() for weight in model.parameters()) / 1e6, PARAMS_DIGITS),
        "gmacs": round(every.gmacs, GMACS_DIGITS),
        "activations_m": round(every.activations_m, ACTIVATIONS_DIGITS),
        "gmacs_without_attention": round(weighted.gmacs, GMACS_DIGITS),
        "activations_m_without_attention": round(weighted.activations_m, ACTIVATIONS_DIGITS),
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
    return card, [
        *_attention_note(every, weighted),
        *([HEADS_NOTE] if len(heads_of(model)) > 1 and model.num_classes else []),
    ]


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


class _Cost(NamedTuple):
    gmacs: float
    activations_m: float


def _attention_note(every: _Cost, weighted: _Cost) -> list[str]:
    """Nothing where both round to what a card would print."""
    printed, shorter = ((f"{cost.gmacs:.1f}", f"{cost.activations_m:.1f}") for cost in (every, weighted))
    if printed == shorter:
        return []
    return [
        "Model cards made after fused attention kernels came often leave attention's products out: they print about "
        f"{shorter[0]} GMACs and {shorter[1]} M activations instead of {printed[0]} and {printed[1]}."
    ]


class _Product(NamedTuple):
    multiply_adds: int
    outputs: int
    is_attention: bool  # a matrix product of two activations, no weight among them


def _cost(products: list[_Product]) -> _Cost:
    multiply_adds = sum(product.multiply_adds for product in products)
    return _Cost(multiply_adds / 1e9, sum(product.outputs for product in products) / 1e6)


class _Products(TorchDispatchMode):
    """Notes all convolutions and matrix products that a model runs on `image`.

    Linear layers, einsum, recurrent layers and attention (under `SDPBackend.MATH`) are made of these.
    `FlopCounterMode` gives the same count, but fails on PiT: its module tracker does not see through tuples.
    """

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.products: list[_Product] = []
        # Where activations lie, a view with what it views: all that is made of the image, or given by a product (the
        # projection of a learned query). What is made of parameters and constants in another way (cast, copied,
        # interpolated, looked up) is still a weight.
        self._activations = WeakSet([image.untyped_storage()])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out, op = func(*args, **(kwargs or {})), func.overloadpacket
        if op is aten.convolution:
            image, weight, is_transposed = args[0], args[1], args[6]
            multiply_adds = (image if is_transposed else out).numel() * weight[0].numel()
            self.products.append(_Product(multiply_adds, out.numel(), is_attention=False))
        elif op in LEFT_OPERAND:
            operands = args[LEFT_OPERAND[op] :][:2]
            multiply_adds = out.numel() * operands[0].shape[-1]
            self.products.append(_Product(multiply_adds, out.numel(), all(map(self._is_activation, operands))))
        elif not any(map(self._is_activation, _tensors((args, kwargs)))):
            return out
        self._activations.update(tensor.untyped_storage() for tensor in _tensors(out))
        return out

    def _is_activation(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage() in self._activations


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
