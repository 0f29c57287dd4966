"""A decoded image → the model's uint8 pixels: timm's resize and crop, by Pillow to the bit or by torch in a fifth.

`exact` is Pillow's own resize. `fast` is torch's for uint8: the same kernels, places and two passes with rounding to
levels between them, but weights of 16 bits instead of 22. So a level after the first pass is off by one at most; the
second pass carries at most 1.5 of that (the sum of its weights' magnitudes) and rounds: two levels, whatever the
image. Both resize what the crop keeps and leave out the rest, where that does not change a weight.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import Reject
from pipeline.jpegs import FACTORS

if TYPE_CHECKING:  # it takes seconds, and verbs that only read need none of it
    import torch

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes, by the number of channels that a model takes
# `--decode scaled` lets the decoder shrink an image while both sides stay this many times what the resize makes of
# them: for 224 cut out of 248, sides of 992, 1984 and 3968 pixels or more are halved, quartered, divided by eight. On
# sheets of photos, most levels off and their mean: 65, 3.3 at 1; 30, 1.8 at 1.5; 19, 1.1 here; 16, 0.6 at 3.
MARGIN = 2
Turn = Image.Transpose
SWAPS = {Turn.TRANSPOSE, Turn.TRANSVERSE, Turn.ROTATE_90, Turn.ROTATE_270}  # width and height
FLIPS_X = {Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.ROTATE_90, Turn.TRANSVERSE}  # the order of stored columns
FLIPS_Y = {Turn.FLIP_TOP_BOTTOM, Turn.ROTATE_180, Turn.ROTATE_270, Turn.TRANSVERSE}  # … of stored rows
# By timm's names. ATen's own, because torch's `interpolate` cannot be told a scale and so not to stop at the crop.
OPERATORS = {"bilinear": "_upsample_bilinear2d_aa", "bicubic": "_upsample_bicubic2d_aa"}
# Without these, torch has another kernel: up to 178 levels off (measured), and with a team of threads for each caller.
KERNELS = ("AVX2", "AVX512")
# Each works in two passes, so the columns that the crop drops can be dropped between them.
PILLOW = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "hamming", "box")}


class Bound(NamedTuple):
    """How far from timm's own: the most levels of a pixel, their mean over an image, the least cosine of embeddings."""

    levels: int
    mean_levels: float
    cosine: float


# By `--decode`, and held by the tests. Of `fast`, the levels hold for any image (see above). Of `scaled`, all hold for
# photos: white noise and lines a pixel wide were up to 34 and 6.2 levels off, with a cosine down to 0.996.
BOUNDS = {"exact": Bound(0, 0, 1), "fast": Bound(2, 0.05, 0.99999), "scaled": Bound(24, 1.5, 0.9999)}


class Settings(Protocol):
    """What of `images.Preprocessing` decides the pixels."""

    @property
    def input_size(self) -> tuple[int, int, int]: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def crop_mode(self) -> str: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def mean(self) -> tuple[float, ...]: ...


class Side(NamedTuple):
    """Of one side of an image, in pixels: its length after the resize, the part that is kept, where that is put."""

    length: int
    start: int
    kept: int
    put: int  # above 0 where the model's side is longer, and the rest is filled

    @property
    def stop(self) -> int:
        return self.start + self.kept


def sides(settings: Settings, width: int, height: int) -> tuple[Side, Side]:
    """What timm's evaluation transform does to an upright image's width and height. Raises `Reject`.

    After `timm.data.transforms_factory.transforms_imagenet_eval` and what it calls of torchvision.
    """
    _, crop_height, crop_width = settings.input_size
    across, down = (math.floor(side / (settings.crop_pct or 0.875)) for side in (crop_width, crop_height))
    if settings.crop_mode == "squash":
        resized = across, down
    elif settings.crop_mode != "border" and across == down:
        long = int(across * max(width, height) / min(width, height))
        resized = (across, long) if width <= height else (long, across)
    else:
        ratio = (max if settings.crop_mode == "border" else min)(height / down, width / across)
        resized = round(width / ratio), round(height / ratio)
    if not all(resized):
        raise Reject(
            "unsupported", "decode", f"{width}x{height} pixels: its resize to {resized[0]}x{resized[1]} is none"
        )
    return _side(resized[0], crop_width), _side(resized[1], crop_height)


def _side(length: int, wanted: int) -> Side:
    if wanted > length:
        return Side(length, 0, length, (wanted - length) // 2)
    return Side(length, round((length - wanted) / 2.0), wanted, 0)


def is_down_first(size: tuple[int, int], across: Side, down: Side) -> bool:
    """Whether Pillow resizes the columns first: since 13.0, where that makes the image a good deal smaller.

    https://github.com/python-pillow/Pillow/pull/9549, as it was merged.
    """
    width, height = size
    return height > down.length and height - down.length > 2 * (width - across.length)


def why_not_fast(settings: Settings, capability: str | None = None) -> str:
    """Why a model's images cannot be resized by `Resizer.fast`; "" where they can.

    `capability`: torch's word for a processor's vector instructions; None: of this one.
    """
    import torch

    if settings.input_size[0] == 4:
        return "the model takes RGBA images"
    if settings.interpolation not in OPERATORS:
        return f"the model's are resized by {settings.interpolation}"
    capability = capability or torch.backends.cpu.get_cpu_capability()
    return "" if capability in KERNELS else f"torch is slow at it on this processor ({capability})"


class Resizer:
    """timm's evaluation transform for one model, short of its last step, which belongs on the device.

    Safe to call from many threads. What it gives is uint8 (C, H, W), contiguous.
    """

    def __init__(self, settings: Settings, transform: Callable[[Image.Image], "torch.Tensor"]):
        """`transform`: timm's own, for what is not repeated here."""
        import torch

        self._settings, self._transform = settings, transform
        self._filter = PILLOW.get(settings.interpolation)
        operator = OPERATORS.get(settings.interpolation)
        self._operator = operator and getattr(torch.ops.aten, operator)
        self.is_fast = not why_not_fast(settings)  # else `fast` is not to be called
        levels = [round(255 * mean) for mean in settings.mean] if settings.crop_mode == "border" else [0]
        self._fill = np.array(levels, np.uint8).reshape(-1, 1, 1)

    def exact(self, image: Image.Image) -> np.ndarray:
        """`image`: upright, of the model's mode. Bit-equal to timm's transform. Raises `Reject`."""
        across, down = sides(self._settings, *image.size)
        if self._filter is None or image.mode == "RGBA":
            return np.ascontiguousarray(self._transform(image).numpy())
        if is_down_first(image.size, across, down):
            image = image.resize((image.width, down.length), self._filter)
            image = image.crop((0, down.start, image.width, down.stop)).resize((across.length, down.kept), self._filter)
            return self._placed(as_array(image), across, down._replace(start=0))
        image = image.resize((across.length, image.height), self._filter)
        image = image.crop((across.start, 0, across.stop, image.height)).resize(
            (across.kept, down.length), self._filter
        )
        return self._placed(as_array(image), across._replace(start=0), down)

    def factor(self, width: int, height: int) -> int:
        """Of `jpegs.FACTORS`, by how much an upright image's decoder may shrink it for `--decode scaled`; 1: not."""
        across, down = sides(self._settings, width, height)
        spare = min(width / across.length, height / down.length) / MARGIN
        return next((factor for factor in FACTORS if factor <= spare), 1)

    def fast(self, pixels: np.ndarray, size: tuple[int, int], turn: Turn | None = None) -> np.ndarray:
        """At most two levels off `exact` of the turned image. Raises `Reject`.

        `pixels`: as stored, in the layout of `as_array`. `size`: their width and height, or where the decoder shrank
        them, those of the file: then the sides of `pixels` are a half, a quarter or an eighth, rounded up.
        """
        import torch

        swaps = turn in SWAPS
        upright = size[::-1] if swaps else size
        across, down = sides(self._settings, *upright)
        factor = round(size[0] / pixels.shape[1])
        right = _Pass(3, size[0] / factor, down if swaps else across, turn in FLIPS_X)
        below = _Pass(2, size[1] / factor, across if swaps else down, turn in FLIPS_Y)
        # In Pillow's order, which is the upright image's: it rounds and clips between the passes.
        is_below_first = is_down_first(upright, across, down) != swaps
        image = torch.from_numpy(pixels if is_below_first else pixels[: below.needed])
        image = image.unsqueeze(0).permute(0, 3, 1, 2)  # channels_last, which a numpy axis of one would not be
        try:
            for one in (below, right) if is_below_first else (right, below):
                image = one.resized(image, self._operator)
        except RuntimeError as error:  # torch's only one for arguments that fit: it could not allocate
            raise MemoryError(str(error)) from error
        kept = image[0].permute(1, 2, 0).numpy()[below.kept, right.kept]
        kept = kept.swapaxes(0, 1) if swaps else kept
        return self._placed(kept, across._replace(start=0), down._replace(start=0))

    def _placed(self, pixels: np.ndarray, across: Side, down: Side) -> np.ndarray:
        channels, height, width = self._settings.input_size
        placed = np.empty((channels, height, width), np.uint8)
        if (across.kept, down.kept) != (width, height):
            placed[:] = self._fill
        kept = pixels[down.start : down.stop, across.start : across.stop, :channels]
        placed[:, down.put : down.put + down.kept, across.put : across.put + across.kept] = kept.transpose(2, 0, 1)
        return placed


class _Pass:
    """The resize along one dimension of an image as stored."""

    def __init__(self, dimension: int, length: float, side: Side, is_reversed: bool):
        """`length`: before the resize; not whole where the decoder has shrunk the image and cut a pixel."""
        self._dimension, self._length, self._side = dimension, length, side
        start = side.length - side.stop if is_reversed else side.start
        self._stop = start + side.kept
        reach = 2 * max(length / side.length, 1)  # of bicubic's kernel, the wider one
        self.needed = math.ceil((self._stop - 0.5) * length / side.length + reach) + 1  # pixels at most, from the first
        self.kept = (
            slice(start, self._stop) if not is_reversed else slice(self._stop - 1, (start - 1) if start else None, -1)
        )

    def resized(self, image: "torch.Tensor", operator: Any) -> "torch.Tensor":
        """`image`: (1, C, H, W). Up to the last pixel that is kept, or one more."""
        if self._length == self._side.length:
            return image
        output = list(image.shape[2:])
        scales: list[float | None] = [None, None]
        # As many pixels as there were would tell torch that nothing is to be done.
        output[self._dimension - 2] = self._stop + (self._stop == image.shape[self._dimension])
        scales[self._dimension - 2] = self._side.length / self._length
        return operator(image, output, False, *scales)


def as_array(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, channels), without a copy where Pillow holds the image in one block (up to 16 MB).

    Channels are 1 for L, else 4: of RGB the last one means nothing, and a copy leaves it out.
    """
    try:
        levels = pa.array(image)
    except ValueError:  # several blocks
        return np.asarray(image).reshape(image.height, image.width, -1)
    levels = levels.flatten() if image.mode != "L" else levels
    return levels.to_numpy().reshape(image.height, image.width, -1)


def as_image(pixels: np.ndarray) -> Image.Image:
    """L or RGB on the memory of uint8 (height, width, 1 or 4): the other way round."""
    height, width, channels = pixels.shape
    levels = pa.array(pixels.reshape(-1))
    if channels == 1:
        return Image.fromarrow(levels, "L", (width, height))
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(levels, channels), "RGB", (width, height))
