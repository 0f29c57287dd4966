"""The promises of pipeline/jpegs.py: what it takes is Pillow's to the bit, what it cannot judge it leaves to Pillow."""

import io
import random
from typing import Any

import numpy as np
import pictures
import pytest
from PIL import ExifTags, Image

from pipeline.images import UPRIGHT
from pipeline.jpegs import FACTORS, Frame, decode, read_frame

KINDS: dict[str, dict[str, Any]] = {
    "444": {"subsampling": 0, "quality": 95},
    "422": {"subsampling": 1, "quality": 60},
    "420": {"subsampling": 2, "quality": 90},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "grey progressive": {"mode": "L", "progressive": True, "quality": 30},
    "restarts": {"restart_marker_blocks": 1},
    "rgb": {"keep_rgb": True},
}


def frame_of(data: bytes) -> Frame:
    frame = read_frame(data)
    assert frame is not None
    return frame


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows_to_the_bit(kind: str) -> None:
    """Of every subsampling and coding, at odd sizes; shrunk ones are those of Pillow's `draft`."""
    for width, height in ((1, 1), (17, 9), (64, 48), (161, 97)):
        data = pictures.jpeg(width, height, **KINDS[kind])
        frame = frame_of(data)
        assert frame[:4] == (width, height, 1 if "grey" in kind else 3, "progressive" in kind)
        assert frame.is_one_pass == ("progressive" not in kind) and frame.orientation == 1
        for factor in (1, *FACTORS):
            image = Image.open(io.BytesIO(data))
            image.draft(image.mode, (max(1, width // factor), max(1, height // factor)))
            pixels = decode(data, frame, factor)
            assert pixels is not None and pixels.shape[:2] == (-(-height // factor), -(-width // factor))
            if image.size == pixels.shape[1::-1]:
                assert np.array_equal(pixels[..., :3].squeeze(), np.asarray(image).squeeze())


def test_a_progressive_jpeg_that_lacks_scans_is_smoothed_as_pillow_does() -> None:
    """Cut between two scans and ended properly: the same pixels."""
    data = pictures.jpeg(96, 64, progressive=True)
    at = -1
    cuts = [at for _ in range(8) if (at := data.find(b"\xff\xda", at + 1)) > 0]
    for cut in cuts[1:]:
        short = data[:cut] + b"\xff\xd9"
        pixels = decode(short, frame_of(short))
        want = np.asarray(Image.open(io.BytesIO(short)))
        assert pixels is None or np.array_equal(pixels[..., :3], want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read(orientation: int) -> None:
    """Without Pillow, of either byte order."""
    assert frame_of(pictures.jpeg(exif=pictures.oriented(orientation))).orientation == orientation
    exif = pictures.oriented(orientation)
    exif.endian = ">"
    assert frame_of(pictures.jpeg(exif=exif.tobytes())).orientation == orientation


def segment(marker: int, body: bytes, whole: bytes | None = None) -> bytes:
    """A JPEG with one more segment at its head."""
    whole = whole or pictures.jpeg()
    return whole[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + whole[2:]


@pytest.mark.parametrize(
    "data",
    [
        segment(0xE2, b"MPF\0" + bytes(20)),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04"),
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe\0"),
        segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08" + bytes(6), pictures.jpeg(exif=pictures.oriented(6))),
        segment(0xE1, b"Exif\0\0"),
        segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff"),
        segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
    ],
)
def test_what_pillow_alone_can_judge_is_left_to_it(data: bytes) -> None:
    """Segments that Pillow parses, and may refuse the file for, in ways that are not repeated here."""
    assert frame_of(data).orientation is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        pictures.png(),
        pictures.jpeg()[:100],
        pictures.jpeg(mode="CMYK"),
        pictures.broken()["jpeg_12bit"][1],
        pictures.jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
        pictures.jpeg().replace(b"\xff\xc0", b"\xff\xc3"),
        segment(0xC0, b"\x08\0\x10\0\x10\1\1\x11\0"),
        segment(0xC8, b"extension"),
        pictures.jpeg()[:2] + b"\xff" + pictures.jpeg()[2:],
    ],
)
def test_what_is_no_usual_jpeg_has_no_frame(data: bytes) -> None:
    """Other formats, cut headers, four colours, 12 bits, arithmetic, lossless, two frames, padding."""
    assert read_frame(data) is None


def test_damaged_pixels_are_left_to_pillow() -> None:
    """Anything that libjpeg only warns of."""
    data = bytearray(pictures.jpeg(160, 120, quality=90))
    start = data.index(b"\xff\xda") + 20
    chance, refused = random.Random(1), 0
    for _ in range(300):
        damaged = data.copy()
        damaged[chance.randrange(start, len(data) - 2)] ^= 1 << chance.randrange(8)
        pixels = decode(bytes(damaged), frame_of(bytes(damaged)))
        refused += pixels is None
        assert pixels is None or np.array_equal(pixels[..., :3], np.asarray(Image.open(io.BytesIO(damaged))))
    assert 20 < refused < 300
    assert decode(bytes(data[:-60]), frame_of(bytes(data))) is None
    assert decode(bytes(data[:-2]), frame_of(bytes(data))) is None


def test_damaged_exif_is_read_as_pillow_reads_it_or_left_to_it() -> None:
    """500 blocks with a few bytes changed: no other orientation is ever told."""
    exif = pictures.oriented(6)
    exif[ExifTags.Base.Make] = "maker"
    exif[ExifTags.Base.XResolution] = 72.0
    exif[ExifTags.Base.ResolutionUnit] = 2
    whole = pictures.jpeg(16, 16, exif=exif)
    start = whole.index(b"Exif\0\0") + 6
    stop = start + len(exif.tobytes()) - 6
    chance, told = random.Random(5), 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(start, stop)] = chance.choice((0, 1, 2, 3, 8, 255, chance.randrange(256)))
        frame = frame_of(bytes(data))
        if frame.orientation is not None:
            told += 1
            pillows = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
            assert UPRIGHT.get(frame.orientation) == UPRIGHT.get(pillows)
    assert 50 < told < 450
