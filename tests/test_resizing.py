"""The promises of pipeline/resizing.py: timm's transform to the bit, or two levels off, whatever the image."""

import itertools
import random
from dataclasses import asdict

import numpy as np
import pictures
import pytest
from PIL import Image
from timm.data import create_transform

from pipeline import resizing
from pipeline.errors import Reject
from pipeline.images import UPRIGHT, Preprocessing
from pipeline.resizing import BOUNDS, MODES, Resizer, as_array, as_image, sides

CROPS = ("center", "squash", "border")
SIDES = (1, 2, 3, 7, 17, 32, 64, 100, 277, 331, 500, 900)


def settings(
    crop: str = "center",
    interpolation: str = "bicubic",
    size: tuple[int, int] = (224, 224),
    crop_pct: float = 0.9,
    channels: int = 3,
) -> Preprocessing:
    return Preprocessing(
        input_size=(channels, *size),
        crop_pct=crop_pct,
        crop_mode=crop,
        interpolation=interpolation,
        mean=(0.485, 0.456, 0.406, 0.5)[:channels],
        std=(1.0,) * channels,
    )


def resizer(asked: Preprocessing) -> Resizer:
    return Resizer(asked, create_transform(**asdict(asked), is_training=False, use_prefetcher=True))


def oracle(asked: Preprocessing, image: Image.Image) -> np.ndarray:
    pixels = create_transform(**asdict(asked), is_training=False, use_prefetcher=True)(image).numpy()
    assert isinstance(pixels, np.ndarray)
    return pixels.astype(np.int16)


def hostile(kind: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB: white noise, black and white noise, a checkerboard, stripes, or a photo."""
    if kind == "photo":
        return pictures.photo(width, height, seed)
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    levels = {
        "noise": rng.integers(0, 256, (height, width, 3)),
        "black and white": rng.integers(0, 2, (height, width, 3)) * 255,
        "checkerboard": np.repeat(((x + y) % 2 * 255)[..., None], 3, 2),
        "stripes": np.repeat(((x + 2 * y) // 3 % 2 * 255)[..., None], 3, 2),
    }[kind]
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize("seed", range(6))
def test_random_resizes_of_hostile_images(seed: int) -> None:
    """Sizes, crops, kernels, channels and turns at random: `exact` is timm's to the bit, `fast` two levels off."""
    chance = random.Random(seed)
    for number in range(50):
        channels = chance.choice((1, 3, 3))
        size = (chance.choice((32, 97, 224)), chance.choice((32, 80, 224)))
        asked = settings(
            chance.choice(CROPS),
            chance.choice(("bilinear", "bicubic")),
            size,
            chance.choice((0.5, 0.875, 0.9, 0.95, 1.0)),
            channels,
        )
        width, height = (chance.choice((*SIDES, chance.randint(1, 900))) for _ in "wh")
        if not 0.01 <= width / height <= 100:
            continue
        kind = chance.choice(("noise", "black and white", "checkerboard", "stripes", "photo"))
        image = hostile(kind, width, height, number).convert(MODES[channels])
        turn = chance.choice((None, *UPRIGHT.values()))
        upright = image if turn is None else image.transpose(turn)
        try:
            want = oracle(asked, upright)
        except ValueError:  # Pillow makes no image without pixels
            with pytest.raises(Reject, match="its resize to"):
                resizer(asked).exact(upright)
            continue
        ours = resizer(asked)
        assert np.array_equal(ours.exact(upright), want)
        got = ours.fast(as_array(image), image.size, turn)
        assert got.dtype == np.uint8 and got.flags.c_contiguous
        assert np.abs(got - want).max() <= BOUNDS["fast"].levels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", CROPS)
def test_extreme_sizes(crop: str, interpolation: str) -> None:
    """Blown up a hundredfold, shrunk thirtyfold, at 100:1, and where the resize leaves a side as it is."""
    asked = settings(crop, interpolation)
    for width, height in ((2, 2), (7, 3), (3000, 40), (40, 3000), (2500, 2000), (248, 331), (300, 248), (331, 900)):
        image = hostile("black and white", width, height)
        want, ours = oracle(asked, image), resizer(asked)
        assert np.array_equal(ours.exact(image), want)
        off = np.abs(ours.fast(as_array(image), image.size) - want)
        assert off.max() <= BOUNDS["fast"].levels


def test_two_levels_are_proved() -> None:
    """The second pass's weights have magnitudes that sum to less than 1.5, so it carries one level on as less than two.

    Pillow's float resize of single points gives the weights.
    """
    chance = random.Random(3)
    for _ in range(300):
        before, after = chance.randint(1, 300), chance.randint(1, 300)
        points = Image.fromarray(np.eye(before, dtype=np.float32))
        for kernel in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            weights = np.asarray(points.resize((after, before), kernel))
            assert np.abs(weights).sum(0).max() < 1.5


@pytest.mark.parametrize("interpolation", ["lanczos", "hamming", "box", "nearest"])
def test_other_kernels_are_pillows(interpolation: str) -> None:
    """To the bit, and `fast` does not try them."""
    asked, image = settings(interpolation=interpolation), hostile("noise", 400, 300)
    assert np.array_equal(resizer(asked).exact(image), oracle(asked, image))
    assert not resizer(asked).is_fast


def test_rgba_is_pillows() -> None:
    """Its resize weighs colours with alpha."""
    image = hostile("noise", 90, 70)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    asked = settings("border", channels=4)
    assert np.array_equal(resizer(asked).exact(image), oracle(asked, image))
    assert not resizer(asked).is_fast


def test_without_the_known_kernel_it_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AVX2 gives the pixels of `exact`: torch's other kernel keeps no such bound."""
    data = pictures.jpeg(300, 200)
    want = pictures.decoder()(data)
    monkeypatch.setattr(resizing, "KERNELS", ())
    slow = type(pictures.decoder())(pictures.decoder().preprocessing, how="fast")
    assert np.array_equal(slow(data).pixels, want.pixels)


def test_a_resize_to_nothing_is_a_reject() -> None:
    """A strip, for a small model that keeps the whole image: timm itself raises a ValueError."""
    with pytest.raises(Reject, match="100x1 pixels: its resize to 33x0 is none"):
        sides(settings("border", size=(32, 32), crop_pct=0.95), 100, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("width", [3, 2200])
def test_memory_is_shared_with_pillow(mode: str, width: int) -> None:
    """There and back, also where Pillow holds the image in several blocks and it has to be copied."""
    image = hostile("noise", width, 2000).convert(mode)
    pixels = as_array(image)
    assert np.array_equal(pixels[..., : len(mode)].squeeze(), np.asarray(image))
    if mode != "RGBA" and pixels.shape[2] != 3:
        assert np.array_equal(np.asarray(as_image(pixels)), np.asarray(image))


def test_where_scaled_begins() -> None:
    """At four times the resized side for a half, eight for a quarter, sixteen for an eighth, both sides counting."""
    ours = resizer(settings())
    for side, factor in ((991, 1), (992, 2), (1983, 2), (1984, 4), (3967, 4), (3968, 8), (20_000, 8)):
        assert ours.factor(side, side) == ours.factor(side * 2, side) == ours.factor(side, side * 2) == factor
    squashed = resizer(settings("squash"))
    for width, height in itertools.permutations((2000, 500)):
        assert squashed.factor(width, height) == 1
