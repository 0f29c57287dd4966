"""What a model gives beside its embedding, out of the same forward pass: tokens, feature maps, the logits of two heads.

`tensor_columns` says, before a run, which columns come of what was asked and how each row's tensors are shaped. `Taps`
takes them from a batch. Feature maps go by timm's index (those of `features_only=True`) or by the names that tfimm
gives them: `patch_embedding`, `stage_1/block_2`, `stage_1/pool` of PiT, `block_7` of ViT, BEiT, ConViT and their like,
`features_all`, `features`, `logits`.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn

from pipeline.config import TensorColumn
from pipeline.errors import UsageError

Take = Callable[[tuple[Any, ...], Any], torch.Tensor]  # of a module's arguments and its output
Caught = dict[str, torch.Tensor]  # source of a column → what a pass gave there, of the whole batch
Body = Callable[[torch.Tensor], tuple[Any, Caught]]  # normalised images → `forward_features`, in its nesting, and those
NEAREST = 5  # names that an unknown one is answered with
TWO_HEADS = "head+head_dist"  # as every distilled architecture of timm calls them
OF_THE_HEADS = ("features", "logits")  # tfimm's names of what the classifier takes and gives


class Taps:
    """Takes the columns of `tensor_columns` from forward passes of one module, from one thread at a time."""

    def __init__(self, module: nn.Module, tensor_columns: Sequence[TensorColumn]):
        self._module: Any = module
        self._columns = tuple(tensor_columns)
        sources = [column.source for column in tensor_columns if column.kind == "features"]
        self._indices = sorted({int(s) for s in sources if s.isdecimal()})
        self._hooks = {s: point for s, point in _named(module).items() if s in sources}
        self.of_the_heads = any(column.source in (*OF_THE_HEADS, TWO_HEADS) for column in self._columns)
        self._heads = heads_of(module)

    def body(self, x: torch.Tensor) -> tuple[Any, Caught]:
        """`forward_features(x)`, and what was asked of the layers on the way."""
        with self.tapped() as body:
            return body(x)

    @contextmanager
    def tapped(self) -> Iterator[Body]:
        """`body` with its hooks set while the context is open: what a graph can be made of."""
        if self._indices:
            yield self._with_maps
            return
        with _hooked([(self._module.get_submodule(path), s, take) for s, (path, take) in self._hooks.items()]) as got:

            def body(x: torch.Tensor) -> tuple[Any, Caught]:
                final = self._module.forward_features(x)
                caught = dict(got)
                got.clear()
                return final, caught

            yield body

    def _with_maps(self, x: torch.Tensor) -> tuple[Any, Caught]:
        # Maps come in the order of depth, each once, whatever order they are asked in.
        body, maps = self._module.forward_intermediates(x, indices=self._indices)
        layouts = {column.source: column.layouts for column in self._columns}
        caught = {}
        for index, tensor in zip(map(str, self._indices), maps, strict=True):
            caught[index] = tensor.permute(0, 2, 3, 1) if layouts[index] == ("NHWC",) else tensor
        return body, caught

    def logits(self, body: Any) -> tuple[torch.Tensor, Caught]:
        """`forward_head(body)`, and what each head took and gave, where that was asked."""
        taken: list[tuple[nn.Module, str, Take]] = []
        for i, head in enumerate(self._heads):
            taken += [(head, f"features {i}", _argument), (head, f"logits {i}", _output)]
        with _hooked(taken if self.of_the_heads else []) as got:
            logits: torch.Tensor = self._module.forward_head(body)
        caught = {}
        for name in OF_THE_HEADS:
            parts = [got[key] for i in range(len(self._heads)) if (key := f"{name} {i}") in got]
            if parts:
                caught[name] = torch.stack(parts, 1) if len(parts) > 1 else parts[0]
        return logits, caught

    def columns(self, body: Any, caught: Caught, n: int) -> tuple[torch.Tensor, ...]:
        """A tensor (n, size) for each column, of its dtype, from the first n images of a batch."""
        return tuple(self._column(column, body, caught, n) for column in self._columns)

    def _column(self, column: TensorColumn, body: Any, caught: Caught, n: int) -> torch.Tensor:
        parts = self.parts(column, body, caught)
        rows = torch.cat([p[:n].float().flatten(1) for p in parts], 1)
        return rows.to(getattr(torch, column.dtype))

    def parts(self, column: TensorColumn, body: Any, caught: Caught) -> list[torch.Tensor]:
        """The column's tensors as the model shapes them, of a whole batch."""
        if column.kind == "tokens":
            return list(body) if isinstance(body, list | tuple) else [body]
        if column.kind == "heads":
            return [caught["logits"]]
        return [body if column.source == "features_all" and column.source not in caught else caught[column.source]]


@contextmanager
def _hooked(points: Sequence[tuple[nn.Module, str, Take]]) -> Iterator[dict[str, torch.Tensor]]:
    """Keeps what `take` finds at each module while the context is open, under the point's name."""
    got: dict[str, torch.Tensor] = {}

    def keep(name: str, take: Take) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            got[name] = take(args, output)

        return hook

    handles = [module.register_forward_hook(keep(name, take)) for module, name, take in points]
    try:
        yield got
    finally:
        for handle in handles:
            handle.remove()


def heads_of(module: Any) -> list[nn.Module]:
    """The classifier, or both where a second one was distilled; RepViT keeps its two in a head of their own."""
    for owner in (module, getattr(module, "head", None)):
        first, second = (getattr(owner, name, None) for name in TWO_HEADS.split("+"))
        unused = isinstance(second, nn.Identity) and bool(module.num_classes)  # as iFormer fills its place
        if isinstance(first, nn.Module) and isinstance(second, nn.Module) and not unused:
            return [first, second]
    head = getattr(module, "head", None)
    return [head] if isinstance(head, nn.Module) else []


# names


def feature_names(module: nn.Module) -> tuple[str, ...]:
    """tfimm's names of what the model computes, in the order of computing; empty where it has none."""
    named = _named(module)
    if not named:
        return ()
    ends = OF_THE_HEADS if getattr(module, "num_classes", 0) else OF_THE_HEADS[:1]
    return (*(name for name in named if name != "features_all"), "features_all", *ends)


def _named(module: Any) -> dict[str, tuple[str, Take]]:
    """tfimm's name → the module to watch there, and what to take of it."""
    if type(module).__name__ == "PoolingVisionTransformer":
        return _named_of_pit(module)
    blocks, head = getattr(module, "blocks", None), getattr(module, "head", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(module, "patch_embed"):
        return {}
    if isinstance(head, nn.Linear | nn.Identity):  # one sequence, pooled before the head: not CrossViT, not Hiera
        points: dict[str, tuple[str, Take]] = {"patch_embedding": ("blocks.0", _argument)}
        return points | {f"block_{k}": (f"blocks.{k}", _output) for k in range(len(blocks))}
    return {}


def _named_of_pit(module: Any) -> dict[str, tuple[str, Take]]:
    stages = module.transformers
    points: dict[str, tuple[str, Take]] = {"patch_embedding": ("transformers.0", lambda args, _: _sequence(*args[0]))}
    for j, stage in enumerate(stages):
        for k in range(len(stage.blocks)):
            points[f"stage_{j}/block_{k}"] = (f"transformers.{j}.blocks.{k}", _output)
        if j + 1 < len(stages):
            points[f"stage_{j}/pool"] = (f"transformers.{j + 1}.pool", lambda _, output: _sequence(*output))
    # Of PiT the last block's output, of ViT the normed one, which is what forward_features gives.
    points["features_all"] = (f"transformers.{len(stages) - 1}.blocks.{len(stages[-1].blocks) - 1}", _output)
    return points


def _sequence(grid: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) and (N, T, C) → (N, T + HW, C), as tfimm keeps them."""
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], 1)


def _argument(args: tuple[Any, ...], _: Any) -> torch.Tensor:
    first: torch.Tensor = args[0]
    return first


def _output(_: tuple[Any, ...], output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output
    return tensor


# what a run will give


def tensor_columns(
    module: Any,
    model: str,
    blank: torch.Tensor,
    body: Any,
    outputs: Sequence[str],
    indices: tuple[int, ...] | None = None,
    names: tuple[str, ...] | None = None,
) -> tuple[TensorColumn, ...]:
    """The columns that `outputs` asks for, in order, shaped as the model shapes them for `blank` (1, C, H, W).

    `body`: `forward_features(blank)`. Raises `UsageError` where the model lacks what was asked.
    """
    found: list[TensorColumn] = []
    if "tokens" in outputs:
        parts = list(body) if isinstance(body, list | tuple) else [body]
        layouts = tuple(_layout(p, getattr(module, "output_fmt", None)) for p in parts)
        found.append(_column("tokens", "tokens", "forward_features", [tuple(p.shape[1:]) for p in parts], layouts))
    if "features" in outputs:
        maps = _by_index(module, model, blank, indices) if names is None else _by_name(module, model, blank, names)
        for i, (source, shape, layout) in enumerate(maps):
            found.append(_column("features", f"feature_{i}", source, [shape], (layout,)))
    if "heads" in outputs:
        if len(heads_of(module)) < 2 or not module.num_classes:
            raise UsageError(f"--outputs heads: {model} has no second classifier head")
        found.append(_column("heads", "heads", TWO_HEADS, [(2, module.num_classes)], ("N2C",), "float32"))
    return tuple(found)


def _column(
    kind: str, column: str, source: str, shapes: list[tuple[int, ...]], layouts: tuple[str, ...], dtype: str = "float16"
) -> TensorColumn:
    return TensorColumn(kind=kind, column=column, source=source, shapes=tuple(shapes), layouts=layouts, dtype=dtype)


def _layout(tensor: torch.Tensor, declared: object = None) -> str:
    """Of a batch. Channels come second in maps, unless the model declares otherwise, and last in sequences."""
    if tensor.ndim == 4:
        return "NHWC" if str(declared).endswith("NHWC") else "NCHW"
    return {2: "NC", 3: "NLC"}.get(tensor.ndim, "N" + "?" * (tensor.ndim - 1))


Shaped = tuple[str, tuple[int, ...], str]  # source, shape of a row, layout of a batch


def _by_index(module: Any, model: str, blank: torch.Tensor, asked: tuple[int, ...] | None) -> list[Shaped]:
    """The maps asked for, else timm's own choice, counted from the front, in the layout of `features_only=True`."""
    try:
        maps = module.forward_intermediates(blank)[1]
        wrapped = timms_maps(model)
    except Exception as e:  # whatever a model without feature maps raises
        raise UsageError(f"--outputs features: timm has no feature maps of {model}: {e}") from e
    found: list[Shaped] = []
    for index in tuple(wrapped.feature_info.out_indices) if asked is None else asked:
        if not -len(maps) <= index < len(maps):
            raise UsageError(f"--feature-indices {index}: {model} has feature maps 0 to {len(maps) - 1}")
        tensor = maps[index]
        layout = _layout(tensor, getattr(wrapped, "output_fmt", None))  # Swin's are NHWC
        shape = tensor.permute(0, 2, 3, 1).shape if layout == "NHWC" else tensor.shape
        found.append((str(index % len(maps)), tuple(shape[1:]), layout))
    return found


@lru_cache(maxsize=1)
def timms_maps(model: str) -> Any:
    """timm's own feature extractor, without values: which maps it chooses and how it lays them out."""
    with torch.device("meta"):
        return timm.create_model(model, pretrained=False, features_only=True).eval()


def _by_name(module: Any, model: str, blank: torch.Tensor, names: tuple[str, ...]) -> list[Shaped]:
    known = feature_names(module)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, NEAREST) or known[: NEAREST + 1]
            what = f"nearest of its {len(known)}: {', '.join(near)}" if known else "use --feature-indices"
            raise UsageError(f"--feature-names {name}: {model} has no such name; {what}")
    wanted = [_column("features", "", name, [], ()) for name in names]
    taps = Taps(module, wanted)
    body, caught = taps.body(blank)
    caught |= taps.logits(body)[1]
    tensors = {column.source: taps.parts(column, body, caught)[0] for column in wanted}
    return [(name, tuple(tensors[name].shape[1:]), _layout(tensors[name])) for name in names]
