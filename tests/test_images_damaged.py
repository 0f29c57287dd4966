"""`pipeline.images`: whatever strangers send gives pixels or a reject that says why."""

import itertools
import multiprocessing
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pictures
import pytest
from containers import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import decoder
from PIL import Image

from pipeline import images
from pipeline.errors import REASONS, Reject


def reject(data: bytes) -> Reject:
    """Which is the same, to the word, however it is decoded."""
    found = []
    for how in pictures.HOWS:
        with pytest.raises(Reject) as caught:
            decoder(how=how)(data)
        found.append(caught.value)
    assert len({why.args for why in found}) == 1
    return found[0]


# Broken


@pytest.mark.parametrize("name", sorted(pictures.broken()))
def test_every_broken_image_is_rejected_with_its_reason(name: str) -> None:
    """One line, short, without addresses, stage decode."""
    reason, data = pictures.broken()[name]
    got = reject(data)
    assert (got.reason, got.stage) == (reason, "decode")
    assert 0 < len(got.message) <= 200
    assert got.message.isprintable()
    assert " object at " not in got.message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("html", "HTML, not an image"),
        ("xml", "XML, not an image"),
        ("json", "JSON, not an image"),
        ("text", "text, not an image"),
        ("zeros", "only zeros, not an image"),
        ("zip", "a ZIP archive, not an image"),
        ("noise", "bytes that begin with f8 c2"),
        ("heic", "HEIC/HEIF"),
        ("jpeg_xl", "JPEG XL"),
        ("svg", "SVG"),
        ("pdf", "PDF"),
        ("eps", "PostScript"),
        ("jpeg_12bit", "12-bit"),
        ("strip", "1000x4 pixels: over 100:1"),
    ],
)
def test_the_message_says_what_it_is(name: str, words: str) -> None:
    """Somebody who reads the rejects knows where to look."""
    assert words in reject(pictures.broken()[name][1]).message


def test_a_jpeg_cut_anywhere_is_truncated() -> None:
    """Also inside its header, and where the EXIF block holds a whole thumbnail with its own end marker."""
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0" + pictures.jpeg(30, 20)
    data = pictures.jpeg(96, 64, exif=exif)
    assert decoder()(data)[1:] == (96, 64)
    assert {reject(data[:size]).reason for size in range(2, len(data) - 40, 61)} == {"truncated"}


def test_sizes_over_the_limits_are_refused_before_decoding() -> None:
    """Pixels above Pillow's own limit, and shapes that the resize would blow up; what is just below is decoded."""
    assert reject(pictures.png_claiming(13_378, 13_378)).reason == "too_large"
    assert reject(pictures.png_claiming(65_500, 1)).reason == "too_large"
    assert reject(pictures.png_claiming(8, 8_000)).reason == "too_large"
    assert reject(pictures.png_claiming(13_377, 13_377)).reason == "truncated"  # tried, and found without pixels
    assert decoder()(pictures.png(400, 4))[1:] == (400, 4)
    assert reject(pictures.png(401, 4)).reason == "too_large"


def test_a_cut_jpeg_that_claims_a_large_size_costs_little() -> None:
    """In no mode are its 156 million pixels filled in before it is found to lack them."""
    data = bytearray(pictures.jpeg(64, 48))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 12_000, 13_000)
    # In a process of its own: where memory was given back, the allocator fills the same pages anew.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        assert fresh.submit(_growth_of_a_reject, bytes(data[:-2])).result() < 50e6


def _growth_of_a_reject(data: bytes) -> int:
    decoder()
    with growth() as taken:
        assert reject(data).reason == "truncated"
    return taken.peak_bytes


def scans(times: int) -> bytes:
    """A progressive JPEG whose last scan comes `times` more."""
    data = pictures.jpeg(64, 48, mode="L", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + data[-2:]


def test_a_jpeg_of_endless_scans_is_refused_before_decoding() -> None:
    """Each is a pass over all pixels, of 14 bytes; those of an embedded or a following image are not counted."""
    usual = scans(0).count(b"\xff\xda")
    assert decoder()(scans(100 - usual))[1:] == (64, 48)
    assert reject(scans(101 - usual)).message == "a JPEG of 101 scans: more than 100"
    assert reject(scans(5000)).reason == "too_large"
    fake = b"\xff\xda" * 200
    comment = scans(0)[:2] + b"\xff\xfe" + (len(fake) + 2).to_bytes(2, "big") + fake + scans(0)[2:]
    assert decoder()(comment)[1:] == decoder()(scans(0) + fake)[1:] == (64, 48)


def test_tiles_larger_than_the_image_are_refused() -> None:
    """A TIFF of 100x100 pixels in 1.2 MB, whose one tile is 20000x20000, took 1.1 GB."""
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 20_000, 324: 200, 325: 50}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    bomb = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    bomb = bomb.ljust(200, b"\0") + zlib.compress(bytes(20_000))
    assert "tiles of 20000x20000 pixels" in reject(bomb).message
    sound = pictures.photo(100, 100)
    assert decoder()(pictures.encoded(sound, "TIFF", compression="tiff_adobe_deflate"))[1:] == (100, 100)


@pytest.mark.parametrize("name", ["QOI", "PPM", "DDS"])
def test_large_images_that_pillow_decodes_in_python_are_refused(name: str) -> None:
    """Up to 1.5 us a pixel, with the interpreter's lock: 179 Mpx would take minutes and stop the other threads."""
    side = 6000
    data = {
        "QOI": b"qoif" + struct.pack(">IIBB", side, side, 3, 0),
        "PPM": b"P3\n%d %d\n255\n" % (side, side),
        "DDS": b"DDS "
        + struct.pack("<7I44x8I20x", 124, 0x1007, side, side, 0, 0, 0, 32, 64, 0, 24, 255 << 16, 65280, 255, 0),
    }[name]
    got = reject(data + bytes(500))
    assert got.reason == "too_large" and got.message.startswith(f"6000x6000 pixels of {name}")


def test_an_icon_that_understates_its_size_is_measured_again() -> None:
    """Its directory says 16x16, its PNG is a strip: refused after the load, before the resize."""
    strip = pictures.png(3000, 4)
    entry = b"\x10\x10\0\0\1\0\x20\0" + len(strip).to_bytes(4, "little") + (22).to_bytes(4, "little")
    assert reject(b"\0\0\1\0\1\0" + entry + strip).reason == "too_large"


def test_pngs_with_two_headers_give_pixels_or_a_reject() -> None:
    """Palette and transparency of another kind than the pixels: Pillow's conversions raise errors of many types."""
    kinds = {2: b"\0\1\0\2\0\3", 3: b"\5\6\7", 0: b"\1\5", 4: b"\5" * 300, 6: b""}  # to a tRNS of their own
    headers = [pictures.png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, kind, 0, 0, 0)) for kind in kinds]
    palette, end = pictures.png_chunk(b"PLTE", bytes(range(48))), pictures.png_chunk(b"IEND", b"")
    pixels = pictures.png_chunk(b"IDAT", zlib.compress(bytes(264)))
    decoders, reasons = [decoder(channels=channels) for channels in images.MODES], Counter[str]()
    for first, second, value in itertools.product(headers, headers, kinds.values()):
        transparent = pictures.png_chunk(b"tRNS", value)
        for decode in decoders:
            try:
                assert decode(pictures.PNG_HEAD + first + palette + transparent + second + pixels + end).width == 8
            except Reject as error:
                reasons[error.reason] += 1
    assert reasons["corrupt"] > 0
    assert reasons["unsupported"] > 0


@pytest.mark.parametrize(("mode", "form", "how"), [("1", "PNG", "exact"), ("L", "JPEG", "fast")])
def test_large_images_wait_for_each_other_and_small_ones_do_not(mode: str, form: str, how: str) -> None:
    """While one image of over 32 Mpx is decoded, another waits; small images go on."""
    decode = decoder(how=how)
    large = pictures.encoded(Image.new(mode, (8000, 4001)), form)
    with ThreadPoolExecutor(1) as threads:
        with images._one_large_image:
            waiting = threads.submit(decode, large)
            assert decode(pictures.jpeg(60, 40))[1:] == (60, 40)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(timeout=30)[1:] == (8000, 4001)


def test_a_rejected_large_image_frees_the_way() -> None:
    """The next large image is decoded."""
    for _ in range(2):
        assert reject(pictures.png_claiming(8000, 5000)).reason == "truncated"
    assert not images._one_large_image.locked()


def test_formats_that_run_programs_or_open_others_are_left_out() -> None:
    """EPS would run Ghostscript, IPTC opens anything inside; all that remains, this Pillow has."""
    assert not {"EPS", "IPTC", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"} & set(decoder().formats)
    assert set(decoder().formats) == set(images.FORMATS)


def test_nothing_reaches_stderr() -> None:
    """Not a warning of large images, palette transparency, corrupt EXIF or TIFF tags, in a process of its own.

    But libtiff's own lines: Pillow leaves its C error handler on, which Python cannot reach.
    """
    script = """
import io, threading
from PIL import Image
from pipeline.errors import Reject
from pipeline.images import Decoder, Preprocessing
from tests import pictures
config = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear", "mean": [0.5], "std": [0.5]}
ways = ((1, "exact"), (3, "fast"), (4, "scaled"))
decoders = [Decoder(Preprocessing.of(config | {"input_size": (c, 32, 32)}), how=how) for c, how in ways]
odd = [*pictures.sound().values(), *(data for _, data in pictures.broken().values())]
decoders[0](pictures.encoded(Image.new("1", (10_000, 9_000)), "PNG"))
odd += [data[:at] + b"\\xff" * 4 + data[at + 4:] for data in odd[:30] for at in (12, 60, len(data) // 2)]
def run(decode):
    for data in odd:
        if data[:2] == b"II" and decode is not decoders[1]:
            continue  # libtiff writes a line in pieces, which two threads would mix
        try:
            decode(data)
        except Reject:
            pass
threads = [threading.Thread(target=run, args=(decode,)) for decode in decoders]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    ran = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, b"")
    assert [line for line in ran.stderr.splitlines() if not re.match(rb"tempfile\.tif: |LZWDecode: ", line)] == []


# Fuzz

FUZZED = {
    *("jpeg_turned", "jpeg_progressive", "png_palette_transparency", "png_grey16", "gif_animated", "webp"),
    *("webp_animated", "bmp", "tiff_turned", "tiff_lzw", "avif", "ico"),
}


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    channels=st.sampled_from(list(images.MODES)),
    how=st.sampled_from(pictures.HOWS),
    name=st.sampled_from(sorted(FUZZED)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=8),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_bytes_give_pixels_or_a_reject(
    channels: int, how: str, name: str, edits: list[tuple[float, bytes]], keep: float
) -> None:
    """Overwritten and cut anywhere: an image of the model's size, or a reject with a reason from the list."""
    damaged = bytearray(pictures.sound()[name])
    for where, patch in edits:
        at = int(where * where * len(damaged))  # squared: headers are where it hurts
        damaged[at : at + len(patch)] = patch
    try:
        got = decoder(channels=channels, how=how)(bytes(damaged[: round(keep * len(damaged))]))
    except Reject as error:
        assert error.reason in REASONS
        assert error.stage == "decode"
        assert 0 < len(error.message) <= 200
        assert error.message.isprintable()
    else:
        assert got.pixels.shape == (channels, 224, 224)
        assert got.pixels.dtype == np.uint8
        assert got.width > 0
        assert got.height > 0


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_give_a_reject(data: bytes) -> None:
    """Nothing else is raised."""
    with pytest.raises(Reject) as caught:
        decoder()(data)
    assert caught.value.reason in REASONS
