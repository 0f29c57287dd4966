"""Demo pictures: photo-like images of eight looks, WebDataset shards of them, and a contact sheet of results.

A look, a seed and a size give the same picture every time. The shards also hold what real ones hold: images stored
rotated, in CMYK or with 16 bits, and a few broken samples.
"""

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from jobs.scenery import PAINTERS, grid, to_field, to_picture

LOOKS = tuple(PAINTERS)
CAPTIONS = {
    "sunset": "the sun sets over the sea",
    "forest": "light falls through a forest",
    "city": "a city at night",
    "desert": "sand dunes in the desert",
    "mountains": "snow on the mountains",
    "flowers": "flowers in a meadow",
    "planet": "a planet among the stars",
    "window": "a window in a brick wall",
}

BROKEN = ("truncated", "html", "empty", "missing_image", "duplicate_key", "aspect_bomb")
BROKEN_RATE = 0.02  # of all samples: enough to show rejects in a demo, few enough to stay the exception
STORED = {1: "rotated", 2: "cmyk", 3: "16bit", 5: "rotated"}  # place in the data set: how that image is stored
PNG_EVERY = 17  # images; shares no factor with the usual shard counts, so that every shard gets some
JPEG_QUALITY = 88
EXIF_ORIENTATION, EXIF_TURN_RIGHT = 0x0112, 6  # stored a quarter turn to the left, to be shown turned back
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"

SIZES = [(320, 240), (400, 300), (360, 240), (240, 320), (288, 288)]  # width, height
Sample = list[tuple[str, bytes]]  # its members: names and bytes, in the order of the tar, the image first

SHEET_WIDTH, MARGIN, GAP, CAPTION_HEIGHT = 1400, 48, 18, 40  # pixels
SHEET_COLUMNS = 7
PAPER, INK, SOFT, ACCENT = (247, 246, 242), (34, 38, 46), (110, 116, 126), (214, 84, 46)


def photo(look: str, seed: int, width: int, height: int) -> Image.Image:
    """An RGB picture of `look`, one of `LOOKS`; the seed sets colours, horizon, counts and sizes."""
    if look not in PAINTERS:
        raise ValueError(f"look {look!r} is none of {', '.join(LOOKS)}")
    rng = np.random.default_rng([LOOKS.index(look), seed])
    field = PAINTERS[look](rng, height, width)
    y, x = grid(height, width)
    vignette = 1 - 0.44 * ((y - 0.5) ** 2 + (x / x.max() - 0.5) ** 2)
    for band in range(3):
        field[..., band] *= vignette * rng.uniform(0.93, 1.05)  # the lens darkens corners; the white balance
    blurred = to_picture(field).filter(ImageFilter.BoxBlur(height / 500))
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(0.008, 0.022)
    return to_picture(to_field(blurred) + grain)


def write_shards(folder: Path, *, images: int = 320, shards: int = 4, seed: int = 0) -> dict[str, object]:
    """Writes `photos-00000.tar` … into `folder`, the same bytes for the same seed.

    Each sample is `<look>_<number>` with `.jpg` or `.png`, and `.txt` (a caption).
    Broken samples come on top of `images`, about 2 in 100 and one of each kind at least.
    Returns `{"images": readable ones, "broken": {kind: count}}`.
    """
    if images < shards or shards < 1:
        raise ValueError(f"images = {images}, shards = {shards}: every shard needs an image")
    rng = np.random.default_rng(seed)
    looks = [LOOKS[place % len(LOOKS)] for place in rng.permutation(images)]  # as many of each, mixed
    samples = [_sample(look, number, rng) for number, look in enumerate(looks)]
    contents = [samples[shard::shards] for shard in range(shards)]
    broken = [kind for kind in BROKEN for _ in range(max(1, round(images * BROKEN_RATE / len(BROKEN))))]
    for place, kind in enumerate(broken):
        shard, twin = contents[place % shards], samples[place if place < images else place % shards]  # of that shard
        sample = _sample(LOOKS[rng.integers(len(LOOKS))], images + place, rng)
        at = len(shard) if kind == "duplicate_key" else int(rng.integers(1, len(shard) + 1))
        shard.insert(at, _broken_sample(kind, sample, twin))
    folder.mkdir(parents=True, exist_ok=True)
    for shard_number, shard in enumerate(contents):
        with tarfile.open(folder / f"photos-{shard_number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in itertools.chain.from_iterable(shard):
                header = tarfile.TarInfo(name)  # owner 0 and mtime 0: the same bytes every time
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return {"images": images, "broken": {kind: broken.count(kind) for kind in BROKEN}}


def _sample(look: str, number: int, rng: np.random.Generator) -> Sample:
    image = photo(look, int(rng.integers(2**31)), *SIZES[rng.integers(len(SIZES))])
    name, data = _encode(image, STORED.get(number, "png" if number % PNG_EVERY == PNG_EVERY - 1 else "jpg"))
    key = f"{look}_{number:04d}"
    return [(f"{key}.{name}", data), (f"{key}.txt", CAPTIONS[look].encode())]


def _encode(image: Image.Image, stored: str) -> tuple[str, bytes]:
    """Returns the file name's ending and the bytes; `stored` is `jpg`, `png`, `rotated`, `cmyk` or `16bit`."""
    ending, exif = "png" if stored in ("png", "16bit") else "jpg", Image.Exif()
    if stored == "rotated":
        exif[EXIF_ORIENTATION] = EXIF_TURN_RIGHT
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif stored == "cmyk":
        image = image.convert("CMYK")
    elif stored == "16bit":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)  # 255 becomes 65535
    buffer = io.BytesIO()
    if ending == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, exif=exif)
    return ending, buffer.getvalue()


def _broken_sample(kind: str, sample: Sample, twin: Sample) -> Sample:
    """`sample` broken in the way of `kind`; `twin` is the one whose key a `duplicate_key` takes."""
    (name, data), *others = sample
    key = name.partition(".")[0]
    if kind == "missing_image":
        return others
    if kind == "duplicate_key":
        taken = twin[0][0].partition(".")[0]
        return [(taken + member.removeprefix(key), content) for member, content in sample]
    if kind == "truncated":
        jpeg = _encode(Image.open(io.BytesIO(data)).convert("RGB"), "jpg")[1]
        data = jpeg[: len(jpeg) * 6 // 10]
    elif kind == "aspect_bomb":
        data = _encode(Image.new("RGB", (8000, 8), PAPER), "jpg")[1]
    else:
        data = {"html": HTML, "empty": b""}[kind]
    return [(f"{key}.jpg", data), *others]


def contact_sheet(
    rows: list[list[tuple[Image.Image, str]]],
    path: Path,
    *,
    title: str,
    heads: tuple[str, str] = ("query", "nearest neighbours, best first"),
) -> None:
    """Writes a PNG, 1400 pixels wide: a row for each query, framed at the left, its neighbours beside it.

    `rows`: the query and its caption first, then the neighbours with theirs (`similarity 0.87`); captions that are
    too long end in an ellipsis. Neighbours beyond six go on below. `heads`: over the first column, and the others.
    """
    if not rows or not all(rows):
        raise ValueError(f"{len(rows)} rows, {sum(not row for row in rows)} of them empty: nothing to show")
    columns = min(SHEET_COLUMNS, max(len(row) for row in rows))
    beside = max(1, columns - 1)
    tile_w = (SHEET_WIDTH - 2 * MARGIN - GAP * (columns + 1)) // max(columns, 3)  # one more gap after the query
    tile_h = tile_w * 3 // 4
    row_h = tile_h + CAPTION_HEIGHT + GAP
    lines = [max(1, -(-(len(row) - 1) // beside)) for row in rows]
    top = MARGIN + 96
    sheet = Image.new("RGB", (SHEET_WIDTH, top + row_h * sum(lines) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), _shorten(title, 34, SHEET_WIDTH - 2 * MARGIN), INK, ImageFont.load_default(34))
    first_neighbour = MARGIN + tile_w + 3 * GAP
    draw.text((MARGIN, top - 36), _shorten(heads[0], 18, tile_w), ACCENT, ImageFont.load_default(18))
    draw.text((first_neighbour, top - 36), heads[1], SOFT, ImageFont.load_default(18))
    for number, row in enumerate(rows):
        for place, (image, caption) in enumerate(row):
            line, column = divmod(max(0, place - 1), beside)
            y = top + (sum(lines[:number]) + line) * row_h
            x = MARGIN if place == 0 else first_neighbour + column * (tile_w + GAP)
            if place == 0:
                draw.rounded_rectangle((x - 7, y - 7, x + tile_w + 6, y + tile_h + 6), 14, outline=ACCENT, width=4)
            tile = ImageOps.fit(image.convert("RGB"), (tile_w, tile_h), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, y), _rounded(tile_w, tile_h))
            draw.text((x + 2, y + tile_h + 10), _shorten(caption, 17, tile_w), INK, ImageFont.load_default(17))
    sheet.save(path, "PNG")


def placeholder(text: str) -> Image.Image:
    """A grey tile that says why there is no image."""
    tile = Image.new("RGB", (320, 240), (226, 224, 218))
    ImageDraw.Draw(tile).text((160, 120), text, SOFT, ImageFont.load_default(22), anchor="mm", align="center")
    return tile


def _shorten(text: str, size: int, width: int) -> str:
    """`text`, cut to `width` pixels."""
    font = ImageFont.load_default(size)
    if font.getlength(text) <= width:
        return text
    return next(
        (cut for end in range(len(text), 0, -1) if font.getlength(cut := text[:end].rstrip() + "…") <= width), "…"
    )


def _rounded(width: int, height: int) -> Image.Image:
    """A mask with round corners, smooth because it was drawn four times as large."""
    mask = Image.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 32, fill=255)
    return mask.reduce(4)
