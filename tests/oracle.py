"""timm itself in a plain loop: what every vector is compared with. And the small shards that go through both."""

import copy
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from containers import write_tar
from pictures import broken, jpeg, oriented, photo, png, sound
from PIL import Image, ImageOps

SEEDS = (
    "pit_ti_224",
    "pit_xs_224",
    "pit_s_224",
    "pit_b_224",
    "pit_ti_distilled_224",
    "pit_xs_distilled_224",
    "pit_s_distilled_224",
    "pit_b_distilled_224",
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
)
# Those that go through the command line and Ray; all others go from shards to Parquet in the test's own process.
ON_RAY = ("pit_ti_distilled_224",)
# One of each layout of tokens and kind of head, the smallest that timm has.
OTHERS = (
    "mobilenetv3_small_050",
    "vgg11",
    "swin_tiny_patch4_window7_224",
    "crossvit_tiny_240",
    "convnext_atto",
    "resnet10t",
    "efficientvit_b0",
    "mambaout_femto",
    "levit_128s",
    "coat_lite_tiny",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
)


class Expected(NamedTuple):
    embedding: np.ndarray  # float32 (n, D)
    scores: np.ndarray  # float32 (n, C)
    tokens: np.ndarray  # float32 (n, …), flat, parts one after the other
    maps: tuple[np.ndarray, ...]  # feature maps 2 and 0, flat, where asked for


def module(model: str, seed: int = 0) -> torch.nn.Module:
    """timm's own initialisation after `manual_seed`; a copy, which is ten times faster to have than a new one."""
    return copy.deepcopy(shared(model, seed))


@lru_cache(maxsize=3)
def shared(model: str, seed: int = 0) -> torch.nn.Module:
    """The same, for those who change nothing in it."""
    torch.manual_seed(seed)
    return timm.create_model(model, pretrained=False).eval()


def expected(model: str, images: Sequence[bytes], seed: int = 0, maps: bool = False) -> Expected:
    """timm's own calls, each for itself, one image at a time."""
    return _expected(model, tuple(images), seed, maps)


@lru_cache(maxsize=4)
def _expected(model: str, images: tuple[bytes, ...], seed: int, with_maps: bool) -> Expected:
    net = shared(model, seed)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    embeddings, scores, tokens, maps = [], [], [], []
    with torch.inference_mode():
        for image in images:
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
            x = transform(upright.convert("RGB"))[None]
            body = net.forward_features(x)
            embeddings.append(net.forward_head(body, pre_logits=True)[0].numpy())
            scores.append(net(x).softmax(1)[0].numpy())
            parts = body if isinstance(body, list | tuple) else [body]
            tokens.append(torch.cat([p.flatten() for p in parts]).numpy())
            if with_maps:
                found = net.forward_intermediates(x, intermediates_only=True)
                maps.append([found[i].flatten().numpy() for i in (2, 0)])
    two = tuple(np.stack(column) for column in zip(*maps, strict=True))
    return Expected(np.stack(embeddings), np.stack(scores), np.stack(tokens), two)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def good_images() -> dict[str, bytes]:
    """Names → images of several sizes, formats, modes and orientations that decode."""
    images = {f"photo_{i}": jpeg(80 + 12 * i, 60 + 7 * i, seed=i, quality=90) for i in range(14)}
    turned = io.BytesIO()
    photo(90, 60, seed=50).save(turned, "JPEG", exif=oriented(6))
    return images | {
        "turned": turned.getvalue(),
        "alpha": png(70, 50, seed=51, mode="RGBA"),
        "grey": png(64, 64, seed=52, mode="L"),
        "cmyk": jpeg(64, 48, seed=53, mode="CMYK"),
        "palette": sound()["P"] if "P" in sound() else png(40, 40, seed=54),
    }


def write_shards(folder: Path) -> Path:
    """Tars a/one, a/two and three: 24 samples, of which 3 are rejects (truncated, corrupt, missing image)."""
    good = list(good_images().items())
    ending = {b"\xff\xd8": "jpg", b"\x89P": "png"}

    def members(part: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        out = []
        for i, (name, image) in enumerate(part):
            out += [(f"{name}.{ending.get(image[:2], 'png')}", image), (f"{name}.cls", str(i * 7 % 1000).encode())]
        return out

    one = members(good[:11])
    one[6:6] = [("cut.jpg", good[0][1][: len(good[0][1]) // 2])]
    one += [("html.jpg", next(data for reason, data in broken().values() if reason == "corrupt"))]
    write_tar(folder / "a" / "one.tar", one)
    write_tar(folder / "a" / "two.tar", [*members(good[11:17]), ("nothing.txt", b"no image here")])
    write_tar(
        folder / "three.tar.gz", members(good[17:] + [(f"more_{i}", jpeg(60, 60, seed=70 + i)) for i in range(2)])
    )
    return folder


SAMPLES, REJECTS = 24, {"corrupt": 1, "missing_image": 1, "truncated": 1}


def images_by_id(folder: Path) -> dict[str, bytes]:
    """Id → bytes of the samples of `write_shards` that must become rows."""
    from pipeline.listing import list_shards
    from pipeline.shards import read_samples

    found = {
        f"{s.name}/{x.id_key}": x.image for s in list_shards([str(folder)]) for x in read_samples(s) if not x.reject
    }
    return {i: data for i, data in found.items() if not i.endswith(("/cut", "/html"))}
