"""The images behind ids, small: read again from the input's shards, where these are still what was embedded."""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

from PIL import Image, ImageOps

from pipeline.errors import Reject, StorageError
from pipeline.fetching import fetch
from pipeline.flow import ordered
from pipeline.images import CONVERT_ERRORS, FORMATS, MAX_PIXELS, to_mode
from pipeline.listing import Shard
from pipeline.shards import Sample, read_samples

SIZE = 480  # pixels of the longer side: enough for a sheet's tile on a dense screen
SHARDS_AT_ONCE = 4


def thumbnails(
    shards: Sequence[Shard], wanted: Iterable[tuple[str, str]], etags: Mapping[str, str], *, size: int = SIZE
) -> dict[str, Image.Image]:
    """Id → upright RGB image of at most `size` pixels a side; without those that cannot be had.

    `wanted`: (shard, id). `etags`: of the shards as they were embedded; another one's images are not shown. A shard is
    read up to the last of its images. Raises `StorageError` or `OSError` where the store fails.
    """
    by_shard = dict[str, set[str]]()
    for name, image_id in wanted:
        by_shard.setdefault(name, set()).add(image_id)
    there = [s for s in shards if s.name in by_shard and etags.get(s.name) == s.etag]
    found = dict[str, Image.Image]()
    for some in ordered(lambda shard: _of_shard(shard, by_shard[shard.name], size), there, SHARDS_AT_ONCE):
        found.update(some)
    return found


def _of_shard(shard: Shard, ids: Collection[str], size: int) -> dict[str, Image.Image]:
    found, left = dict[str, Image.Image](), set(ids)
    for sample in read_samples(shard):
        image_id = f"{shard.name}/{sample.id_key}"
        if image_id in left:
            left.discard(image_id)
            image = _small(sample, size)
            if image is not None:
                found[image_id] = image
        if not left:
            break
    return found


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _small(sample: Sample, size: int) -> Image.Image | None:
    try:
        content = fetch(sample) if sample.url is not None else sample.image
        opened = Image.open(io.BytesIO(content), formats=_formats())
        if opened.width * opened.height > MAX_PIXELS:
            return None
        opened.draft("RGB", (size, size))
        image = to_mode(ImageOps.exif_transpose(opened), "RGB")
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        return image
    except (Reject, StorageError, Image.DecompressionBombError, *CONVERT_ERRORS):
        return None
