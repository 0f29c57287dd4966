"""A timm architecture as its name says, or at another input size, channel or class count; and weights that fit it.

`build` gives the module, with its true input size in its `pretrained_cfg`. `load_strictly` fills it: position
embeddings are interpolated to the size, a first convolution is adapted to the channels, and everything else must fit
key by key. What could only be wrong without a word is refused with a `UsageError`.
"""

import sys
import warnings
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc
from timm.models import adapt_input_conv
from torch import nn

from pipeline.config import Adapt
from pipeline.errors import UsageError

NAMED_KEYS = 6  # keys spelled out in an error; the rest is counted
OWN = Adapt()
State = dict[str, torch.Tensor]
Grid = tuple[int, int] | None  # patches: rows, columns


def build(model: str, adapt: Adapt = OWN) -> nn.Module:
    """The architecture in eval mode, its weights as timm initialises them. Raises `UsageError` where it cannot be."""
    wanted: dict[str, Any] = {"in_chans": adapt.in_chans, "num_classes": adapt.num_classes}
    settings = {name: value for name, value in wanted.items() if value is not None}
    try:
        if adapt.image_size is None:
            module = timm.create_model(model, pretrained=False, **settings).eval()
        else:
            module = _build_for_size(model, adapt.image_size, settings)
    except Exception as e:  # whatever a constructor raises for what it cannot be: ZeroDivisionError, AssertionError …
        raise UsageError(f"model {model} cannot be built{_asked(adapt)}: {line(e)}") from e
    cfg = dict(module.pretrained_cfg)
    channels, *size = cfg["input_size"]
    cfg["input_size"] = (adapt.in_chans or channels, *(adapt.image_size or size))
    module.pretrained_cfg = cfg
    if adapt.image_size is not None:
        _check_size(module, model, adapt.image_size)
    return module


def _build_for_size(model: str, size: tuple[int, int], settings: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(model, pretrained=False, img_size=size, **settings).eval()
    except TypeError as e:
        if "img_size" not in str(e):
            raise
        return timm.create_model(model, pretrained=False, **settings).eval()  # convolutional: takes any size


def _asked(adapt: Adapt) -> str:
    size = adapt.image_size and "x".join(map(str, adapt.image_size))
    wanted = {"image size": size, "input channels": adapt.in_chans, "classes": adapt.num_classes}
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
    return f" with {asked}" if asked else ""


def _check_size(module: nn.Module, model: str, size: tuple[int, int]) -> None:
    """Refuses what these models compute without an error and without sense."""
    asked = f"--image-size {size[0]}x{size[1]}"
    embed: Any = getattr(module, "patch_embed", None)
    conv: Any = getattr(embed, "proj", None) or getattr(embed, "conv", None)
    tiles = isinstance(conv, nn.Conv2d) and not hasattr(embed, "backbone") and not getattr(embed, "dynamic_img_pad", 0)
    if tiles and not any(conv.padding):
        for side, kernel, stride in zip(size, conv.kernel_size, conv.stride, strict=True):
            if side < kernel or (side - kernel) % stride:
                below = max(side - kernel, 0) // stride * stride + kernel
                raise UsageError(
                    f"{asked}: {model} takes patches of {kernel} pixels every {stride}, which do not cover {side}; "
                    f"{below} or {below + stride} would do"
                )
    if type(module).__name__ == "ConVit" and size[0] != size[1]:
        # Its relative positions are those of a square grid with as many patches: 112x448 would run as 224x224.
        raise UsageError(f"{asked}: {model} has relative positions of a square grid only: choose HxH")


def load_strictly(module: nn.Module, state: State, what: str, model: str, adapt: Adapt = OWN) -> None:
    """Loads `state`, adapted to the module that `build(model, adapt)` gave. Raises `UsageError` naming what misfits."""
    fitted = _adapted(module, state, model, adapt)
    problem, stuck = _misfit(module, fitted), _stuck(module, state, fitted, model, adapt)
    if problem or stuck:
        # Weights in their authors' own layout, or tables of relative positions for another size: the architecture's
        # own filter renames and resizes them, as timm does for `pretrained`.
        filtered = _filtered(module, fitted)
        before, fitted = fitted, _adapted(module, fitted if filtered is None else filtered, model, adapt)
        if filtered is not None and "pos_embed" in before and "pos_embed" in filtered:
            fitted["pos_embed"] = filtered["pos_embed"]  # moved to the grid above: as many patches would move again
        if _misfit(module, fitted):
            if problem:
                raise UsageError(f"{what} do not fit {type(module).__name__}{_asked(adapt)}: {problem}")
            fitted = before
        resized = [k for k in fitted if k in before and fitted[k].numel() != before[k].numel()]
        if resized and adapt.image_size is None:
            raise UsageError(f"{what} do not fit {type(module).__name__}: {problem}; were they made for --image-size?")
        unmoved = [key for key in stuck if torch.equal(fitted[key], before[key]) and fitted[key].unique().numel() > 1]
        if unmoved:
            raise UsageError(
                f"{what} cannot be used{_asked(adapt)}: {unmoved[0]} belongs to {model}'s own grid of patches, "
                "and timm has no way to rearrange it"
            )
    module.load_state_dict(fitted, strict=True)


def _stuck(module: nn.Module, state: State, fitted: State, model: str, adapt: Adapt) -> list[str]:
    """Weights that belong to a grid of patches and were not adapted to another one, though their shape fits.

    A grid of 7x28 has as many patches as one of 14x14: what is made for the one loads into the other, and is wrong.
    """
    if adapt.image_size is None:
        return []
    with torch.device("meta"):
        own = build(model)
        height, width = own.pretrained_cfg["input_size"][1:]  # type: ignore[index]
        if adapt.image_size == (height, width):
            return []
        try:
            twice = build(model, Adapt(image_size=(2 * height, 2 * width))).state_dict()
        except UsageError:  # it cannot be built at another size, so it was not
            return []
    by_size = [key for key, weight in own.state_dict().items() if twice[key].shape != weight.shape]
    shapes = {key: weight.shape for key, weight in module.state_dict().items()}
    mine = own.state_dict()
    return [
        key
        for key in by_size
        if key in fitted and fitted[key] is state.get(key) and shapes[key] == fitted[key].shape == mine[key].shape
    ]


def _adapted(module: nn.Module, state: State, model: str, adapt: Adapt) -> State:
    """The same weights for another size, channel count or without a head; once adapted they stay as they are."""
    state, own = dict(state), module.state_dict()
    if adapt.num_classes == 0:
        heads = tuple(f"{name}." for name in classifiers(module))
        state = {key: weight for key, weight in state.items() if key in own or not key.startswith(heads)}
    if adapt.in_chans is not None:
        for key in first_convolutions(module):
            if key in state and key in own and state[key].ndim == 4 and state[key].shape != own[key].shape:
                # timm does the same for `pretrained`, but leaves at random what it cannot adapt.
                state[key] = adapt_input_conv(adapt.in_chans, state[key], base_chans=state[key].shape[1])
    if adapt.image_size is not None and "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = _positions(state["pos_embed"], own["pos_embed"], _grid(module), _own_grid(model))
    return state


def first_convolutions(module: nn.Module) -> tuple[str, ...]:
    """The weights that see the input's channels."""
    named: Any = module.pretrained_cfg.get("first_conv") or ()  # type: ignore[union-attr, operator]
    return tuple(f"{name}.weight" for name in ((named,) if isinstance(named, str) else named))


def classifiers(module: nn.Module) -> tuple[str, ...]:
    """The names of the model's classifier layers: `head`, `fc`, or several where it has several heads."""
    named = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _grid(module: nn.Module) -> Grid:
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return (int(grid[0]), int(grid[1])) if grid is not None else None


def _own_grid(model: str) -> Grid:
    with torch.device("meta"):
        return _grid(timm.create_model(model, pretrained=False))


def _positions(stored: torch.Tensor, own: torch.Tensor, grid: Grid, before: Grid) -> torch.Tensor:
    """Position embeddings of the grid `before` for another one: bicubic with antialias, as timm does for ViT.

    timm does not for PiT and ConViT, nor for any model where the other grid has as many patches (7x28 for 14x14):
    those it takes as they are, in the wrong order.
    """
    if grid is None or before is None or grid == before:
        return stored
    if stored.ndim == 4 and tuple(stored.shape[2:]) == before:  # PiT: (1, C, H, W)
        return resample_abs_pos_embed_nhwc(stored.permute(0, 2, 3, 1), list(grid)).permute(0, 3, 1, 2).contiguous()
    if stored.ndim == 4 and tuple(stored.shape[1:3]) == before:  # (1, H, W, C)
        return resample_abs_pos_embed_nhwc(stored, list(grid))
    if stored.ndim == 3:  # (1, prefix + patches, C)
        prefix = own.shape[1] - grid[0] * grid[1]
        if stored.shape[1] - prefix == before[0] * before[1]:
            return resample_abs_pos_embed(stored, list(grid), old_size=list(before), num_prefix_tokens=prefix)
    return stored  # made for this size, or for neither: then it does not fit


def _misfit(module: nn.Module, state: State) -> str:
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if state[k].shape != own[k].shape
    ]
    found = (("missing keys", missing), ("unexpected keys", extra), ("other shapes", shapes))
    problem = "; ".join(f"{name}: {_some(keys)}" for name, keys in found if keys)
    headless = missing and all(key.startswith(classifiers(module)) for key in missing)
    return problem + (" (--num-classes 0 leaves the head out)" if headless else "")


def _filtered(module: nn.Module, state: State) -> State | None:
    rename = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return None
    try:
        with warnings.catch_warnings():  # of the interpolation's own arithmetic
            warnings.simplefilter("ignore")
            return dict(rename(dict(state), module))
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None  # not a layout that the filter knows: the plain misfit is the message


def _some(keys: list[str]) -> str:
    rest = len(keys) - NAMED_KEYS
    return ", ".join(keys[:NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def line(e: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(e).split())[:400].rstrip(".") or type(e).__name__
