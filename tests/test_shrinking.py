"""Thumbnails of whatever there is: upright, bounded, and no picture where there is none."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
from pictures import broken, encoded, jpeg, oriented, photo, png_claiming, sound
from PIL import Image

from pipeline.images import FORMATS
from pipeline.shrinking import SIDE, Shrinker


@pytest.fixture(scope="module")
def shrink() -> Iterator[Shrinker]:
    with Shrinker(FORMATS) as shrinker:
        yield shrinker


def opened(picture: bytes | None) -> Image.Image:
    assert picture is not None
    image = Image.open(io.BytesIO(picture))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


def test_an_image_keeps_its_sides_and_its_looks(shrink: Shrinker) -> None:
    small = opened(shrink(jpeg(640, 320, seed=3)))
    assert small.size == (SIDE, SIDE // 2)
    want = np.asarray(photo(640, 320, 3).resize(small.size), np.float32)
    assert np.abs(np.asarray(small, np.float32) - want).mean() < 12
    assert opened(shrink(jpeg(40, 20))).size == (40, 20)  # never larger than it is


def test_it_is_turned_upright(shrink: Shrinker) -> None:
    assert opened(shrink(jpeg(300, 100, exif=oriented(6)))).size == (43, SIDE)


@pytest.mark.parametrize("name", sorted(sound()))
def test_every_kind_that_decodes_has_one(shrink: Shrinker, name: str) -> None:
    """16 bits, palettes, alpha, CMYK, animations …"""
    opened(shrink(sound()[name]))


def test_a_cut_image_shows_what_is_there(shrink: Shrinker) -> None:
    assert opened(shrink(broken()["jpeg_rgb_cut"][1])).size == (60, 40)


@pytest.mark.parametrize("name", ["html", "noise", "empty", "svg", "eps", "pdf", "mp4", "zip"])
def test_what_is_no_image_has_none(shrink: Shrinker, name: str) -> None:
    assert shrink(broken()[name][1]) is None


def test_a_bomb_costs_its_picture_and_the_next_one_has_its_own(shrink: Shrinker) -> None:
    """3.6 Gpx of a few bytes; and a process that the system kills is replaced."""
    assert shrink(png_claiming(60_000, 60_000)) is None
    assert shrink._process is not None
    shrink._process.kill()
    shrink._process.wait()
    opened(shrink(jpeg(64, 64)))


def test_only_the_formats_named_are_decoded() -> None:
    """EPS would be run through Ghostscript; here PNG stands for what nobody named."""
    with Shrinker(("JPEG",)) as shrink:
        assert shrink(encoded(photo(30, 20), "PNG")) is None
        opened(shrink(jpeg(30, 20)))
