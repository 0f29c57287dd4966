"""Every engine and precision on the seed models: speed against eager in bf16, distance from eager in fp32, start-up.

    python benchmarks/engines.py [--models a,b] [--rounds 5] [--engines openvino] [--threads 1] [--photos DIR]

Each model's engines take turns, a batch each, after one batch to warm up; images/s are of the median round, in seconds
of the processor with one thread (as if the machine were idle), else of the clock. The distance is over one batch: the
smallest cosine of a row with eager fp32 and the largest difference as a share of the largest value, of embeddings. A
compiled model starts twice: with an empty cache, as the driver, and with what that left there, as a worker.
"""

import argparse
import io
import itertools
import os
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

from pipeline.backbone import Backbone
from pipeline.engines import STATED_ERROR, Unavailable, difference
from pipeline.images import Decoder
from pipeline.process import keep_memory

PIT = ("pit_ti", "pit_xs", "pit_s", "pit_b", "pit_ti_distilled", "pit_xs_distilled", "pit_s_distilled")
MODELS = (
    *(f"{name}_224" for name in (*PIT, "pit_b_distilled")),
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
)
BATCH = 32
REFERENCE = ("eager", "bf16")
SPOTS = 16


def read_photos(folder: Path | None, plain: Backbone) -> torch.Tensor:
    """One batch, uint8: the first photos of the tars, else smooth random colours."""
    channels, height, width = plain.preprocessing.input_size
    if folder is None:
        spots = torch.rand(BATCH, channels, SPOTS, SPOTS, generator=torch.Generator().manual_seed(1))
        smooth = torch.nn.functional.interpolate(spots, (height, width), mode="bicubic").clamp(0, 1)
        return (smooth * 255).to(torch.uint8)
    decoder = Decoder(plain.preprocessing)
    return torch.from_numpy(np.stack([decoder(image).pixels for image in itertools.islice(jpegs(folder), BATCH)]))


def jpegs(folder: Path):  # type: ignore[no-untyped-def]
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    file = members.extractfile(member)
                    assert file is not None
                    yield io.BytesIO(file.read()).getvalue()


def started(net: torch.nn.Module, engine: str, precision: str) -> tuple[Backbone | None, str]:
    """The backbone, and the seconds that its start took: of a compiled one also those of the next process's."""
    seconds = []
    for _ in range(2 if engine == "compile" else 1):
        begun = time.perf_counter()
        try:
            backbone = Backbone(net, engine=engine, precision=precision, batch_size=BATCH, classes=False)
        except Unavailable as e:
            return None, str(e)
        seconds.append(f"{time.perf_counter() - begun:.1f}")
    return backbone, " · ".join(seconds)


def measured(model: str, precision: str, asked: argparse.Namespace) -> None:
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    plain = Backbone(net, batch_size=BATCH, classes=False)
    images = read_photos(asked.photos, plain)
    want = plain(images)
    rows = {("eager", "fp32"): plain, REFERENCE: Backbone(net, precision="bf16", batch_size=BATCH, classes=False)}
    start = dict.fromkeys(rows, "–")
    for row in [row for row in STATED_ERROR if row[1] == precision and row[0] in asked.engines.split(",")]:
        backbone, start[row] = started(net, *row)
        if backbone is None:
            print(f"| {model} | {' '.join(row)} | {start[row]} | | | | |", flush=True)
        else:
            rows[row] = backbone
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = {row: difference(backbone(images), want, torch.arange(BATCH)) for row, backbone in rows.items()}
    seconds: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    for _ in range(asked.rounds):
        for row, backbone in rows.items():
            begun = clock()
            backbone(images)
            seconds[row].append(clock() - begun)
    speed = {row: BATCH / statistics.median(times) for row, times in seconds.items()}
    for row in rows:
        error = f"{1 - found[row].cosine:.1e} | {found[row].relative:.1e}"
        pace = f"{speed[row]:.1f} | {speed[row] / speed[REFERENCE]:.2f}"
        print(f"| {model} | {' '.join(row)} | {pace} | {error} | {start[row]} |", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=",".join(MODELS))
    flags.add_argument("--engines", default="compile,openvino")
    flags.add_argument("--precisions", default="fp32,bf16")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--photos", type=Path, help="a folder of WebDataset tars")
    asked = flags.parse_args()
    torch.set_num_threads(asked.threads)
    keep_memory()  # as a run's workers do
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}", end="")
    print(f", batches of {BATCH}, {asked.threads} threads, {asked.rounds} rounds\n")
    print("| model | engine | images/s | to eager bf16 | 1 - cosine | difference | start, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHARD2VEC_CACHE"] = folder
        # A process has one compiled model at a time: to compile another ends the first.
        for model, precision in itertools.product(asked.models.split(","), asked.precisions.split(",")):
            measured(model, precision, asked)


if __name__ == "__main__":
    main()
