"""`--decode cuda`: what the device may have, what it gives, and what becomes of an image that it fails at.

Without a device its decoder is played by libjpeg-turbo through the same call of torchvision, so everything but the
device's own arithmetic is tested anywhere; that is for the tests marked `gpu`, which print what they measure.
"""

import contextlib
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from pictures import broken, jpeg, oriented, photo, png, sound
from PIL import Image

from pipeline import cuda_images
from pipeline.backbone import Backbone
from pipeline.cuda_images import (
    LEAST_COSINE,
    MEAN_LEVELS,
    MOST_LEVELS,
    DeviceImages,
    DeviceResizer,
    HeaderDecoder,
    Jpeg,
    OnDevice,
    check_decoder,
    decode_jpegs,
    turned,
)
from pipeline.device import Staging
from pipeline.errors import NoRoom, Reject, UsageError
from pipeline.images import Decoder, Preprocessing
from pipeline.resizing import Turn

CPU = torch.device("cpu")
MODEL = Preprocessing(
    input_size=(3, 96, 96), crop_pct=0.9, crop_mode="center", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
)


def jpegs() -> dict[str, bytes]:
    """Images that the device takes: several sizes, samplings and turns, some alike."""
    several = {f"photo_{i}": jpeg(120 + 30 * (i % 3), 90 + 8 * (i % 2), seed=i, quality=90) for i in range(8)}
    several |= {f"turned_{o}": jpeg(150, 100, seed=o, exif=oriented(o)) for o in range(1, 9)}
    return several | {f"sampling_{s}": jpeg(131, 99, seed=s, subsampling=s) for s in (0, 1, 2)}


def exact(data: bytes, preprocessing: Preprocessing = MODEL) -> np.ndarray:
    return Decoder(preprocessing)(data).pixels


# the resize


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (96, 130), (100, 1800), (70, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_resize_is_pillows_to_the_bit(size: tuple[int, int], interpolation: str, crop_mode: str) -> None:
    """Whole-number weights and rounding between the passes: of noise, no level differs from timm's transform."""
    preprocessing = replace(MODEL, interpolation=interpolation, crop_mode=crop_mode)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    want = Decoder(preprocessing).transform(Image.fromarray(noise)).numpy()
    got = DeviceResizer(preprocessing, CPU)(torch.from_numpy(noise).permute(2, 0, 1)[None])
    assert np.array_equal(got[0].numpy(), want)


@pytest.mark.parametrize("turn", [None, *Turn])
def test_turns_are_pillows(turn: Turn | None) -> None:
    """All eight orientations."""
    image = photo(7, 5)
    want = np.asarray(image if turn is None else image.transpose(turn))
    got = turned(torch.from_numpy(np.array(image)).permute(2, 0, 1), turn).permute(1, 2, 0)
    assert np.array_equal(got.numpy(), want)


# what the device is given


def test_usual_jpegs_go_to_the_device_with_the_size_that_they_show() -> None:
    """Width and height are of the upright image, as for every decoder."""
    headers, plain = HeaderDecoder(MODEL), Decoder(MODEL)
    for name, data in jpegs().items():
        told, want = headers(data), plain(data)
        assert isinstance(told, Jpeg), name
        assert (told.width, told.height) == (want.width, want.height)


def test_what_the_device_may_not_take_is_decoded_as_by_fast() -> None:
    """Other formats, codings and colours, small images and large files: no difference to `--decode fast`."""
    headers, fast = HeaderDecoder(MODEL), Decoder(MODEL, how="fast")
    adobe = jpeg(120, 90, mode="CMYK")
    for name, data in {**sound(), "cmyk": adobe, "small": jpeg(63, 100), "png": png(200, 200)}.items():
        told = headers(data)
        assert not isinstance(told, Jpeg), name
        assert np.array_equal(told.pixels, fast(data).pixels), name
    for name, data in {
        "progressive": jpeg(120, 90, progressive=True),
        "grey": jpeg(120, 90, mode="L"),
        "rgb": jpeg(120, 90, keep_rgb=True),
        "behind the end": jpeg(120, 90) + bytes(100),
        "narrow": jpeg(7000, 64),
    }.items():
        with contextlib.suppress(Reject):
            assert not isinstance(headers(data), Jpeg), name


def test_models_of_other_channels_or_filters_decode_on_the_cpu() -> None:
    """Grey and RGBA models, and filters that are not repeated for the device."""
    for changes in ({"input_size": (1, 96, 96), "mean": (0.5,), "std": (0.5,)}, {"interpolation": "lanczos"}):
        assert not isinstance(HeaderDecoder(replace(MODEL, **changes))(jpeg(120, 90)), Jpeg)


def test_broken_images_are_the_same_rejects_as_everywhere() -> None:
    """A cut file never reaches the device: the header's check sends it to the CPU, which says what is wrong."""
    headers, plain = HeaderDecoder(MODEL), Decoder(MODEL)
    cases = {name: data for name, (_, data) in broken().items()}
    whole = jpeg(300, 200)
    cases |= {f"cut_{share}": whole[: len(whole) * share // 10] for share in (1, 3, 5, 9)}
    for name, data in cases.items():
        said = []
        for decoder in (headers, plain):
            with pytest.raises(Reject) as why:
                decoder(data)
            said.append((why.value.reason, why.value.message))
        assert said[0] == said[1], name


# a batch


def batch(images: DeviceImages, given: list[bytes]) -> list[object]:
    headers = HeaderDecoder(MODEL)
    return images([headers(data) for data in given])


def test_a_batch_comes_in_its_order_and_as_exact() -> None:
    """Sizes and turns mixed, images of the CPU between: each in its place, bit-equal to timm's transform."""
    given = jpegs()
    names = [*given, "png", "small"]
    given |= {"png": png(200, 150, seed=3), "small": jpeg(60, 60)}
    names = names[::2] + names[1::2]
    found = batch(DeviceImages(MODEL, CPU, Decoder(MODEL)), [given[name] for name in names])
    assert sum(isinstance(one, OnDevice) for one in found) == len(given) - 2
    plain = Decoder(MODEL)
    for name, one in zip(names, found, strict=True):
        want = plain(given[name])
        assert (one.width, one.height) == (want.width, want.height), name
        if isinstance(one, OnDevice):
            assert np.array_equal(one.pixels.numpy(), want.pixels), name


def test_an_image_that_the_device_fails_at_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of the whole batch raises: the offenders are found, and the CPU decodes or rejects them."""
    given = list(jpegs().values())
    noise = bytearray(given[4])
    noise[-400:-2] = bytes(398)  # in the midst of the codes, the end mark in place
    given[4] = bytes(noise)
    headers = HeaderDecoder(MODEL)
    asked: list[int] = []

    def fails(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        asked.append(len(data))
        if any(bytes(d.numpy()) in (given[1], given[4]) for d in data):
            raise RuntimeError("Failed to decode batch: 2")
        return decode_jpegs(data, device)

    refused = Reject("corrupt", "decode", "JPEG: nothing in it")

    def cpu(data: bytes) -> object:
        if data == given[4]:
            raise refused
        return headers.cpu(data)

    found = DeviceImages(MODEL, CPU, cpu, fails)([headers(data) for data in given])  # type: ignore[arg-type]
    assert found[4] is refused
    assert np.array_equal(found[1].pixels, Decoder(MODEL, how="fast")(given[1]).pixels)
    assert [isinstance(one, OnDevice) for one in found] == [i not in (1, 4) for i in range(len(given))]
    assert len(asked) < len(given)  # by halves, not one by one


def test_a_batch_of_large_images_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded pixels on the device are bounded; one image may be larger than the bound."""
    given = list(jpegs().values())[:6]
    asked: list[int] = []

    def counted(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        asked.append(len(data))
        return decode_jpegs(data, device)

    monkeypatch.setattr(cuda_images, "CHUNK_BYTES", 2 * 3 * 160 * 100)
    found = batch(DeviceImages(MODEL, CPU, Decoder(MODEL), counted), given)
    assert all(np.array_equal(one.pixels.numpy(), exact(data)) for one, data in zip(found, given, strict=True))
    assert sum(asked[1:]) == 6 and max(asked[1:]) <= 3
    monkeypatch.setattr(cuda_images, "CHUNK_BYTES", 1)
    assert all(isinstance(one, OnDevice) for one in batch(DeviceImages(MODEL, CPU, Decoder(MODEL), counted), given))


def test_memory_that_runs_out_on_the_device_leaves_the_images_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is lost for the want of memory to resize it in."""

    def refuse(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(DeviceResizer, "__call__", refuse)
    given = list(jpegs().values())[:3]
    found = batch(DeviceImages(MODEL, CPU, Decoder(MODEL, how="fast")), given)
    fast = Decoder(MODEL, how="fast")
    assert all(np.array_equal(one.pixels, fast(data).pixels) for one, data in zip(found, given, strict=True))


LACKS = (
    RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat image.cpp"),
    ImportError("libnvjpeg.so.13: cannot open shared object file"),
    AttributeError("'_OpNamespace' 'image' object has no attribute 'decode_jpegs_cuda'"),
)


@pytest.mark.parametrize("error", LACKS)
def test_a_torchvision_without_nvjpeg_is_said_at_the_start(error: Exception) -> None:
    """Not image by image, and never silently on the CPU."""

    def lacks(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        raise error

    for check in (lambda: DeviceImages(MODEL, CPU, Decoder(MODEL), lacks), lambda: check_decoder(CPU, lacks)):
        with pytest.raises(UsageError, match=r"--decode cuda: this torchvision decodes no JPEG on cpu \(.*\): choose"):
            check()


def test_a_full_device_is_no_lack_of_a_decoder() -> None:
    """It is told as what it is."""

    def full(data: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(NoRoom, match="has no room for the decoder of JPEGs"):
        check_decoder(torch.device("cuda", 0), full)


# on a device


def pictures_for_bounds() -> list[bytes]:
    """Photo-like images of usual sizes, qualities and samplings."""
    sizes = [(500, 375), (375, 500), (640, 480), (1024, 768), (333, 500)]
    return [
        jpeg(*sizes[i % 5], seed=i, quality=(75, 85, 95)[i % 3], subsampling=(2, 2, 1, 0)[i % 4]) for i in range(40)
    ]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_cuda_pixels_are_within_the_published_bound(device: torch.device) -> None:
    """Every usual JPEG is decoded on the device, at most so many levels off `exact`; the figures are printed."""
    preprocessing = replace(MODEL, input_size=(3, 224, 224))
    given = pictures_for_bounds()
    headers = HeaderDecoder(preprocessing)
    found = DeviceImages(preprocessing, device, headers.cpu)([headers(data) for data in given])
    assert all(isinstance(one, OnDevice) for one in found)
    apart = np.stack(
        [
            np.abs(one.pixels.cpu().numpy().astype(int) - exact(data, preprocessing))
            for one, data in zip(found, given, strict=True)
        ]
    )
    print(f"\ncuda against exact: at most {apart.max()} levels of {MOST_LEVELS}, {apart.mean():.3f} on average")
    assert apart.max() <= MOST_LEVELS and apart.mean() <= MEAN_LEVELS


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["test_vit", "pit_ti_224"])
def test_cuda_decoded_embeddings_are_within_the_published_bound(model: str, device: torch.device) -> None:
    """The embedding's cosine with that of `exact`; the figures are printed."""
    backbone = Backbone(oracle.module(model), device="cuda", batch_size=8)
    given = pictures_for_bounds()[:8]
    headers = HeaderDecoder(backbone.preprocessing)
    staging = Staging(backbone, DeviceImages(backbone.preprocessing, device, headers.cpu))
    got = staging(staging.decoded([headers(data) for data in given])).to_numpy().embedding
    want = staging([Decoder(backbone.preprocessing)(data) for data in given]).to_numpy().embedding
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    print(f"\n{model}: cosine of cuda with exact at least {cosine.min():.6f}, bound {LEAST_COSINE}")
    assert cosine.min() >= LEAST_COSINE


@pytest.mark.gpu
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_resize_on_a_device_is_pillows_to_the_bit(crop_mode: str, device: torch.device) -> None:
    """Products and sums are whole numbers in float32, so neither the order nor TF32 changes a bit."""
    preprocessing = replace(MODEL, input_size=(3, 224, 224), crop_mode=crop_mode)
    for size in ((500, 375), (375, 500), (1024, 768), (224, 224), (300, 2000)):
        noise = torch.randint(0, 256, (3, 3, *size[::-1]), dtype=torch.uint8)
        want = DeviceResizer(preprocessing, CPU)(noise)
        resizer = DeviceResizer(preprocessing, device)
        for precision in ("highest", "high"):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                assert torch.equal(resizer(noise.to(device)).cpu(), want), (size, precision)
            finally:
                torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_cuda_pixels_do_not_change_under_load(device: torch.device) -> None:
    """nvJPEG writes without waiting for the stream: with the device busy, the same batch has the same pixels."""
    preprocessing = replace(MODEL, input_size=(3, 224, 224))
    backbone = Backbone(oracle.module("pit_ti_224"), device="cuda", batch_size=32)
    headers = HeaderDecoder(preprocessing)
    given = [headers(data) for data in pictures_for_bounds()[:32]]
    staging = Staging(backbone, DeviceImages(preprocessing, device, headers.cpu))
    first = staging(staging.decoded(given)).to_numpy().embedding
    waiting = []
    for _ in range(12):
        waiting.append(staging(staging.decoded(given)))
        if len(waiting) > 4:
            assert np.array_equal(waiting.pop(0).to_numpy().embedding, first)
    assert all(np.array_equal(passed.to_numpy().embedding, first) for passed in waiting)


@pytest.mark.gpu
def test_cuda_decodes_a_batch_with_a_damaged_image(device: torch.device) -> None:
    """Codes destroyed behind a sound header: no other image of the batch changes, and nothing raises."""
    preprocessing = replace(MODEL, input_size=(3, 224, 224))
    given = pictures_for_bounds()[:9]
    damaged = bytearray(given[4])
    damaged[len(damaged) // 2 : -2] = np.random.default_rng(0).bytes(len(damaged) - len(damaged) // 2 - 2)
    headers = HeaderDecoder(preprocessing)
    images = DeviceImages(preprocessing, device, headers.cpu)
    sound = images([headers(data) for data in given])
    told = [
        headers(data) if i != 4 else replace_data(headers(given[4]), bytes(damaged)) for i, data in enumerate(given)
    ]
    found = images(told)
    for i in (0, 1, 2, 3, 5, 6, 7, 8):
        assert torch.equal(found[i].pixels, sound[i].pixels)


def replace_data(told: object, data: bytes) -> Jpeg:
    assert isinstance(told, Jpeg)
    return told._replace(data=data)
