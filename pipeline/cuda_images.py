"""`--decode cuda`: JPEGs are decoded and resized on the device, a batch at a time; all else goes as `--decode fast`.

    decoding threads: bytes → header → `Jpeg`, or decoded as by `fast` → embedding thread: a batch → pixels there

The device is given what its decoder is made for: baseline, YCbCr, whole. What it fails at nevertheless is decoded, or
rejected, by the CPU, alone: a bad image costs its batch some milliseconds, and no other image anything.

The resize is Pillow's to the bit. The pixels before it are not: nvJPEG has another inverse transform and upsamples
chroma otherwise than libjpeg-turbo, so colour edges differ. The bounds below hold for what comes out, against `exact`,
over photo-like images. They are guesses on the safe side, not yet measured: the tests marked `gpu` print the figures.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.device import is_out_of_memory, out_of_memory_explained
from pipeline.errors import NoRoom, Reject, UsageError
from pipeline.flow import grouped
from pipeline.images import LARGE_PIXELS, MAX_ASPECT, UPRIGHT, Decoded, Decoder, Preprocessing
from pipeline.jpegs import APP14, SOS, read_frame
from pipeline.resizing import MODES, SWAPS, Side, Turn, is_down_first, sides

MOST_LEVELS, MEAN_LEVELS = 128, 4.0  # off `exact`: the largest and the mean difference
LEAST_COSINE = 0.99  # of an embedding with that of `exact`

MOST_BYTES = 4 * 2**20  # of a JPEG for the device: a batch of them waits in memory, encoded
LEAST_SIDE = 64  # pixels; a smaller one costs the CPU less than the device's launches
TAIL_BYTES = 64  # the end mark is looked for in so many last bytes; without it a file is cut, or has something behind
CHUNK_BYTES = 256 * 2**20  # of decoded pixels on the device at once, beside five times that while they are resized
SAMPLINGS = {(1, 1), (2, 1), (2, 2)}  # of luma by chroma, across and down: what the hardware's decoder takes
BASELINE = 0xC0
YCBCR = (1, 2, 3)  # the components' names of it; libjpeg takes 82, 71, 66 for RGB
JPEG_COLOURS = 1  # Adobe's mark of YCbCr

# Pillow's resize, from https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c: weights are whole
# numbers of 22 bits, sums are whole numbers, and each pass rounds to levels.
BITS = 22
LOW_BITS = 12  # a weight goes in two parts, so that float32 products and sums of them with levels are whole and exact
CACHED = 128  # weights on the device, 0.4 MB each for 500 pixels and 7 MB for 4000
FLIPS: dict[Turn | None, tuple[int, ...]] = {  # of the dimensions, after rows and columns are swapped where they are
    Turn.FLIP_LEFT_RIGHT: (-1,), Turn.FLIP_TOP_BOTTOM: (-2,), Turn.ROTATE_180: (-1, -2), Turn.ROTATE_90: (-2,),
    Turn.ROTATE_270: (-1,), Turn.TRANSVERSE: (-1, -2),
}  # fmt: skip


class Jpeg(NamedTuple):
    """An encoded image for the device. `stored`: its height and width; `width`, `height`: of the upright image."""

    data: bytes
    stored: tuple[int, int]
    turn: Turn | None
    width: int
    height: int


class OnDevice(NamedTuple):
    """As `Decoded`, with pixels on the device."""

    pixels: torch.Tensor  # uint8 (C, H, W)
    width: int
    height: int


def why_not_there(preprocessing: Preprocessing) -> str:
    """Why the device decodes none of a model's images; "" where it does."""
    channels = preprocessing.input_size[0]
    if channels != 3:
        return f"the model takes {MODES[channels]} images"
    return "" if preprocessing.interpolation in FILTERS else f"the model's are resized by {preprocessing.interpolation}"


class HeaderDecoder:
    """What the decoding threads call: an image's bytes → `Jpeg`, or `Decoded` by the CPU. Raises `Reject`."""

    def __init__(self, preprocessing: Preprocessing, *, exif_orientation: bool = True):
        self.cpu = Decoder(preprocessing, exif_orientation=exif_orientation, how="cuda")
        self._takes_any = not why_not_there(preprocessing)

    def __call__(self, data: bytes) -> "Decoded | Jpeg":
        return (self._takes_any and self._of_device(data)) or self.cpu(data)

    def _of_device(self, data: bytes) -> Jpeg | None:
        """None where the CPU is to decide."""
        if len(data) > MOST_BYTES or b"\xff\xd9" not in data[-TAIL_BYTES:]:
            return None
        frame = read_frame(data)
        if frame is None or frame.orientation is None or frame.components != 3 or not frame.is_one_pass:
            return None
        short, long = sorted((frame.width, frame.height))
        if short < LEAST_SIDE or long > MAX_ASPECT * short or short * long > LARGE_PIXELS or not _is_usual(data):
            return None
        turn = UPRIGHT.get(frame.orientation) if self.cpu.exif_orientation else None
        stored = frame.height, frame.width
        return Jpeg(data, stored, turn, *(stored if turn in SWAPS else stored[::-1]))


def _is_usual(data: bytes) -> bool:
    """Whether a JPEG whose segments `read_frame` has gone over is baseline YCbCr in one of `SAMPLINGS`."""
    at, usual = 2, False
    while (marker := data[at + 1]) != SOS:
        segment = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        if 0xC0 <= marker <= 0xC2:
            names, sampling = segment[6::3], [(s >> 4, s & 15) for s in segment[7::3]]
            usual = marker == BASELINE and tuple(names) == YCBCR
            usual &= sampling[0] in SAMPLINGS and sampling[1:] == [(1, 1), (1, 1)]
            if not usual:
                return False
        elif marker == APP14 and segment[:5] == b"Adobe" and segment[11:12] != bytes([JPEG_COLOURS]):
            return False
        at += 4 + len(segment)
    return usual


def decode_jpegs(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """torchvision's: uint8 (bytes,) each → uint8 (3, H, W) each on the device. Raises `RuntimeError` for any bad one.

    It returns when they are decoded. Deprecated since torchvision 0.29, and still there. nvJPEG writes to what torch's
    allocator has for the current stream and does not wait for it (https://github.com/pytorch/vision/pull/9606), so what
    was queued there must be over.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # type: ignore[import-untyped]

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return list(decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device))


def check_decoder(
    device: torch.device, decode: Callable[[list[torch.Tensor], torch.device], list[torch.Tensor]] = decode_jpegs
) -> None:
    """Decodes a JPEG on the device. Raises `UsageError` where torchvision cannot, as without nvJPEG, and `NoRoom`."""
    sink = io.BytesIO()
    Image.new("RGB", (LEAST_SIDE, LEAST_SIDE)).save(sink, "JPEG")
    try:
        with out_of_memory_explained(device, "the decoder of JPEGs"):
            decode([_bytes(sink.getvalue())], device)
    except NoRoom:
        raise
    except (RuntimeError, ImportError, AttributeError) as e:  # the last two of torchvisions built without any of it
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UsageError(
            f"--decode cuda: this torchvision decodes no JPEG on {device} ({why}): choose --decode fast"
        ) from e


class DeviceImages:
    """Decodes batches on a device; called from one thread, in the stream that the pixels are then used in."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        device: torch.device,
        cpu: Callable[[bytes], Decoded],
        decode: Callable[[list[torch.Tensor], torch.device], list[torch.Tensor]] = decode_jpegs,
    ):
        """`cpu`: for what the device cannot decode. Raises as `check_decoder`."""
        self._device, self._cpu, self._decode = device, cpu, decode
        self._resize = DeviceResizer(preprocessing, device)
        check_decoder(device, decode)

    def __call__(self, images: Sequence["Decoded | Jpeg | OnDevice"]) -> list["Decoded | OnDevice | Reject"]:
        """In their order; what is decoded already stays as it is."""
        found: dict[int, OnDevice] = {}
        jpegs = ((n, image) for n, image in enumerate(images) if isinstance(image, Jpeg))
        for chunk in grouped(jpegs, _pixels, CHUNK_BYTES):
            raw = self._decoded([jpeg for _, jpeg in chunk])
            alike: dict[tuple[Any, ...], list[int]] = {}  # of one size, turned alike: they are resized together
            for place, ((_, jpeg), pixels) in enumerate(zip(chunk, raw, strict=True)):
                if pixels is not None:
                    alike.setdefault((jpeg.stored, jpeg.turn), []).append(place)
            for (_, turn), places in alike.items():
                resized = self._resized([raw[place] for place in places], turn)
                for place, pixels in zip(places, resized, strict=False):  # none, where memory ran out
                    n, jpeg = chunk[place]
                    found[n] = OnDevice(pixels, jpeg.width, jpeg.height)
        return [found.get(n) or self._by_cpu(image) for n, image in enumerate(images)]

    def _decoded(self, jpegs: list[Jpeg]) -> list[torch.Tensor | None]:
        """None for those that the device fails at, found by halves."""
        try:
            pixels = self._decode([_bytes(jpeg.data) for jpeg in jpegs], self._device)
        except RuntimeError:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # it may still be writing what it was at
            if len(jpegs) == 1:
                return [None]
            half = len(jpegs) // 2
            return self._decoded(jpegs[:half]) + self._decoded(jpegs[half:])
        return [p if p.shape == (3, *j.stored) else None for p, j in zip(pixels, jpegs, strict=True)]

    def _resized(self, pixels: Sequence[Any], turn: Turn | None) -> Iterable[torch.Tensor]:
        try:
            return self._resize(turned(torch.stack(list(pixels)), turn))
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            return ()

    def _by_cpu(self, image: "Decoded | Jpeg | OnDevice") -> "Decoded | OnDevice | Reject":
        if not isinstance(image, Jpeg):
            return image
        try:
            return self._cpu(image.data)
        except Reject as why:
            return why


def _bytes(data: bytes) -> torch.Tensor:
    """Without a copy; nobody writes to it, though torch warns that somebody might (`Decoder` silences that)."""
    return torch.from_numpy(np.frombuffer(data, np.uint8))


def _pixels(one: tuple[int, Jpeg]) -> int:
    """Their bytes."""
    return 3 * math.prod(one[1].stored)


def turned(images: torch.Tensor, turn: Turn | None) -> torch.Tensor:
    """(…, H, W) as Pillow's `transpose(turn)`; some of it a view."""
    if turn in SWAPS:
        images = images.transpose(-1, -2)
    return images if turn not in FLIPS else images.flip(FLIPS[turn])


# the resize


def bicubic(x: np.ndarray) -> np.ndarray:
    """Pillow's, with a = -0.5; of numbers from 0 on."""
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bilinear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - x, 0, None)


Filter = Callable[[np.ndarray], np.ndarray]
FILTERS: dict[str, tuple[Filter, float]] = {"bicubic": (bicubic, 2.0), "bilinear": (bilinear, 1.0)}  # with their reach


def weights(interpolation: str, length: int, side: Side) -> np.ndarray:
    """float64 (kept, length): Pillow's whole-numbered weights of the pixels that the crop keeps."""
    function, support = FILTERS[interpolation]
    scale = length / side.length
    widened = max(scale, 1.0)
    centers = (np.arange(side.start, side.stop) + 0.5) * scale
    first = np.maximum(np.trunc(centers - support * widened + 0.5), 0)
    last = np.minimum(np.trunc(centers + support * widened + 0.5), length)
    at = np.arange(length)
    found = function(np.abs((at - centers[:, None] + 0.5) * (1 / widened)))
    found[(at < first[:, None]) | (at >= last[:, None])] = 0.0
    found /= np.cumsum(found, axis=1)[:, -1:]  # one after the other, as there
    scaled = found * 2**BITS
    return np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5))


class DeviceResizer:
    """timm's evaluation resize and crop of images of one size, bit-equal to Pillow's, on any device."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device):
        self._settings, self._device = preprocessing, device
        self._weights = lru_cache(CACHED)(self._parts)
        levels = [round(255 * mean) for mean in preprocessing.mean] if preprocessing.crop_mode == "border" else [0]
        self._fill = torch.tensor(levels, dtype=torch.uint8, device=device).view(1, -1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`images`: uint8 (n, C, H, W), upright. Returns uint8 (n, C, H', W') of the model's size."""
        height, width = images.shape[-2:]
        across, down = sides(self._settings, width, height)
        levels = images.float()
        passes = [(self._across, width, across), (self._down, height, down)]
        for resize, length, side in reversed(passes) if is_down_first((width, height), across, down) else passes:
            levels = resize(levels, self._weights(length, side))
        _, model_height, model_width = self._settings.input_size
        placed = images.new_empty(*images.shape[:2], model_height, model_width)
        if (down.kept, across.kept) != (model_height, model_width):
            placed[:] = self._fill
        placed[..., down.put : down.put + down.kept, across.put : across.put + across.kept] = levels
        return placed

    def _across(self, levels: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        return _rounded(*torch.matmul(levels, parts.T).chunk(2, dim=-1))

    def _down(self, levels: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        return _rounded(*torch.matmul(parts, levels).chunk(2, dim=-2))

    def _parts(self, length: int, side: Side) -> torch.Tensor:
        """float32 (2 * kept, length): the weights' high parts, then their low ones."""
        whole = weights(self._settings.interpolation, length, side)
        high = np.floor(whole / 2**LOW_BITS + 0.5)
        parts = np.concatenate([high, whole - high * 2**LOW_BITS])
        return torch.from_numpy(parts.astype(np.float32)).to(self._device)


def _rounded(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Levels, as float32, of a pass's sums."""
    total = high.int().mul_(2**LOW_BITS).add_(low.int()).add_(2 ** (BITS - 1))
    return total.bitwise_right_shift_(BITS).clamp_(0, 255).float()
