"""`pipeline.images`: timm and Pillow are the oracle for all that can be decoded."""

import io
import json
import multiprocessing
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict
from functools import cache
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from pictures import data_config, decoder
from PIL import ExifTags, Image, ImageOps
from timm.data import create_transform
from timm.data.loader import adapt_to_chs

from pipeline.errors import Reject, UsageError
from pipeline.images import MODES, Decoded, Decoder, Preprocessing, float_levels, to_mode

SEEDS = [f"pit_{size}{kind}_224" for size in ("ti", "xs", "s", "b") for kind in ("", "_distilled")] + [
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
]
OTHERS = {
    "coat_lite_medium_384.in1k": "squash",
    "deepseek_vit_412m.deepseek_v4_flash_vision_exp": "border",
    "vit_base_patch16_sapiens2.fb": "squash",  # 1024x768, bilinear
    "cspdarknet53.ra_in1k": "center",  # bilinear
}
WITH_CHANNELS = [(model, 3) for model in [*SEEDS, *OTHERS]] + [(m, c) for m in ["pit_s_224", *OTHERS] for c in (1, 4)]
SIZES = [(500, 375), (375, 500), (224, 224), (600, 80), (33, 47), (1, 1), (12, 240)]


@cache
def photos() -> list[bytes]:
    return [pictures.jpeg(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


def adapted(config: dict[str, Any]) -> dict[str, Any]:
    """With a mean and a deviation for each channel, as timm's own loader makes them."""
    return config | {key: adapt_to_chs(config[key], config["input_size"][0]) for key in ("mean", "std")}


def normalised(pixels: np.ndarray, config: dict[str, Any]) -> torch.Tensor:
    """The model's input, as the forward pass makes it from the pixels."""
    mean, std = (torch.tensor(adapted(config)[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return torch.from_numpy(pixels).float().div(255).sub(mean).div(std)


def oracle(image: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    tensor = create_transform(**adapted(config))(image)
    assert isinstance(tensor, torch.Tensor)
    return tensor


# Bit-equality with timm


@pytest.mark.parametrize(("model", "channels"), WITH_CHANNELS)
def test_pixels_normalised_are_bit_equal_to_timms_own_transform(model: str, channels: int) -> None:
    """For every seed model, and every crop mode with every number of channels, at every size and shape."""
    config = data_config(model, channels)
    assert config["crop_mode"] == OTHERS.get(model, "center")
    decode = Decoder(Preprocessing.of(config))
    for (width, height), data in zip(SIZES, photos(), strict=True):
        got = decode(data)
        assert got.pixels.dtype == np.uint8
        assert got.pixels.shape == config["input_size"]
        assert got.pixels.flags.c_contiguous
        assert (got.width, got.height) == (width, height)
        expected = oracle(Image.open(io.BytesIO(data)).convert(MODES[channels]), config)
        assert torch.equal(normalised(got.pixels, config), expected)


def test_eight_threads_give_the_same_bits() -> None:
    """One decoder, called from eight threads at once."""
    decode = decoder()
    data = [pictures.jpeg(200 + seed, 150, seed) for seed in range(16)] + list(pictures.sound().values())
    expected = [decode(one).pixels for one in data]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            got = list(threads.map(decode, data))
            assert all(np.array_equal(a.pixels, b) for a, b in zip(got, expected, strict=True))


def test_threads_that_race_for_the_first_decode_all_succeed() -> None:
    """The plugins are there once a decoder is: eight threads start together."""
    decode, ready, sizes = decoder(), threading.Barrier(8), []

    def first() -> None:
        ready.wait(timeout=30)
        sizes.append(decode(pictures.sound()["webp"])[1:])

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(60, 40)] * 8


def test_a_spawned_process_gives_the_same_bits() -> None:
    """A decoder that travelled to another process still decodes, silences and rejects."""
    decode = decoder(exif_orientation=False)
    data = [pictures.sound()[name] for name in ("jpeg_turned", "png_palette_transparency", "webp", "tiff_turned")]
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        got = processes.map(decode, data)
    assert all(isinstance(one, Decoded) for one in got)
    assert all(np.array_equal(one.pixels, decode(same).pixels) for one, same in zip(got, data, strict=True))


def test_a_pickled_decoder_keeps_its_settings() -> None:
    """Preprocessing, mode and orientation survive."""
    decode = decoder("coat_lite_medium_384.in1k", 1, exif_orientation=False, how="scaled")
    again = pickle.loads(pickle.dumps(decode))
    assert (again.preprocessing, again.mode) == (decode.preprocessing, "L")
    assert (again.exif_orientation, again.how) == (False, "scaled")


# Preprocessing


def test_preprocessing_is_hashable_frozen_and_survives_json() -> None:
    """What goes into a set's JSON comes back equal."""
    made = Preprocessing.of(data_config("pit_b_224"))
    assert made == Preprocessing(
        input_size=(3, 224, 224),
        crop_pct=0.9,
        crop_mode="center",
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    assert Preprocessing.of(json.loads(json.dumps(asdict(made)))) == made
    assert len({made, Preprocessing.of(data_config("pit_s_224"))}) == 1
    with pytest.raises(FrozenInstanceError):
        made.crop_pct = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("channels", [0, 2, 5, 12])
def test_a_model_of_channels_that_no_image_has_is_refused(channels: int) -> None:
    """The message says how many it takes, and how many can be given."""
    with pytest.raises(UsageError, match=rf" {channels} channels, .*1 \(grey\), 3 \(RGB\) or 4 \(RGBA\)"):
        Preprocessing.of(data_config("pit_b_224", channels))


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("values", [0.5, [0.449], [0.1, 0.7], (0.485, 0.456, 0.406), [0.1, 0.2, 0.4, 0.8], [0, 0, 1]])
def test_mean_and_std_have_an_entry_for_each_channel(values: Any, channels: int) -> None:
    """As timm's loader has them: as they are where the numbers match, else their average for every channel."""
    given = data_config("pit_s_224", channels) | {"mean": values, "std": values}
    made = Preprocessing.of(given)
    assert (made.mean, made.std) == (expected := tuple(adapt_to_chs(values, channels)), expected)
    assert len(made.mean) == channels
    assert {type(value) for value in made.mean} == {float}
    assert Preprocessing.of(json.loads(json.dumps(asdict(made)))) == made


# Odd but decodable


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("name", sorted(pictures.sound()))
def test_every_decodable_oddity_equals_pillows_upright_conversion(name: str, channels: int) -> None:
    """Alpha, palettes, CMYK, LAB, 1 bit, animations (frame 0): as `exif_transpose(…).convert(mode)` gives them."""
    data = pictures.sound()[name]
    if (name, channels) == ("tiff_lab", 1):
        with pytest.raises(Reject, match="mode LAB cannot be converted to L"):
            decoder(channels=1)(data)
        return
    config = data_config("pit_s_224", channels)
    got = decoder(channels=channels)(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (got.width, got.height) == upright.size
    if upright.mode in ("I;16", "F"):
        levels = np.asarray(upright) >> 8 if upright.mode == "I;16" else np.rint(np.asarray(upright) * 255)
        upright = Image.fromarray(levels.astype(np.uint8))
    assert torch.equal(normalised(got.pixels, config), oracle(upright.convert(MODES[channels]), config))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_orientation_is_applied_or_left_as_asked(form: str, orientation: int) -> None:
    """All eight, in every format that carries EXIF. TIFFs too, which Pillow itself turns while loading."""
    picture = pictures.photo(60, 40)
    more: dict[str, Any] = {"save_all": True, "append_images": [picture]} if form == "MPO" else {}
    data = pictures.encoded(picture, form, exif=pictures.oriented(orientation), **more)
    stored = Image.open(io.BytesIO(pictures.encoded(picture, form, **more))).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    turned, left, grey = decoder(), decoder(exif_orientation=False), decoder(channels=1)
    assert np.array_equal(turned(data).pixels, turned.transform(upright).numpy())
    assert np.array_equal(grey(data).pixels, grey.transform(upright.convert("L")).numpy())
    assert np.array_equal(left(data).pixels, left.transform(stored).numpy())
    assert left(data)[1:] == (60, 40)


def test_orientation_behind_the_pixels_and_in_xmp_is_found() -> None:
    """A PNG may carry its EXIF block after the image data; XMP counts where EXIF is silent."""
    whole = pictures.png(60, 40)
    late = pictures.png_chunk(b"eXIf", pictures.oriented(6).tobytes()[6:])
    assert decoder()(whole[:-12] + late + whole[-12:])[1:] == (40, 60)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    assert decoder()(pictures.jpeg(60, 40, xmp=xmp))[1:] == (40, 60)


def test_a_damaged_exif_block_does_not_cost_the_sample() -> None:
    """The image is left as stored, also where `exif_transpose` itself raises."""
    whole = pictures.encoded(pictures.photo(60, 40), "WEBP", exif=pictures.oriented(6))
    data = whole.replace(b"MM\0*\0\0\0\x08", b"M?\0*\0\0\0\x08")
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    plain = pictures.encoded(pictures.photo(60, 40), "WEBP")
    assert np.array_equal(decoder()(data).pixels, decoder()(plain).pixels)


def test_random_damage_to_exif_never_costs_a_jpeg() -> None:
    """300 damaged blocks of text, GPS and sub-directories: each a row, and as `exif_transpose` has it where it can."""
    exif = pictures.oriented(6)
    exif[ExifTags.Base.Make] = "maker"
    exif[ExifTags.IFD.Exif] = {0x9000: b"0230", 0x9286: b"comment" * 3}
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.0)}
    whole = pictures.jpeg(60, 40, exif=exif)
    start, stop = whole.index(b"Exif\0\0") + 6, whole.index(b"comment" * 3) + 40
    chance, decode = random.Random(7), decoder()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(start, stop)] = chance.randrange(256)
        got = decode(bytes(data))
        try:
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        except Exception:  # the oracle rewrites the block, and fails at it in a dozen ways
            continue
        assert np.array_equal(got.pixels, decode.transform(upright).numpy())


@pytest.mark.parametrize(("channels", "expected"), [(1, [77]), (3, [250, 3, 7]), (4, [0, 0, 0, 0])])
def test_colours_under_alpha_are_kept_where_alpha_is_dropped(channels: int, expected: list[int]) -> None:
    """A fully transparent red is red, or its grey, as Pillow's conversion has it; an RGBA resize makes it black."""
    invisible = pictures.encoded(Image.new("RGBA", (20, 20), (250, 3, 7, 0)), "PNG")
    assert decoder(channels=channels)(invisible).pixels[:, 9, 9].tolist() == expected


def test_alpha_is_what_the_image_has_else_opaque() -> None:
    """Out of a channel, out of a palette, out of one transparent colour; 255 everywhere without any of these."""
    decode, sound = decoder(channels=4), pictures.sound()
    alpha = {name: decode(data).pixels[3] for name, data in sound.items()}
    with_alpha = {name for name, levels in alpha.items() if levels.min() < 255}
    assert with_alpha == {
        *("png_rgba", "png_grey_alpha", "png_palette_transparency", "webp_lossless_alpha"),
        *("png_transparent_colour", "png_transparent_grey"),
    }


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(form: str) -> None:
    """And that frame is the still image of the same pixels."""
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    still = pictures.encoded(pictures.photo(60, 40), form, **options)
    assert np.array_equal(decoder()(pictures.animation(form, **options)).pixels, decoder()(still).pixels)


def test_an_animation_of_100_000_frames_costs_one_frame() -> None:
    """Frames are not walked: 100,000 cost about what one does."""
    decode, data = decoder(), pictures.endless_gif(100_000)
    decode(data)
    start = time.perf_counter()
    decode(data)
    assert time.perf_counter() - start < 0.5


# 16-bit, integer and float


def levels_of(image: Image.Image) -> list[int]:
    """The first row's levels, which grey, RGB and RGBA must agree on; RGBA's alpha must be opaque."""
    grey, rgb, rgba = (np.asarray(to_mode(image, mode)) for mode in MODES.values())
    assert np.array_equal(rgb, np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(rgba, np.dstack([rgb, np.full(grey.shape, 255, np.uint8)]))
    return grey[0].tolist()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bit_levels_lose_their_low_byte(mode: str) -> None:
    """Whatever the byte order: 0x1234 becomes 0x12, where Pillow would clip at 255."""
    levels = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    stored = levels.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
    assert levels_of(Image.frombuffer(mode, (5, 1), stored, "raw", mode, 0, 1)) == [0, 0, 1, 0x12, 255]


def test_integer_images_are_scaled_and_clipped() -> None:
    """A 16-bit PGM opens as 32-bit integers: its levels lose their low byte; what lies beyond is clipped."""
    image = Image.open(io.BytesIO(b"P5 3 1 65535\n\x12\x34\xff\xff\0\xff"))
    assert image.mode == "I"
    assert levels_of(image) == [0x12, 255, 0]
    assert levels_of(Image.fromarray(np.array([[-5, 2**31 - 1, 65536, 65535]], np.int32))) == [0, 255, 255, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1, -3], [0, 128, 255, 0]),
        ([0, 1.5, 254.6, 255, -1], [0, 2, 255, 255, 0]),
        ([256, 1000, 65535, 128], [1, 4, 255, 0]),
        ([1e9, -1e9], [255, 0]),
        ([np.nan, np.inf, -np.inf, 0.25], [0, 255, 0, 64]),
        ([np.nan, np.inf, 100], [0, 255, 100]),
        ([np.nan, np.nan], [0, 0]),
        ([-2, -1], [0, 0]),
        ([-3e38, 0.5, 3e38], [0, 0, 255]),
        ([-3e38, 0.5], [0, 128]),
    ],
)
def test_float_images_are_scaled_by_their_largest_finite_value(values: list[float], expected: list[int]) -> None:
    """0…1, 0…255 and 16-bit levels; not-a-number and negatives are 0, infinity 255."""
    with np.errstate(all="raise"):
        assert float_levels(np.array([values], np.float32)).tolist() == [expected]
    assert levels_of(Image.fromarray(np.array([values], np.float32))) == expected


@pytest.mark.parametrize("to", MODES.values())
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La"]
)
def test_every_other_mode_is_pillows_conversion(mode: str, to: str) -> None:
    """Bit-equal to `convert(to)`; the image itself where it has the mode; unsupported, by name, where Pillow cannot."""
    image = pictures.photo(20, 10)
    for step in {"La": ["LA", "La"], "PA": ["P", "PA"], "RGBa": ["RGBA", "RGBa"]}.get(mode, [mode]):
        image = image.convert(step)
    assert image.mode == mode
    if mode == "La" or (mode, to) == ("LAB", "L"):
        with pytest.raises(Reject, match=f"mode {mode} cannot be converted to {to}") as caught:
            to_mode(image, to)
        assert (caught.value.reason, caught.value.stage) == ("unsupported", "decode")
    else:
        assert np.array_equal(np.asarray(to_mode(image, to)), np.asarray(image.convert(to)))
        assert (to_mode(image, to) is image) == (mode == to)
