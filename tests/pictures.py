"""Bytes of images for tests: photo-like ones, and odd and broken ones by name; a decoder. Nothing here reads a file."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from pipeline.images import Decoder, Preprocessing

HOWS = ("exact", "fast", "scaled")  # of --decode, on the CPU
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB, photo-like: smooth colour gradients, some edges, fine grain. The same arguments give the same pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    levels = np.empty((height, width, 3), np.float32)
    for channel in range(3):
        a, b, phase = rng.uniform(2, 12, 3)
        levels[..., channel] = 128 + 70 * np.sin(a * x + phase) * np.cos(b * y) + 30 * ((x * a + y * b) % 1 > 0.5)
    levels += rng.normal(0, 12, levels.shape)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """`image` saved by Pillow as `form` (JPEG, PNG, GIF …)."""
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def jpeg(width: int = 96, height: int = 64, seed: int = 0, *, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of `photo`. `options` are Pillow's, such as `quality`, `exif`, `progressive`."""
    return encoded(photo(width, height, seed).convert(mode), "JPEG", **options)


def png(width: int = 96, height: int = 64, seed: int = 0, *, mode: str = "RGB", **options: Any) -> bytes:
    """A PNG of `photo`."""
    return encoded(photo(width, height, seed).convert(mode), "PNG", **options)


def oriented(orientation: int) -> Image.Exif:
    """An EXIF block that holds the orientation alone."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animation(form: str, frames: int = 3, **options: Any) -> bytes:
    """An animated GIF, PNG or WEBP, every frame another photo."""
    rest = [photo(60, 40, seed) for seed in range(1, frames)]
    return encoded(photo(60, 40), form, save_all=True, append_images=rest, duration=40, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of under 100 bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_HEAD + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def png_text_bomb(unpacked_bytes: int = 80 * 2**20) -> bytes:
    """A sound PNG with a text chunk of some kilobytes that unpacks to `unpacked_bytes`."""
    sound = png()
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(unpacked_bytes), 9))
    return sound[:33] + text + sound[33:]


def endless_gif(frames: int) -> bytes:
    """A GIF of 8x8 pixels whose one frame is repeated `frames` times."""
    sound = encoded(photo(8, 8).convert("P"), "GIF")
    head = 13 + 3 * 2 ** ((sound[10] & 7) + 1)
    return sound[:head] + sound[head:-1] * frames + b";"


@cache
def sound() -> dict[str, bytes]:
    """Odd, but decodable: name to bytes."""
    image = photo(60, 40)
    grey16 = Image.fromarray((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60))
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    palette = image.quantize(16)
    return {
        "jpeg_rgb": encoded(image, "JPEG"),
        "jpeg_progressive": encoded(image, "JPEG", progressive=True),
        "jpeg_grey": encoded(image.convert("L"), "JPEG"),
        "jpeg_cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg_junk_after_end": encoded(image, "JPEG") + b"\0junk" * 100,
        "jpeg_turned": encoded(image, "JPEG", exif=oriented(6)),
        "png_rgb": encoded(image, "PNG"),
        "png_rgba": encoded(alpha, "PNG"),
        "png_grey_alpha": encoded(alpha.convert("LA"), "PNG"),
        "png_palette": encoded(palette, "PNG"),
        "png_palette_transparency": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "png_1bit": encoded(image.convert("1"), "PNG"),
        "png_grey16": encoded(grey16, "PNG"),
        "png_animated": animation("PNG"),
        "gif": encoded(palette, "GIF"),
        "gif_animated": animation("GIF"),
        "webp": encoded(image, "WEBP"),
        "webp_lossless_alpha": encoded(alpha, "WEBP", lossless=True),
        "webp_animated": animation("WEBP"),
        "avif": encoded(image, "AVIF"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff_lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff_lab": encoded(image.convert("LAB"), "TIFF"),
        "tiff_ycbcr": encoded(image.convert("YCbCr"), "TIFF"),
        "tiff_float": encoded(Image.fromarray(np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60)), "TIFF"),
        "tiff_turned": encoded(image, "TIFF", exif=oriented(6)),
        "jpeg2000": encoded(image, "JPEG2000"),
        "ppm": encoded(image, "PPM"),
        "ico": encoded(photo(32, 32), "ICO"),
        "png_transparent_colour": encoded(alpha.convert("RGB"), "PNG", transparency=image.getpixel((30, 20))),
        "png_transparent_grey": encoded(alpha.convert("L"), "PNG", transparency=128),
        "one_pixel": encoded(image.resize((1, 1)), "PNG"),
    }


@cache
def broken() -> dict[str, tuple[str, bytes]]:
    """Undecodable: name to (the reject's reason, bytes)."""
    whole = sound()
    cut = {
        f"{name}_cut": ("truncated", whole[name][: len(whole[name]) * 6 // 10])
        for name in ("jpeg_rgb", "jpeg_progressive", "png_rgb", "gif", "webp", "bmp", "tiff")
    }
    return cut | {
        "empty": ("empty", b""),
        "jpeg_head": ("truncated", whole["jpeg_rgb"][:20]),
        "png_head": ("truncated", whole["png_rgb"][:20]),
        "png_bad_checksum": ("corrupt", whole["png_rgb"].replace(b"IDAT", b"IDAT\xff\xff", 1)),
        "jpeg_magic_alone": ("truncated", b"\xff\xd8\xff\xe0"),
        "jpeg_of_noise": ("corrupt", b"\xff\xd8\xff" + bytes(range(200)) + b"\xff\xd9"),
        "html": ("corrupt", b"<!DOCTYPE html>\n<html><body>404 not found</body></html>"),
        "text": ("corrupt", b"no such object: photos/0001.jpg\n"),
        "json": ("corrupt", b'{"error": "access denied"}'),
        "xml": ("corrupt", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        "zeros": ("corrupt", bytes(4096)),
        "noise": ("corrupt", np.random.default_rng(3).bytes(4096)),
        "zip": ("corrupt", b"PK\x03\x04" + bytes(100)),
        "heic": ("unsupported", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)),
        "jpeg_xl": ("unsupported", b"\xff\x0a" + bytes(400)),
        "svg": ("unsupported", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "pdf": ("unsupported", b"%PDF-1.7\n" + bytes(400)),
        "eps": ("unsupported", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        "mp4": ("unsupported", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(400)),
        "jpeg_12bit": ("unsupported", whole["jpeg_rgb"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1)),
        "bomb_pixels": ("too_large", png_claiming(60_000, 60_000)),
        "bomb_text": ("too_large", png_text_bomb()),
        "strip": ("too_large", png(1000, 4)),
        "zero_width": ("corrupt", png_claiming(0, 10)),
    }


def data_config(model: str, channels: int = 3) -> dict[str, Any]:
    """What timm resolves for `model`, and the channels of its images replaced: `mean` and `std` stay the model's."""
    import timm  # slow, and most of those who want pictures need none of it
    from timm.data import resolve_data_config

    cfg = timm.get_pretrained_cfg(model)
    assert cfg is not None
    config: dict[str, Any] = resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    return config | {"input_size": (channels, *config["input_size"][1:])}


@cache
def decoder(
    model: str = "pit_s_224", channels: int = 3, *, exif_orientation: bool = True, how: str = "exact"
) -> Decoder:
    return Decoder(Preprocessing.of(data_config(model, channels)), exif_orientation=exif_orientation, how=how)
