"""Image bytes become one uint8 image of the model's size and channels, or a `Reject` that says why not.

What enters was made by strangers: it may be empty, cut, a web page, or a bomb of a few kilobytes. What leaves is
timm's own evaluation transform of it, to the bit or within `resizing.BOUNDS`, short of its last step (divide by 255,
subtract the mean, divide by the standard deviation), which belongs on the device. Usual JPEGs go through `jpegs`, all
else, and whatever is odd about one, through Pillow; which way it was shows in no pixel and no reject. Refused are
formats that Pillow cannot decode by itself, damaged files, and pixel counts or shapes that would cost gigabytes.
"""

import contextlib
import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from pipeline.errors import Reason, Reject, UsageError
from pipeline.jpegs import Frame, decode, read_frame
from pipeline.resizing import MODES, SWAPS, Resizer, Turn, as_array, as_image

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: twice its Image.MAX_IMAGE_PIXELS
MAX_ASPECT = 100  # the short side is what gets resized: 65500x1 would become 4 Gpx; 8000x8 (2.6 kB) costs 127 MB
# Above this, one image at a time in a process. At 4 to 15 bytes a pixel (Pillow's RGB takes 4; a turn, a conversion, or
# an alpha multiplied into the colours for the resize as much again, 32-bit levels most) sixteen threads with a 179 Mpx
# image each would want 30 GB and more; so it is at most 2.7 GB and sixteen small ones.
LARGE_PIXELS = 32_000_000
# More than this many passes over all pixels are no encoder's: they write about ten. One costs some 14 bytes and, at 179
# Mpx, a quarter of a second: a JPEG of 27 MB could take seven hours.
MAX_SCANS = 100
CONTAINERS = {"ICO", "ICNS"}  # their directory tells a small size, the PNG inside may have any: treated as large

# Pillow's own formats, the usual ones first. Not among them: EPS (runs Ghostscript on the bytes), IPTC (opens whatever
# lies inside with every format, so EPS too), and those that Pillow names but cannot decode (BUFR, GRIB, HDF5, MPEG,
# WMF). A fixed list, so that what other packages register cannot change which images a set holds.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "BLP", "CUR", "DCX", "DDS", "DIB"),
    *("FITS", "FLI", "FTEX", "GBR", "ICNS", "IM", "IMT", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI"),
    *("SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB"),
)

# How files begin: of formats decoded here, of those with a name and no decoder, and of what is no image.
DECODED = {
    "JPEG": rb"\xff\xd8", "PNG": rb"\x89PNG", "GIF": rb"GIF8", "WEBP": rb"RIFF.{4}WEBP", "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II[*+]\0|MM\0[*+]", "AVIF": rb".{4}ftyp(avi[fs]|(mif1|msf1).{0,40}avif)", "ICO": rb"\0\0\x01\0",
    "JPEG2000": rb"\0{3}\x0cjP  |\xff\x4f\xff\x51", "PSD": rb"8BPS", "PPM": rb"P[1-7]\s", "DDS": rb"DDS ",
}  # fmt: skip
UNDECODED = {
    "HEIC/HEIF": rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL ", "PDF": rb"%PDF",
    "SVG": rb"(?i)\s*<(svg|!doctype svg|(\?xml|!--).*<svg)\b", "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "WMF": rb"\xd7\xcd\xc6\x9a", "EMF": rb"\x01\0{3}.{36} EMF", "JPEG XR": rb"II\xbc", "OpenEXR": rb"v/1\x01",
    "GIMP XCF": rb"gimp xcf", "Radiance HDR": rb"#\?R", "DjVu": rb"AT&TFORM", "DICOM": rb".{128}DICM",
    "camera raw": rb"FUJIFILMCCD|IIR[OS]|MMOR|IIU\0|.{4}ftypcrx", "MP4/QuickTime video": rb".{4}ftyp",
    "WebM/Matroska video": rb"\x1aE\xdf\xa3", "MPEG video": rb"\0\0\x01[\xb3\xba]", "AVI video": rb"RIFF.{4}AVI ",
    "HDF5": rb"\x89HDF", "GRIB": rb"GRIB", "BUFR": rb"BUFR", "Office document": rb"\xd0\xcf\x11\xe0",
}  # fmt: skip
OTHER = {
    "only zeros": rb"\0+\Z", "HTML": rb"(?i)\s*<(!doctype html|html|head|body|.*<html)\b", "XML": rb"\s*<\?xml",
    "JSON": rb"\s*[{\[]\s*[\"{\[\]}]", "a ZIP archive": rb"PK\x03\x04", "gzip data": rb"\x1f\x8b",
    "a Git LFS pointer": rb"version https://git-lfs", "text": rb"(?=.*[A-Za-z])[\t\n\r -~\x80-\xff]+\Z",
}  # fmt: skip

SCAN = b"\xff\xda"
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # with a length behind it, or the end mark

UPRIGHT = {
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip
AS_STORED = UPRIGHT | {6: Turn.ROTATE_90, 8: Turn.ROTATE_270}  # undoes UPRIGHT

# What Pillow's EXIF parser raises on damaged blocks.
EXIF_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, struct.error)
# What its conversions raise: mostly a ValueError; on PNGs with two headers, whose palette or transparency does not
# fit their mode, also a TypeError or an AssertionError (AttributeError under `python -O`).
CONVERT_ERRORS = (*EXIF_ERRORS, AssertionError, ImageCms.PyCMSError)

_one_large_image = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What timm resolved for a model. Hashable; `dataclasses.asdict` of it goes into JSON, `of` takes it back."""

    input_size: tuple[int, int, int]  # channels, height, width
    crop_pct: float  # model's size / size after the resize
    crop_mode: str  # center, squash or border
    interpolation: str  # bicubic, bilinear …
    mean: tuple[float, ...]  # of images in 0…1, one a channel
    std: tuple[float, ...]

    @classmethod
    def of(cls, data_config: dict[str, Any]) -> "Preprocessing":
        """From `timm.data.resolve_data_config(…)`. Raises `UsageError` where no mode in `MODES` has the channels."""
        channels, height, width = data_config["input_size"]
        if channels not in MODES:
            raise UsageError(
                f"the model takes images of {channels} channels, and images can be given with 1 (grey), 3 (RGB) or "
                "4 (RGBA): choose one of these as --in-chans, or another --model"
            )
        return cls(
            input_size=(channels, height, width),
            crop_pct=float(data_config["crop_pct"]),
            crop_mode=str(data_config["crop_mode"]),
            interpolation=str(data_config["interpolation"]),
            mean=_one_a_channel(data_config["mean"], channels),
            std=_one_a_channel(data_config["std"], channels),
        )


def _one_a_channel(values: Any, channels: int) -> tuple[float, ...]:
    """As timm's loader has it (`adapt_to_chs`): where the numbers differ, each channel gets the values' average."""
    given = np.atleast_1d(np.asarray(values, np.float64))
    return tuple((given if len(given) == channels else np.full(channels, given.mean())).tolist())


class Decoded(NamedTuple):
    """`pixels`: uint8 (C, H, W), contiguous. `width`, `height`: of the upright image before it was resized."""

    pixels: np.ndarray
    width: int
    height: int


class Decoder:
    """Called with one image's bytes; safe to call from many threads, and picklable.

    Raises `Reject` with stage `decode` for a sample that gives no pixels, and nothing else. Which samples those are,
    and why, is the same for every `how`.
    """

    def __init__(self, preprocessing: Preprocessing, *, exif_orientation: bool = True, how: str = "exact"):
        """`exif_orientation`: turn images upright as `PIL.ImageOps.exif_transpose` does; else leave them as stored.

        `how`: `--decode`. `exact`, `fast` or `scaled`, within what `resizing.BOUNDS` says of it; `cuda` decodes here as
        `fast` does, what the device does not take.
        """
        from timm.data import create_transform  # here: it takes seconds, and verbs that only read need none of it

        self.preprocessing, self.exif_orientation, self.how = preprocessing, exif_orientation, how
        self.mode = MODES[preprocessing.input_size[0]]
        # use_prefetcher leaves out ToTensor and Normalize, and nothing else.
        self.transform = create_transform(**asdict(preprocessing), is_training=False, use_prefetcher=True)
        self._resizer = Resizer(preprocessing, self.transform)
        self._is_fast = how != "exact" and self._resizer.is_fast
        Image.init()  # here, because Pillow loads its plugins on first use and threads would race
        self.formats = tuple(name for name in FORMATS if name in Image.OPEN)
        # Pillow's warnings (large images, palette transparency, corrupt EXIF) tell nothing that is not handled here.
        # Silenced for the whole process, because catch_warnings around each call is not thread-safe.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
        logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors go to stderr, by logging's default

    def __reduce__(self) -> tuple[Callable[..., "Decoder"], tuple[Preprocessing]]:
        return partial(Decoder, exif_orientation=self.exif_orientation, how=self.how), (self.preprocessing,)

    def __call__(self, data: bytes) -> Decoded:
        """`data`: an encoded image. Raises `Reject`."""
        if not data:
            raise Reject("empty", "decode", "no bytes")
        try:
            frame, image = read_frame(data), None
            if frame is None or frame.orientation is None:
                image = self._open(data)
                frame = _judged(frame, image)
            return (frame and self._of_jpeg(data, frame)) or self._of_any(data, image or self._open(data))
        except MemoryError as error:
            raise Reject("too_large", "decode", "there was not enough memory to decode it") from error

    def _of_jpeg(self, data: bytes, frame: Frame) -> Decoded | None:
        """None where it is for Pillow to say what this is."""
        size = frame.width, frame.height
        _refuse_large(*size)
        if not frame.is_one_pass:
            _refuse_scans(data)
        turn = UPRIGHT.get(frame.orientation or 1) if self.exif_orientation else None
        upright = size[::-1] if turn in SWAPS else size
        is_direct = self._is_fast and (frame.components == 1) == (self.mode == "L")  # no conversion stands between
        with _room(frame.width * frame.height):
            factor = self._resizer.factor(*upright) if self.how == "scaled" and is_direct else 1
            pixels = decode(data, frame, factor)
            if pixels is None:
                return None
            if is_direct:
                return Decoded(self._resizer.fast(pixels, size, turn), *upright)
            return self._resized(to_mode(_turned(as_image(pixels), turn), self.mode))

    def _of_any(self, data: bytes, image: Image.Image) -> Decoded:
        _refuse_large(*image.size)
        pixels = _unpacked_pixels(image, data)
        with _room(pixels if image.format not in CONTAINERS else MAX_PIXELS):
            return self._resized(self._converted(image, data))

    def _open(self, data: bytes) -> Image.Image:
        """The image with its size known and its pixels not yet decoded."""
        try:
            try:
                return Image.open(io.BytesIO(data), formats=self.formats)
            except Image.UnidentifiedImageError:
                if (name := _first_match(DECODED, data)) in self.formats:
                    Image.OPEN[name][0](io.BytesIO(data), "")  # raises what is wrong, which `open` keeps to itself
                raise
        # A decoder fed by strangers raises nearly anything (a KeyError out of a palette, a RecursionError …), and
        # whatever it is, it is this sample's fault: here and at `load` below, nowhere else.
        except Exception as error:
            raise _why_not(data, error) from error

    def _converted(self, image: Image.Image, data: bytes) -> Image.Image:
        """Decodes, turns and converts: what `exif_transpose(image).convert(mode)` gives, deep images scaled first."""
        stored_orientation = _orientation(image) if image.format == "TIFF" else 1  # Pillow's load turns TIFFs upright
        try:
            image.load()
        except Exception as error:  # as at `open`
            raise _why_not(data, error, image.format) from error
        _refuse_large(*image.size)  # an ICO's PNG may be larger than the ICO said
        turn = UPRIGHT.get(_orientation(image)) if self.exif_orientation else AS_STORED.get(stored_orientation)
        return to_mode(_turned(image, turn), self.mode)

    def _resized(self, image: Image.Image) -> Decoded:
        if self._is_fast:
            return Decoded(self._resizer.fast(as_array(image), image.size), *image.size)
        return Decoded(self._resizer.exact(image), *image.size)


def _turned(image: Image.Image, turn: Turn | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _room(pixels: int) -> contextlib.AbstractContextManager[Any]:
    """Held while so many pixels are decoded."""
    return _one_large_image if pixels > LARGE_PIXELS else contextlib.nullcontext()


def _judged(frame: Frame | None, image: Image.Image) -> Frame | None:
    """The frame of a JPEG that Pillow opened for what only it can read, with the orientation."""
    if frame is None or image.format not in ("JPEG", "MPO") or image.size != (frame.width, frame.height):
        return None
    return frame._replace(orientation=_orientation(image))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image of `mode` (L, RGB or RGBA) as is; 16-bit, integer and float ones scaled to 8 bits; then `convert(mode)`.

    16-bit and integer levels lose their low 8 bits (Pillow would clip them at 255). For L and RGB, alpha is dropped;
    for RGBA it is opaque where the image has none, which a deep image never has. Raises `Reject`.
    """
    if image.mode == "F":
        image = Image.fromarray(float_levels(np.array(image)))
    elif image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    if image.mode == mode:
        if image.im.mode != mode:  # a PNG of two headers, whose palette came with the other one; no resize takes it
            raise Reject("corrupt", "decode", f"the image says mode {mode}, its pixels are {image.im.mode}")
        return image
    try:
        return image.convert(mode)
    except CONVERT_ERRORS as error:
        raise Reject("unsupported", "decode", f"mode {image.mode} cannot be converted to {mode}") from error


def float_levels(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W) from float32 (H, W), which is overwritten. The largest finite value tells the scale.

    Up to 1: of 0…1; up to 255: levels; above: 16-bit levels. Not-a-number and negatives give 0, infinity 255.
    """
    top = np.max(values, initial=0, where=np.isfinite(values))
    scale = 255 if top <= 1 else 1 if top <= 255 else 1 / 256
    np.clip(np.nan_to_num(values, copy=False), 0, 255 / scale, out=values)
    return np.rint(values * scale, out=values).astype(np.uint8)


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Reject("too_large", "decode", f"{width}x{height} pixels: more than {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Reject("too_large", "decode", f"{width}x{height} pixels: over {MAX_ASPECT}:1, its resize would be huge")


def _unpacked_pixels(image: Image.Image, data: bytes) -> int:
    """Pixels that decoding holds at once. Raises `Reject` for those that would take minutes."""
    pixels = image.width * image.height
    width, height = _tile(image)  # libtiff unpacks the whole of one, which may be larger than the image
    if width * height > MAX_PIXELS:
        raise Reject("too_large", "decode", f"tiles of {width}x{height} pixels: more than {MAX_PIXELS}")
    pixels = max(pixels, width * height)
    if pixels > LARGE_PIXELS and any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        what = f"{image.width}x{image.height} pixels of {image.format}"  # Pillow's own in Python: 0.2 to 1.5 us a pixel
        raise Reject("too_large", "decode", f"{what}: more than {LARGE_PIXELS}, which would take minutes")
    if image.format in ("JPEG", "MPO"):
        _refuse_scans(data)
    return pixels


def _refuse_scans(jpeg: bytes) -> None:
    if jpeg.count(SCAN) > MAX_SCANS and (scans := _scans(jpeg)) > MAX_SCANS:
        raise Reject("too_large", "decode", f"a JPEG of {scans} scans: more than {MAX_SCANS}")


def _tile(image: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tiles; zeros where there are none."""
    tags: Any = getattr(image, "tag_v2", {})
    try:
        return int(tags.get(TiffImagePlugin.TILEWIDTH, 0)), int(tags.get(TiffImagePlugin.TILELENGTH, 0))
    except EXIF_ERRORS:
        return 0, 0


def _scans(data: bytes) -> int:
    """How often a JPEG's own pixels are gone over, up to its end mark: what follows or is embedded does not count."""
    at, scans = 2, 0
    while (marker := MARKER.search(data, at)) and marker[1] != b"\xd9":
        scans += marker[1] == SCAN[1:]
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _orientation(image: Image.Image) -> Any:
    """EXIF's (or XMP's) orientation, 1 to 8; 1 where the block is damaged: that must not cost the sample."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except EXIF_ERRORS:
        return 1


def _why_not(data: bytes, error: Exception, name: str | None = None) -> Reject:
    """Names what Pillow could not open, or as format `name` not decode."""
    text = re.sub(r"[^!-~]+", " ", str(error) or type(error).__name__)
    text = re.sub(r"<[^>]* at 0x\w+>", "the bytes", text)  # no addresses
    name = name or _first_match(DECODED, data)
    reason: Reason = "corrupt"
    if isinstance(error, MemoryError | Image.DecompressionBombError) or re.search(r"(?i)too large|memory", text):
        reason = "too_large"  # a PNG's text chunks that unpack to more than Pillow allows say so in a ValueError
    elif name is None and (other := _first_match(UNDECODED, data)):
        reason, text = "unsupported", f"{other}, which Pillow does not decode"
    elif name is None:
        text = (_first_match(OTHER, data) or f"bytes that begin with {data[:8].hex(' ')}") + ", not an image"
    elif re.search(r"(?i)truncat|unexpected end|not enough|premature|requires a buffer", text) or _is_cut(data, name):
        reason = "truncated"
    elif re.search(r"(?i)cannot handle|support", text):
        reason = "unsupported"
    return Reject(reason, "decode", (f"{name}: {text}" if name else text)[:200])


def _is_cut(data: bytes, name: str) -> bool:
    """Whether the format's end marker is missing, or its header tells of more bytes than there are."""
    if name in ("JPEG", "MPO"):
        at = 2  # over the segments up to the scan (0xDA): an EXIF block's thumbnail has an end marker of its own
        while at + 4 <= len(data) and data[at] == 0xFF and 0xC0 <= data[at + 1] != 0xDA:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        return b"\xff\xd9" not in data[at:]
    if name == "TIFF":
        return int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") >= len(data)
    return {
        "PNG": b"IEND" not in data,
        "GIF": not data.rstrip(b"\0").endswith(b";"),
        "WEBP": int.from_bytes(data[4:8], "little") + 8 > len(data),
        "JPEG2000": b"\xff\xd9" not in data[-16:],
        "BMP": int.from_bytes(data[2:6], "little") > len(data),
    }.get(name, False)


def _first_match(table: dict[str, bytes], data: bytes) -> str | None:
    head = data[:1024]
    return next((name for name, begins in table.items() if re.match(begins, head, re.DOTALL)), None)
