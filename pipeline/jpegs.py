"""A JPEG's bytes → its frame (size, colours, orientation) and its pixels, without Pillow; or None: ask Pillow.

Both take the same libjpeg-turbo's slow, exact transform and smooth upsampling, so the pixels are Pillow's to the bit,
a seventh sooner and with the interpreter's lock held for a few microseconds. Whatever is odd about a file is left to
Pillow: other codings than baseline and progressive Huffman, 12 bits, CMYK, damage that libjpeg would only warn of.
"""

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

FACTORS = (8, 4, 2)  # by which the inverse transform can shrink an image with the processor's vector instructions
# A file that is cut or lies about its size: libjpeg would fill all of it with grey before it complains, Pillow stops
# where the bytes end. Photos have 2 to 20 pixels a byte; flat areas, which may be right, 85 with the usual tables.
MAX_PIXELS_A_BYTE = 100
SOF = {0xC0: False, 0xC1: False, 0xC2: True}  # baseline, extended and progressive with Huffman codes: is progressive
SOS, EOI, COM, DQT, DHT, DRI = 0xDA, 0xD9, 0xFE, 0xDB, 0xC4, 0xDD
APP0, APP1, APP2, APP13, APP14, APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
# Segments whose content decides nothing, with the bytes that Pillow's reading of each needs at least: a shorter one
# it refuses. Photoshop's (APP13) and the multi-picture index (APP2) it refuses for more than can be repeated here.
LEAST = {APP0: (b"JFIF", 7), APP2: (b"ICC_PROFILE\0", 14), APP14: (b"Adobe", 12)}
JUDGED_BY_PILLOW = {APP2: b"MPF\0", APP13: b"Photoshop 3.0\0"}
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
ORIENTATION, X_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x0128
USUAL = {ORIENTATION: (3, 1), X_RESOLUTION: (5, 1), RESOLUTION_UNIT: (3, 1)}  # type (short, rational) and count


class Frame(NamedTuple):
    """`width`, `height`: as stored, 1 or more. `components`: 1 (grey) or 3 (colours).

    `orientation`: EXIF's, 1 to 8; None where only Pillow's parsers can tell it, or whether they take the file at all.
    `is_one_pass`: the first scan holds all pixels, and a second one would be an error.
    """

    width: int
    height: int
    components: int
    is_progressive: bool
    is_one_pass: bool
    orientation: int | None


def read_frame(data: bytes) -> Frame | None:
    """What the segments before the first scan tell. None: not a JPEG, or not one that `decode` takes."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, end, frame, exif, xmp = 2, len(data), None, b"", b""
    is_plain = True  # and not judged by Pillow
    while at + 4 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        start, at = at + 4, at + 2 + length
        if length < 2 or at > end:
            return None
        if marker == SOS:
            if frame is None or frame.width * frame.height > MAX_PIXELS_A_BYTE * end:
                return None
            orientation = _orientation(exif, xmp) if is_plain else None
            one_pass = not frame.is_progressive and data[start] == frame.components
            return frame._replace(is_one_pass=one_pass, orientation=orientation)
        if marker in SOF:
            if frame is not None or (frame := _frame(data[start:at], SOF[marker])) is None:
                return None
        elif marker == APP1:
            is_plain &= not (exif and data.startswith(EXIF, start))
            exif = data[start:at] if data.startswith(EXIF, start) else exif
            xmp = data[start:at] if data.startswith(XMP, start) else xmp
        elif APP0 <= marker <= APP15:
            prefix, least = LEAST.get(marker, (b"", 0))
            is_plain &= length - 2 >= least or not data.startswith(prefix, start)
            is_plain &= marker not in JUDGED_BY_PILLOW or not data.startswith(JUDGED_BY_PILLOW[marker], start)
        elif marker not in (COM, DQT, DHT, DRI):
            return None
    return None


def _frame(segment: bytes, is_progressive: bool) -> Frame | None:
    if len(segment) < 6:
        return None
    bits, height, width, components = struct.unpack_from(">BHHB", segment)
    if bits != 8 or not width or not height or components not in (1, 3) or len(segment) != 6 + 3 * components:
        return None
    return Frame(width, height, components, is_progressive, is_one_pass=False, orientation=None)


def _orientation(exif: bytes, xmp: bytes) -> int | None:
    """Of a directory in which every entry is where and what it should be; of XMP, where EXIF has none, Pillow's."""
    found = _entries(exif[len(EXIF) :]) if exif else {}
    if found is None or (ORIENTATION not in found and b"Orientation" in xmp):
        return None
    return found.get(ORIENTATION, 1)


def _entries(block: bytes) -> dict[int, int] | None:
    """The short values of the first directory of a TIFF block; None where Pillow may stumble over it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return None
    (at,) = struct.unpack_from(order + "I", block, 4)
    if at + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, at)
    if at + 2 + 12 * count + 4 > len(block):
        return None
    values: dict[int, int] = {}
    sizes = 0
    for tag, kind, number, offset, short in _rows(order, block, at + 2, count):
        size = number * SIZES.get(kind, len(block))
        sizes += size if size > 4 else 0
        if tag in values or USUAL.get(tag, (kind, number)) != (kind, number):
            return None
        if not size or sizes > len(block) or (size > 4 and offset + size > len(block)):
            return None
        values[tag] = short
    return values


SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8), start=1))  # bytes of TIFF's types


def _rows(order: str, block: bytes, at: int, count: int) -> list[tuple[int, int, int, int, int]]:
    """Of each entry: tag, type, count, and its value field as one long and as its first short."""
    longs = struct.iter_unpack(order + "HHII", block[at : at + 12 * count])
    shorts = struct.iter_unpack(order + "8xHxx", block[at : at + 12 * count])
    return [(*entry, *short) for entry, short in zip(longs, shorts, strict=True)]


def decode(data: bytes, frame: Frame, factor: int = 1) -> np.ndarray | None:
    """uint8 (height, width, 1 or 4): grey, or RGB and a byte without meaning, as Pillow keeps them in memory.

    `factor`: 1, or one of `FACTORS`, by which both sides are divided, rounded up. None where libjpeg has anything to
    complain of: what it would then give is for Pillow to say.
    """
    least = {} if factor == 1 else {"min_height": -(-frame.height // factor), "min_width": -(-frame.width // factor)}
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "GRAY" if frame.components == 1 else "RGBX", **least)
    except ValueError:
        return None
    return pixels
