"""What `--decode fast` and `scaled` may differ by from `exact`: levels of pixels, cosines of embeddings."""

import os
import threading
from functools import cache

import numpy as np
import oracle
import pictures
import pytest
import timm
import torch
from pictures import decoder

from pipeline.images import MODES, Decoder, Preprocessing
from pipeline.resizing import BOUNDS

# Of each family the smallest; `benchmarks/decoding.py` has them all.
FAMILIES = [name for name in oracle.SEEDS if name.startswith(("pit_ti", "vit", "convit", "beit"))]
BESIDE = ("exact", "fast", "scaled")


@cache
def photos() -> list[bytes]:
    """Small ones, and ones that `scaled` has shrunk by the decoder: also progressive, and turned."""
    return [
        pictures.jpeg(500, 375, 1),
        pictures.jpeg(333, 500, 2, quality=95),
        pictures.jpeg(1300, 1100, 3, quality=90, subsampling=0),
        pictures.jpeg(1250, 1100, 4, progressive=True),
        pictures.jpeg(1100, 1350, 5, exif=pictures.oriented(8)),
    ]


@cache
def grey() -> bytes:
    """Of a size that `scaled` has shrunk by the decoder, for a model of grey images."""
    return pictures.jpeg(1300, 1100, 6, mode="L")


def off(how: str, data: bytes, model: str = "pit_s_224", channels: int = 3, upright: bool = True) -> np.ndarray:
    """Levels by which each pixel differs from `exact`; sizes are the same."""
    got = decoder(model, channels, how=how, exif_orientation=upright)(data)
    want = decoder(model, channels, exif_orientation=upright)(data)
    assert got[1:] == want[1:] and got.pixels.shape == want.pixels.shape
    assert got.pixels.dtype == np.uint8 and got.pixels.flags.c_contiguous
    return np.abs(got.pixels.astype(np.int16) - want.pixels)


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("how", ["fast", "scaled"])
def test_every_decodable_oddity_is_within_two_levels(how: str, channels: int) -> None:
    """All formats, modes and turns; so small that the decoder shrinks none of them."""
    for name, data in pictures.sound().items():
        if (name, channels) != ("tiff_lab", 1):  # a reject, and the same one: see test_images_damaged.py
            assert off(how, data, channels=channels).max() <= BOUNDS["fast"].levels, name


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos(orientation: int, upright: bool) -> None:
    """The pixels are turned after the resize, and end where `exact` has them; of either shape, in every crop mode."""
    for model in ("pit_s_224", "coat_lite_medium_384.in1k", "deepseek_vit_412m.deepseek_v4_flash_vision_exp"):
        for size in ((150, 61), (61, 150)):
            data = pictures.jpeg(*size, exif=pictures.oriented(orientation))
            assert off("fast", data, model, upright=upright).max() <= BOUNDS["fast"].levels


@pytest.mark.parametrize("how", ["fast", "scaled"])
def test_photos_are_within_the_published_levels(how: str) -> None:
    """Largest and mean difference; where `scaled` shrinks, it does differ, in the right place."""
    for number, data in enumerate(photos()):
        levels = off(how, data)
        assert levels.max() <= BOUNDS[how].levels and levels.mean() <= BOUNDS[how].mean_levels
        if number < 2:
            assert np.array_equal(decoder(how="scaled")(data).pixels, decoder(how="fast")(data).pixels)
        else:
            assert (levels.mean() > 0.1) == (how == "scaled")


@pytest.mark.parametrize("how", ["fast", "scaled"])
def test_large_photos_of_other_colours_than_the_models_keep_their_size(how: str) -> None:
    """A grey one for RGB and RGBA, a coloured one for grey: converted at their full size, which is what is told."""
    for data, channels in ((grey(), 3), (grey(), 4), (photos()[2], 1), (photos()[4], 1)):
        assert off(how, data, channels=channels).max() <= BOUNDS["fast"].levels
    levels = off(how, grey(), channels=1)
    assert levels.max() <= BOUNDS[how].levels and (levels.mean() > 0.1) == (how == "scaled")


def test_shrunk_images_stay_in_place() -> None:
    """Sides that no factor divides, of steep slopes: half a pixel aside would be seen."""
    y, x = np.mgrid[0:1097, 0:1253]
    ramp = np.dstack([x * 255 / 1252, y * 255 / 1096, (x + y) % 200]).astype(np.uint8)
    for orientation in (1, 6):
        data = pictures.encoded(pictures.Image.fromarray(ramp), "JPEG", quality=95, exif=pictures.oriented(orientation))
        assert off("scaled", data)[:2].mean() < 0.3


@pytest.mark.by_model
@pytest.mark.parametrize("model", FAMILIES)
def test_embeddings_hardly_change(model: str) -> None:
    """The cosine with the embedding of `exact`'s pixels, in fp32, is not below what is published."""
    net = oracle.shared(model)
    config = timm.data.resolve_data_config({}, model=net)
    preprocessing = Preprocessing.of(config)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = [photos()[0], photos()[4]]
    found = {}
    for how in BESIDE:
        decode = Decoder(preprocessing, how=how)
        pixels = torch.from_numpy(np.stack([decode(image).pixels for image in images]))
        with torch.inference_mode():
            body = net.forward_features(pixels.float().div(255).sub(mean).div(std))
            found[how] = net.forward_head(body, pre_logits=True).double()
    for how in ("fast", "scaled"):
        assert not torch.equal(found[how], found["exact"])
        assert torch.cosine_similarity(found[how], found["exact"]).min() >= BOUNDS[how].cosine


def test_a_decoding_thread_starts_no_others() -> None:
    """Whatever number of threads the forward pass has: sixteen decoders with eight each would wait for each other."""
    before, tasks = torch.get_num_threads(), []

    def decode() -> None:
        decoders = [decoder(model, c, how="fast") for model in ("pit_s_224", "cspdarknet53.ra_in1k") for c in (1, 3)]
        tasks.append(len(os.listdir("/proc/self/task")))
        for data in (*photos(), pictures.png(500, 375), pictures.png(500, 375, mode="L")):
            for one in decoders:
                one(data)
        tasks.append(len(os.listdir("/proc/self/task")))
        torch.ones(1000, 1000).add(1)  # this does start them, so the test can tell
        tasks.append(len(os.listdir("/proc/self/task")))

    torch.set_num_threads(8)
    try:
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert tasks[0] == tasks[1] < tasks[2]
