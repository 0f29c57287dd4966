"""Every way to decode on the CPU beside timm's own: speed of one core, levels off, cosines of embeddings.

    python benchmarks/decoding.py --photos DIR [--images 40] [--rounds 5] [--models a,b | --models none]

`timm` is Pillow and the model's own transform in a plain loop, which `exact` equals to the bit. Photos are taken as
they are, resized to 1024x768, and put together to one of 4000x3000. Speeds are of one thread, in turns: medians, with
the range, by the thread's CPU time and by the clock. `lock` is what one image costs any other thread that wants the
interpreter's lock all the time; a process cannot decode more than its inverse. `threads` is images/s by the clock, of
one process, for 1, 2 … threads.
"""

import argparse
import io
import os
import platform
import statistics
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of a thread, and before torch looks

import numpy as np
import timm
import torch
from PIL import Image, ImageOps

from pipeline.images import Decoder, Preprocessing
from pipeline.resizing import BOUNDS

SEEDS = (
    *(f"pit_{size}{kind}_224" for size in ("ti", "xs", "s", "b") for kind in ("", "_distilled")),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
)
SIZES = {"as is": None, "1024x768": (1024, 768), "4000x3000": (4000, 3000)}
FORMATS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 90}, "PNG": {"compress_level": 3}, "WEBP": {"quality": 90}}
LARGE = 4  # of the photos of 12 Mpx; they take long
LOCK_S = 1.5  # how long the lock is watched
Decode = Callable[[bytes], Any]


def read_photos(folder: Path, count: int) -> list[bytes]:
    found: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".jpeg")) and len(found) < count:
                    found.append(tar.extractfile(member).read())  # type: ignore[union-attr]
    return found


def of_size(photos: list[bytes], size: tuple[int, int] | None, form: str) -> list[bytes]:
    """The photos in another size and format; a large one is a sheet of several, which has a large photo's detail."""
    if size is None and form == "JPEG":
        return photos
    images = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos]
    if size == (4000, 3000):
        images = [sheet(images[i:] + images[:i], size) for i in range(min(LARGE, len(images)))]
    elif size is not None:
        images = [image.resize(size) for image in images]
    return [encoded(image, form) for image in images]


def sheet(images: list[Image.Image], size: tuple[int, int]) -> Image.Image:
    made, (width, height) = Image.new("RGB", size), (size[0] // 4, size[1] // 4)
    for place in range(16):
        tile = images[place % len(images)].resize((width, height), Image.Resampling.BICUBIC)
        made.paste(tile, (place % 4 * width, place // 4 * height))
    return made


def encoded(image: Image.Image, form: str) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **FORMATS[form])
    return sink.getvalue()


def plain(transform: Any) -> Decode:
    def decode(data: bytes) -> np.ndarray:
        pixels: np.ndarray = transform(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).numpy()
        return pixels

    return decode


def speeds(ways: dict[str, Decode], images: list[bytes], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Images a second of each way and round, by CPU time and by the clock."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, decode in ways.items():
            cpu, clock = time.thread_time(), time.perf_counter()
            for image in images:
                decode(image)
            cpu, clock = time.thread_time() - cpu, time.perf_counter() - clock
            found[name].append((len(images) / cpu, len(images) / clock))
    return found


def lock_ms(decode: Decode, images: list[bytes]) -> float:
    """Milliseconds an image in which a thread that does nothing but count cannot count."""
    alone, _ = counted(None, images)
    beside, done = counted(decode, images)
    return max(0.0, 1 - beside / alone) * LOCK_S * 1000 / max(done, 1)


def counted(decode: Decode | None, images: list[bytes]) -> tuple[int, int]:
    """How far this thread counts in `LOCK_S`, and how many images another has decoded in that time."""
    done, is_over = 0, threading.Event()

    def work() -> None:
        nonlocal done
        while decode is not None and not is_over.is_set():
            decode(images[done % len(images)])
            done += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    worker = threading.Thread(target=work)
    worker.start()
    count, end = 0, time.perf_counter() + LOCK_S
    while time.perf_counter() < end:
        count += 1
    is_over.set()
    worker.join()
    sys.setswitchinterval(interval)
    return count, done


def threaded(decode: Decode, images: list[bytes], threads: int) -> float:
    """Images a second of so many threads of this process."""
    many = images * max(1, 200 // len(images)) * threads
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(decode, many))
        return len(many) / (time.perf_counter() - started)


def compare_speeds(photos: list[bytes], rounds: int) -> None:
    config = timm.data.resolve_data_config({}, model=timm.create_model("pit_ti_224"))
    ours = {how: Decoder(Preprocessing.of(config), how=how) for how in BOUNDS}
    ways: dict[str, Decode] = {"timm": plain(ours["exact"].transform), **ours}
    print("| images | how | images/s, CPU | by the clock | to exact | to timm | levels: most, mean | lock, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size, form in [(size, "JPEG") for size in SIZES] + [("as is", "PNG"), ("as is", "WEBP")]:
        images = of_size(photos, SIZES[size], form)
        want = [ways["timm"](image).astype(np.int16) for image in images]
        found = speeds(ways, images, rounds)
        cpu = {name: [one for one, _ in values] for name, values in found.items()}
        for name, decode in ways.items():
            got = want if name == "timm" else [decode(image).pixels for image in images]
            off = [np.abs(a - b) for a, b in zip(want, got, strict=True)]
            print(
                f"| {size} {form} | {name} | {shown(cpu[name])} | {shown([clock for _, clock in found[name]])} "
                f"| {ratio(cpu[name], cpu['exact'])} | {ratio(cpu[name], cpu['timm'])} "
                f"| {max(o.max() for o in off)}, {statistics.mean(float(o.mean()) for o in off):.4f} "
                f"| {lock_ms(decode, images):.3f} |",
                flush=True,
            )
    for name, decode in ways.items():
        counts = sorted({1, 2, os.cpu_count() or 1})
        print(f"threads, as is JPEG, {name}: " + ", ".join(f"{n}: {threaded(decode, photos, n):.0f}/s" for n in counts))


def compare_embeddings(model: str, small: list[bytes], large: list[bytes]) -> None:
    """The smallest cosine between embeddings of `exact`'s pixels and the others', in fp32, of seeded weights."""
    torch.manual_seed(0)
    net = timm.create_model(model, pretrained=False).eval()
    config = timm.data.resolve_data_config({}, model=net)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    ours = {how: Decoder(Preprocessing.of(config), how=how) for how in BOUNDS}
    told = []
    for name, images in (("as is", small), ("4000x3000", large)):
        found = {}
        for how, decode in ours.items():
            pixels = torch.from_numpy(np.stack([decode(image).pixels for image in images]))
            with torch.inference_mode():
                body = net.forward_features(pixels.float().div(255).sub(mean).div(std))
                found[how] = net.forward_head(body, pre_logits=True).double()
        for how in ("fast", "scaled"):
            least = torch.cosine_similarity(found[how], found["exact"]).min().item()
            told.append(f"{how} {name} 1 - {1 - least:.1e} (bound {BOUNDS[how].cosine})")
    print(f"{model}: " + ", ".join(told), flush=True)


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def ratio(values: list[float], to: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(values, to, strict=True)):.2f}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--photos", type=Path, required=True, help="a folder of WebDataset tars")
    flags.add_argument("--images", type=int, default=40)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--models", default=",".join(SEEDS), help="for the cosines, or none")
    asked = flags.parse_args()
    torch.set_num_threads(1)
    photos = read_photos(asked.photos, asked.images)
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {len(photos)} photos")
    compare_speeds(photos, asked.rounds)
    torch.set_num_threads(os.cpu_count() or 1)
    large = of_size(photos, (4000, 3000), "JPEG")
    for model in asked.models.split(",") if asked.models != "none" else ():
        compare_embeddings(model, photos[:16], large)


if __name__ == "__main__":
    main()
