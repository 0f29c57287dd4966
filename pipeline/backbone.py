"""The timm model: a batch of uint8 images → embeddings, classes, tokens and feature maps, from one forward pass.

The body runs in the precision asked for and in the engine asked for (`pipeline.engines`), the head, the softmax and the
norm always in float32, in torch. On CUDA, and for engines that know one shape only, a short batch is padded to the full
size. Else padding only costs (22 % of 50-image shards).
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

from pipeline import engines, tuning
from pipeline.config import Adapt, TensorColumn
from pipeline.device import (
    Room,
    is_out_of_memory,
    keep_float32,
    limit_memory,
    no_room,
    out_of_memory_explained,
    why_no_cuda,
)
from pipeline.errors import StorageError, UsageError
from pipeline.features import Body, Taps, tensor_columns
from pipeline.images import Preprocessing
from pipeline.storage import read_bytes, redact

CPU_BATCH = 32  # pit_ti in bf16 on two cores: 81, 85, 88 images/s with 16, 32, 64; the middle spares memory …
CPU_BATCH_PIXELS = CPU_BATCH * 384 * 384  # … and fewer of larger images
TRUE_TOP = 5  # accuracy is counted at 1 and at 5, whatever --top-k says


class Vectors(NamedTuple):
    """What one forward pass gives for n images, on the device; on CUDA see `pipeline.device` for the way back."""

    embedding: torch.Tensor  # float32 (n, D), as the model gives it
    norm: torch.Tensor  # float32 (n,): Euclidean, before any normalisation
    topk_index: torch.Tensor | None  # int64 (n, max(k, TRUE_TOP) or fewer): by score, equal scores by index
    topk_score: torch.Tensor | None  # float32, the same shape: probabilities
    tensors: tuple[torch.Tensor, ...] = ()  # (n, size) for each `TensorColumn`, of its dtype

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Vectors":
        """With `change` of each tensor in its place."""
        index, score = (None if t is None else change(t) for t in (self.topk_index, self.topk_score))
        return Vectors(change(self.embedding), change(self.norm), index, score, tuple(map(change, self.tensors)))

    def to_numpy(self) -> "Arrays":
        """Waits for the device."""
        index, score = self.topk_index, self.topk_score
        return Arrays(
            self.embedding.cpu().numpy(),
            self.norm.cpu().numpy(),
            None if index is None else index.cpu().numpy(),
            None if score is None else score.cpu().numpy(),
            tuple(tensor.cpu().numpy() for tensor in self.tensors),
        )


class Arrays(NamedTuple):
    """`Vectors` on the host."""

    embedding: np.ndarray
    norm: np.ndarray
    topk_index: np.ndarray | None
    topk_score: np.ndarray | None
    tensors: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a run must know of a model before it starts."""

    preprocessing: Preprocessing
    dim: int
    classes: int  # 0: no classifier
    pooling: str
    label_names: tuple[str, ...]  # empty where unknown
    labels_source: str  # model, imagenet or none
    tensors: tuple[TensorColumn, ...] = ()  # the columns beside the embedding that were asked for


def preprocessing_of(module: torch.nn.Module) -> Preprocessing:
    return Preprocessing.of(resolve_data_config({}, model=module))


def facts_of(
    module: torch.nn.Module,
    model: str,
    outputs: Sequence[str] = (),
    feature_indices: tuple[int, ...] | None = None,
    feature_names: tuple[str, ...] | None = None,
) -> Facts:
    """Runs one blank image through the model on the CPU. Raises `UsageError` where it takes no plain image batch.

    `outputs`: of tokens, features and heads, whose columns `Facts.tensors` then tells.
    """
    preprocessing = preprocessing_of(module)
    blank = torch.zeros(1, *preprocessing.input_size)
    try:
        with torch.inference_mode():
            body = module.forward_features(blank)  # type: ignore[operator]
            embedding = module.forward_head(body, pre_logits=True)  # type: ignore[operator]
            logits = module.forward_head(body)  # type: ignore[operator]
    except Exception as e:  # whatever a model raises for images that it cannot take
        size = "x".join(map(str, preprocessing.input_size))
        raise UsageError(f"model {model} takes no plain batch of {size} images: {type(e).__name__}: {e}") from e
    if not isinstance(embedding, torch.Tensor) or embedding.flatten(1).shape[0] != 1:
        raise UsageError(f"model {model} gives no pooled embedding")
    classes = int(getattr(module, "num_classes", 0) or 0)
    if classes and tuple(logits.shape) != (1, classes):
        raise UsageError(f"model {model} gives logits {tuple(logits.shape)} for its {classes} classes")
    names, source = _label_names(module, classes)
    with torch.inference_mode():
        columns = tensor_columns(module, model, blank, body, outputs, feature_indices, feature_names)
    dim = embedding.flatten(1).shape[1]
    return Facts(preprocessing, dim, classes, _pooling(module), names, source, columns)


def _pooling(module: torch.nn.Module) -> str:
    """timm's word for it: avg, token, map …; conv nets keep it in their pooling layer."""
    pool = getattr(module, "global_pool", None) or getattr(getattr(module, "head", None), "global_pool", None)
    return str(getattr(pool, "pool_type", None) or (pool if isinstance(pool, str) else "default"))


def _label_names(module: torch.nn.Module, classes: int) -> tuple[tuple[str, ...], str]:
    cfg: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    own = cfg.get("label_names") or ()
    if classes and len(own) == classes:
        descriptions = cfg.get("label_descriptions") or {}
        return tuple(str(descriptions.get(n, n)) for n in own), "model"
    names = imagenet_names(classes)
    return names, "imagenet" if names else "none"


def imagenet_names(classes: int) -> tuple[str, ...]:
    """Those of the ImageNet that has so many classes; empty where none has."""
    subset = infer_imagenet_subset({"num_classes": classes}) if classes else None
    info = ImageNetInfo(subset) if subset else None
    return tuple(info.label_descriptions()) if info and info.num_classes() == classes else ()


def read_labels(url: str, classes: int) -> tuple[str, ...]:
    """Class names, one a line. Raises `UsageError` where the file is not there or has another number of lines."""
    try:
        lines = read_bytes(url).decode("utf-8").splitlines()
    except (OSError, StorageError, UnicodeDecodeError) as e:
        raise UsageError(f"labels {redact(url)} cannot be read: {e}") from e
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) != classes:
        raise UsageError(f"labels {redact(url)} has {len(lines)} names, the model {classes} classes")
    return tuple(line.strip() for line in lines)


def resolve_device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: no CUDA device is here{why_no_cuda()}; --device cpu runs without")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_precision(precision: str, device: str) -> str:
    """`auto` becomes bf16 where the hardware multiplies it natively, else fp32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if native else "fp32"


class Backbone:
    """One model on one device. Calls from several threads wait for each other: what hooks see belongs to one pass.

    `batch_size` None: found by timing on CUDA, 32 on the CPU (fewer of images above 384x384). A CUDA out-of-memory
    halves it for as long as this lives. `pad`: fill short batches up to it; by default on CUDA, and always where the
    engine is not `eager`. `tensors`: the columns to give beside the embedding. `share`: of a CUDA device, what this
    process may take of its memory. Raises `engines.Unavailable`, and `NoRoom` where the model or an image finds none.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        engine: str = "eager",
        precision: str = "fp32",
        device: str = "cpu",
        classes: bool = True,
        top_k: int = TRUE_TOP,
        batch_size: int | None = None,
        pad: bool | None = None,
        tensors: Sequence[TensorColumn] = (),
        share: float = 1.0,
    ):
        self.preprocessing = preprocessing_of(module)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
            keep_float32()
            with out_of_memory_explained(self.device, "the model"):
                room = limit_memory(self.device, share)
                module = module.to(self.device)
        self._module = module.eval()
        self._layout = torch.preserve_format
        self._taps = Taps(self._module, tensors)
        self._one_pass = threading.Lock()
        self._top = max(top_k, TRUE_TOP) if classes else 0
        self._mean = torch.tensor(self.preprocessing.mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(self.preprocessing.std, device=self.device).view(1, -1, 1, 1)
        self._pad = self.device.type == "cuda" if pad is None else pad
        self._body: Body = engines.Eager(self._taps, self.device, precision)
        _, height, width = self.preprocessing.input_size
        self.batch_size = batch_size or max(1, min(CPU_BATCH, CPU_BATCH_PIXELS // (height * width)))
        self._engine, self._precision = engine, precision
        if self.device.type == "cuda":
            self._tune(batch_size, tensors, share, room)
        self._start_engine()

    def _tune(self, batch_size: int | None, tensors: Sequence[TensorColumn], share: float, room: Room) -> None:
        """Takes the batch size, unless it is given, and the layout that are best here, by what this node remembers."""
        key = tuning.key_of(
            self._module,
            self.device,
            size=self.preprocessing.input_size,
            outputs=[self._top, *((c.kind, c.source, c.dtype) for c in tensors)],
            precision=self._precision,
            engine=self._engine,
            share=share,
            room=room.steps,
            asked=batch_size,
        )

        def search() -> tuple[tuning.Tuned, bool]:
            found = self._searched(batch_size, room.bytes)
            return found or tuning.Tuned(batch_size or 1, False), found is not None and room.is_free

        found = tuning.tuned(key, search)
        self.batch_size = found.batch_size
        self._lay_out(found.channels_last)

    @torch.inference_mode()
    def _start_engine(self) -> None:
        """Makes the engine's body for the batch size of now, or the next half of it that fits the memory."""
        if self._engine == "eager":
            return
        self._pad = True
        size = (self.batch_size, *self.preprocessing.input_size)
        try:
            batch = self.normalize(torch.zeros(size, dtype=torch.uint8))
            self._body = engines.start(self._engine, self._module, self._taps, batch, precision=self._precision)
            return
        except torch.OutOfMemoryError as e:
            if self.batch_size == 1:
                raise no_room(self.device, f"one image with --engine {self._engine}", e) from e
        self._halve()  # here, where nothing holds what the attempt had taken
        self._start_engine()

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, C, H, W) → float32, bit-equal to timm's ToTensor and Normalize."""
        images = images.to(self.device, non_blocking=True, memory_format=self._layout)
        return images.float().div_(255).sub_(self._mean).div_(self._std)  # in place: four times as fast on a CPU

    def __call__(self, images: torch.Tensor) -> Vectors:
        """`images`: uint8 (n, C, H, W), any n. On CUDA it returns while the device still works."""
        expected = self.preprocessing.input_size
        if tuple(images.shape[1:]) != expected or images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, the model takes uint8 (n, *{expected})")
        parts, start = [], 0
        while start < len(images):
            chunk = images[start : start + self.batch_size]
            with self._one_pass:
                part = self._forward_if_it_fits(chunk)
            if part is None:
                self._halve()
                self._start_engine()
                continue
            parts.append(part)
            start += len(chunk)
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _forward_if_it_fits(self, images: torch.Tensor) -> Vectors | None:
        """None where memory ran out: once we have returned, nothing holds what the pass had taken of it."""
        try:
            return self._forward(images)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            if self.batch_size == 1:
                raise no_room(self.device, "one image beside the model", e) from e
            return None

    def _halve(self) -> None:
        """For now: the next run looks for itself, when whoever holds the memory may be gone."""
        self.batch_size //= 2
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor) -> Vectors:
        n = len(images)
        if self._pad and n < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - n, *images.shape[1:])])
        x = self.normalize(images)
        body, caught = self._body(x)
        body = _float32(body)
        embedding = self._module.forward_head(body, pre_logits=True).flatten(1)[:n]  # type: ignore[operator]
        norm = torch.linalg.vector_norm(embedding, dim=1)
        if not self._top and not self._taps.of_the_heads:
            return Vectors(embedding, norm, None, None, self._taps.columns(body, caught, n))
        logits, of_heads = self._taps.logits(body)
        logits = logits[:n]
        columns = self._taps.columns(body, caught | of_heads, n)
        if not self._top:
            return Vectors(embedding, norm, None, None, columns)
        score, index = ranked(logits.softmax(dim=1), self._top)
        return Vectors(embedding, norm, index, score, columns)

    def _searched(self, batch_size: int | None, allowed: int) -> tuning.Tuned | None:
        """The batch size, unless it is given, and then the layout of its memory that this device is faster with.

        None where nothing fits.
        """
        best = batch_size or tuning.best_batch_size(lambda size: self._images_per_s(size, allowed))
        if best is None:
            return None
        if self._engine != "eager":  # which compiles for one layout, the plain one
            return tuning.Tuned(best, False)
        plain = self._images_per_s(best, allowed)
        self._lay_out(channels_last=True)
        other = self._images_per_s(best, allowed)
        self._lay_out(channels_last=False)
        return tuning.Tuned(best, other > plain * tuning.WORTH_CHANNELS_LAST) if plain or other else None

    def _lay_out(self, channels_last: bool) -> None:
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self._module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _images_per_s(self, batch_size: int, allowed: int) -> float:
        """Speed of the forward pass alone, 0 where it does not fit into the `allowed` bytes."""
        kept, self.batch_size = self.batch_size, batch_size
        try:
            # Of noise: matrix products of zeros are a tenth faster.
            size = (batch_size, *self.preprocessing.input_size)
            images = torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)
            return tuning.images_per_s(lambda: self._forward(images), batch_size, self.device, allowed)
        finally:
            self.batch_size = kept


def load_backbone(model: str, weights: Path, adapt: Adapt, **settings: Any) -> Backbone:
    """A `Backbone` from a staged weights file (see `pipeline.weights`)."""
    from pipeline.weights import load_staged

    return Backbone(load_staged(model, weights, adapt), **settings)


def ranked(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` of each row and where they are, equal ones by index; all where there are fewer.

    torch.topk leaves open which of equal ones it takes, and in which order. A stable sort instead takes 9 times as long
    with 1,000 classes, and 1.3 ms an image with 21,841. On CUDA the question whether it is needed would cost a wait.
    """
    if scores.device.type == "cpu" and count <= scores.shape[1]:
        best, index = scores.topk(count, dim=1)
        if ((scores >= best[:, -1:]).sum(dim=1) == count).all():
            index, by_index = index.sort(dim=1)
            best, by_score = best.gather(1, by_index).sort(dim=1, descending=True, stable=True)
            return best, index.gather(1, by_score)
    best, index = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :count], index[:, :count]


def _joined(parts: list[Vectors]) -> Vectors:
    index = [p.topk_index for p in parts if p.topk_index is not None]
    score = [p.topk_score for p in parts if p.topk_score is not None]
    return Vectors(
        torch.cat([p.embedding for p in parts]),
        torch.cat([p.norm for p in parts]),
        torch.cat(index) if index else None,
        torch.cat(score) if score else None,
        tuple(torch.cat(columns) for columns in zip(*(p.tensors for p in parts), strict=True)),
    )


def _float32(body: Any) -> Any:
    """Tensors in whatever nesting `forward_features` gives (PiT a tensor, CrossViT and CoaT lists) as float32."""
    if isinstance(body, torch.Tensor):
        return body.float() if body.is_floating_point() else body
    if isinstance(body, list | tuple):
        return type(body)(_float32(part) for part in body)
    if isinstance(body, dict):
        return {name: _float32(part) for name, part in body.items()}
    return body
