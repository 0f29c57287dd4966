"""`jobs.pictures`: the same bytes for the same seed, and every broken sample broken as its name says."""

import inspect
import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from jobs.pictures import BROKEN, CAPTIONS, LOOKS, PNG_EVERY, STORED, contact_sheet, photo, write_shards

IMAGES, SHARDS = 40, 3
Sample = tuple[str, dict[str, bytes]]  # key, and bytes by the ending of the member's name
Written = tuple[dict[str, object], list[list[Sample]], Path]  # the result, the samples of each shard, the folder


def samples(shard: Path) -> list[Sample]:
    """Neighbouring members of one key make a sample, as WebDataset has it."""
    with tarfile.open(shard) as tar:
        members = [(header.name, tar.extractfile(header).read()) for header in tar]  # type: ignore[union-attr]
    return [
        (key, {name.partition(".")[2]: data for name, data in group})
        for key, group in itertools.groupby(members, key=lambda member: member[0].partition(".")[0])
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("shards")
    result = write_shards(folder, images=IMAGES, shards=SHARDS, seed=5)
    return result, [samples(shard) for shard in sorted(folder.iterdir())], folder


@pytest.fixture(scope="module")
def good(written: Written) -> dict[int, Sample]:
    """The readable samples by number."""
    found = [sample for shard in written[1] for sample in shard if int(sample[0][-4:]) < IMAGES]
    return {int(key[-4:]): (key, members) for key, members in reversed(found)}  # the first of a duplicated key counts


@pytest.fixture(scope="module")
def broken(written: Written) -> dict[str, dict[str, bytes]]:
    """The members of each broken sample by kind; their numbers go on where those of the good ones end."""
    numbered = {int(key[-4:]): members for shard in written[1] for key, members in shard}
    return {kind: numbered[IMAGES + place] for place, kind in enumerate(BROKEN) if kind != "duplicate_key"}


@pytest.mark.parametrize("look", LOOKS)
def test_a_photo_depends_on_its_seed_and_nothing_else(look: str) -> None:
    first, again, other = (np.asarray(photo(look, seed, 96, 72), np.int16) for seed in (3, 3, 4))
    assert first.shape == (72, 96, 3)
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 3  # levels: another picture, not only other grain
    assert first.std() > 15


@pytest.mark.parametrize(("width", "height"), [(8, 8), (17, 61), (200, 20), (288, 288)])
def test_a_photo_has_the_size_asked_for(width: int, height: int) -> None:
    for look in LOOKS:
        picture = photo(look, 0, width, height)
        assert (picture.size, picture.mode) == ((width, height), "RGB")


def test_looks_are_told_apart_by_their_pixels_alone() -> None:
    """A nearest-neighbour search over 8 × 8 thumbnails finds the same look for eight of ten."""
    seeds = 6
    pictures = [photo(look, seed, 64, 48).resize((8, 8)) for look in LOOKS for seed in range(seeds)]
    vectors = np.stack([np.asarray(picture, np.float32).ravel() for picture in pictures])
    distances = np.square(vectors[:, None] - vectors[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    labels = np.repeat(np.arange(len(LOOKS)), seeds)
    assert (labels[distances.argmin(1)] == labels).mean() >= 0.8


def test_an_unknown_look_is_refused() -> None:
    with pytest.raises(ValueError, match="swamp"):
        photo("swamp", 0, 8, 8)


def test_shards_are_the_same_bytes_for_the_same_seed(written: Written, tmp_path: Path) -> None:
    for name, seed in (("same", 5), ("other", 6)):
        write_shards(tmp_path / name, images=IMAGES, shards=SHARDS, seed=seed)
    for path in sorted(written[2].iterdir()):
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_every_good_sample_has_image_class_and_caption(written: Written, good: dict[int, Sample]) -> None:
    assert written[0] == {"images": IMAGES, "broken": dict.fromkeys(BROKEN, 1)}
    assert [path.name for path in sorted(written[2].iterdir())] == [f"photos-{n:05d}.tar" for n in range(SHARDS)]
    assert sum(len(shard) for shard in written[1]) == IMAGES + len(BROKEN)
    assert sorted(good) == list(range(IMAGES))
    for key, members in good.values():
        look = key.partition("_")[0]
        assert members["txt"].decode() == CAPTIONS[look]
        with Image.open(io.BytesIO(members.get("jpg") or members["png"])) as image:
            image.load()


def test_looks_are_spread_evenly(good: dict[int, Sample]) -> None:
    counts = Counter(key.partition("_")[0] for key, _ in good.values())
    assert counts == dict.fromkeys(LOOKS, IMAGES // len(LOOKS))


def test_images_are_stored_in_many_ways(good: dict[int, Sample]) -> None:
    for number, stored in STORED.items():
        members = good[number][1]
        with Image.open(io.BytesIO(members.get("jpg") or members["png"])) as image:
            if stored == "rotated":
                assert image.getexif()[0x0112] == 6
            else:
                assert image.mode == {"cmyk": "CMYK", "16bit": "I;16"}[stored]
            assert stored != "16bit" or np.asarray(image).max() > 255
    png = [number for number, (_, members) in sorted(good.items()) if "png" in members]
    assert png == [3, PNG_EVERY - 1, 2 * PNG_EVERY - 1]


def test_the_truncated_one_begins_well_and_cannot_be_read(broken: dict[str, dict[str, bytes]]) -> None:
    data = broken["truncated"]["jpg"]
    assert data.startswith(b"\xff\xd8")
    with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="truncated"):
        image.load()


def test_the_html_one_is_a_web_page(broken: dict[str, dict[str, bytes]]) -> None:
    assert broken["html"]["jpg"].startswith(b"<!DOCTYPE html>")
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(broken["html"]["jpg"]))


def test_the_empty_one_has_no_bytes(broken: dict[str, dict[str, bytes]]) -> None:
    assert broken["empty"]["jpg"] == b""


def test_the_one_without_an_image_has_class_and_caption_only(broken: dict[str, dict[str, bytes]]) -> None:
    assert sorted(broken["missing_image"]) == ["txt"]


def test_the_aspect_bomb_is_small_and_a_thousand_times_as_wide_as_high(broken: dict[str, dict[str, bytes]]) -> None:
    data = broken["aspect_bomb"]["jpg"]
    assert len(data) < 8000
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (8000, 8)


def test_one_key_is_there_twice_with_another_image(written: Written) -> None:
    """The second stands apart from the first: two samples with one key, not one with members twice."""
    twice = [(shard, key) for shard in written[1] for key, n in Counter(k for k, _ in shard).items() if n > 1]
    assert len(twice) == 1
    shard, key = twice[0]
    first, second = (members for found, members in shard if found == key)
    assert (first.get("jpg") or first["png"]) != (second.get("jpg") or second["png"])


def test_more_images_bring_more_broken_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share stays the same, each duplicate takes another key, and no two of one key stand side by side."""
    monkeypatch.setattr("jobs.pictures.BROKEN_RATE", 0.3)
    result = write_shards(tmp_path, images=IMAGES, shards=1)
    assert result == {"images": IMAGES, "broken": dict.fromkeys(BROKEN, 2)}
    counts = Counter(key for key, _ in samples(tmp_path / "photos-00000.tar"))
    assert sorted(counts.values()) == [1] * (IMAGES + 2 * len(BROKEN) - 4) + [2, 2]


def test_two_in_a_hundred_of_the_demos_own_size_are_broken() -> None:
    images = inspect.signature(write_shards).parameters["images"].default
    assert len(BROKEN) / (images + len(BROKEN)) == pytest.approx(0.02, abs=0.003)


def test_every_shard_needs_an_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images = 2, shards = 3"):
        write_shards(tmp_path, images=2, shards=3)
    assert not list(tmp_path.iterdir())


def test_the_sheet_shows_each_image_with_its_caption(tmp_path: Path) -> None:
    """The query is framed, each tile has the colour of its image and dark letters under it."""
    colours = [(200, 30, 30), (30, 160, 60), (40, 70, 200)]
    row = [(Image.new("RGB", (90, 60), colour), f"similarity 0.{colour[0]}") for colour in colours]
    contact_sheet([row, row[:2]], tmp_path / "sheet.png", title="Nearest neighbours")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.width, sheet.format, sheet.mode) == (1400, "PNG", "RGB")
        pixels = np.asarray(sheet).astype(int)
    areas = [(np.abs(pixels - colour).sum(-1) < 12).sum() for colour in colours]
    assert areas[0] == pytest.approx(areas[1], rel=0.02) == 2 * areas[2]
    assert areas[2] > 50_000  # pixels of one tile
    frame = np.abs(pixels - (214, 84, 46)).sum(-1) < 12
    assert frame[:, :60].sum() > 1000 > frame[:, 700:].sum()
    bottom = np.flatnonzero((np.abs(pixels - colours[2]).sum(-1) < 12).any(1)).max()
    dark = pixels[bottom + 4 : bottom + 40].max(-1) < 90
    assert all(dark[:, part].sum() > 100 for part in np.array_split(np.arange(48, 1340), 3))


def test_a_long_caption_stays_under_its_own_tile(tmp_path: Path) -> None:
    picture = Image.new("RGB", (80, 60), (120, 120, 120))
    for name, caption in (("long", "W" * 300), ("none", "")):
        contact_sheet([[(picture, caption)] + [(picture, "")] * 5], tmp_path / f"{name}.png", title="")
    long, none = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("long", "none"))
    changed = np.flatnonzero((long != none).any((0, 2)))
    tile = np.flatnonzero((none == 120).all(2).any(0))
    first_tile_ends = tile[np.flatnonzero(np.diff(tile) > 1)[0]]
    assert changed.max() <= first_tile_ends + 2
    assert changed.max() > first_tile_ends - 40


def test_a_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 rows"):
        contact_sheet([], tmp_path / "sheet.png", title="nothing")
