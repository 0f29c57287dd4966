"""`shard2vec embed` beside plain timm on the same shards, model, weights, precision and machine, in turns.

    python benchmarks/against_loop.py --photos DIR [--models a,b] [--rounds 5] [--repeat 1]

Baselines: `loop` is timm in a plain loop with all threads; `two` is two such loops with one thread each and half of
the shards, the most that plain processes get out of two cores. Speeds are steady: without imports, model loading and
Ray's start, over the same images; `all-in` is the wall clock of the whole command. Prints medians and the range.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MODELS = (
    "pit_b_224",
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "pit_s_distilled_224",
)
BATCH = 32


def plain_loop(model: str, threads: int, bf16: bool, tars: list[Path], keep: str | None) -> float:
    """timm in a loop: read, decode, transform, forward, embedding and scores. Returns its seconds."""
    import io
    import tarfile

    import timm
    import torch
    from PIL import Image

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    ids, images, embeddings, scores = [], [], [], []

    def forward() -> None:
        x = torch.stack(images)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            body = net.forward_features(x)
            embeddings.append(net.forward_head(body, pre_logits=True).float())
            scores.append(net.forward_head(body).float().softmax(1))
        images.clear()

    started = time.perf_counter()
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    ids.append(f"{path.stem}/{member.name.partition('.')[0]}")
                    images.append(transform(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
                    if len(images) == BATCH:
                        forward()
    if images:
        forward()
    seconds = time.perf_counter() - started
    if keep:
        torch.save((ids, torch.cat(embeddings), torch.cat(scores)), keep)
    return seconds


def loops(model: str, processes: int, threads: int, bf16: bool, tars: list[Path]) -> float:
    """Images a second of so many plain processes; each counts from its own first read."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = [(model, threads, bf16, tars[i::processes], None) for i in range(processes)]
        return count(tars) / max(pool.starmap(plain_loop, parts))


def count(tars: list[Path]) -> int:
    import tarfile

    return sum(m.name.endswith(".jpg") for path in tars for m in tarfile.open(path))


def ours(model: str, precision: str, folder: Path, output: Path, *flags: str) -> tuple[float, float, float, str]:
    """(steady images/s, all-in images/s, peak MB of all processes, limited_by) of the command line."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "jobs", "embed", "--input", folder, "--output", output, "--model", model]
    command += ["--weights", "random:0", "--precision", precision, "--json", *flags]
    started = time.perf_counter()
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = [0.0]
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(run.pid, peak, done))
    watcher.start()
    told = json.loads(run.communicate()[0].splitlines()[-1])
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return told["images_per_s"], told["rows"] / seconds, peak[0], told["limited_by"]


def watch(pid: int, peak: list[float], done: threading.Event) -> None:
    """Largest sum of the process tree's own (proportional) memory, MB."""
    while not done.wait(0.5):
        peak[0] = max(peak[0], sum(memory_mb(p) for p in tree(pid)))


def tree(pid: int) -> list[int]:
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(p for c in children for p in tree(c))]


def memory_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def difference(model: str, tars: list[Path], folder: Path, scratch: Path) -> str:
    """Ours in fp32 against the plain loop, over all images: largest relative difference, and equality of the top 5."""
    import numpy as np
    import torch

    from pipeline import open_dataset

    ours(model, "fp32", folder, scratch / "exact", "--decode", "exact")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.starmap(plain_loop, [(model, 2, False, tars, str(scratch / "plain.pt"))])
    ids, embedding, scores = torch.load(scratch / "plain.pt")
    table = open_dataset(str(scratch / "exact")).to_table().to_pandas().set_index("id").loc[ids]
    got, want = np.stack(table["embedding"]), embedding.numpy()
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :5]
    same = (np.stack(table["topk_index"]) == order).mean()
    score = np.abs(np.stack(table["topk_score"]) - np.take_along_axis(scores.numpy(), order, 1)).max()
    apart = np.abs(got - want).max() / np.abs(want).max()
    return f"{len(ids)} images: embedding {apart:.1e}, score {score:.1e}, top-5 {same:.2%}"


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--photos", type=Path, required=True, help="a folder of WebDataset tars")
    flags.add_argument("--models", default=",".join(MODELS))
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--shards", type=int, default=None, help="use the first so many tars")
    flags.add_argument("--repeat", type=int, default=1, help="use each tar so many times")
    flags.add_argument("--precision", default="bf16")
    flags.add_argument("--no-check", action="store_true", help="leave out the comparison of the vectors")
    asked = flags.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="against-loop-"))
    folder = scratch / "in"
    folder.mkdir()
    for path in sorted(asked.photos.glob("*.tar"))[: asked.shards]:
        for i in range(asked.repeat):
            os.link(shutil.copy(path, scratch / "copy"), folder / f"{path.stem}-{i}.tar")
            (scratch / "copy").unlink()
    tars = sorted(folder.glob("*.tar"))
    images = count(tars)
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {images} images, {asked.precision}")
    for model in asked.models.split(","):
        loop, two, steady, all_in, memory = [], [], [], [], []
        for _ in range(asked.rounds):
            loop.append(loops(model, 1, 2, asked.precision == "bf16", tars))
            two.append(loops(model, 2, 1, asked.precision == "bf16", tars))
            speed, total, peak, limit = ours(model, asked.precision, folder, scratch / "out")
            steady.append(speed)
            all_in.append(total)
            memory.append(peak)
        print(
            f"{model}: embed {shown(steady)} images/s, loop {shown(loop)}, two processes {shown(two)}; "
            f"ratio to loop {ratio([a / b for a, b in zip(steady, loop, strict=True)])}, "
            f"to two {ratio([a / b for a, b in zip(steady, two, strict=True)])}; "
            f"all-in {shown(all_in)} images/s, peak {shown(memory)} MB, limited by {limit}",
            flush=True,
        )
        if not asked.no_check:
            print(f"    against timm in fp32, {difference(model, tars, folder, scratch)}", flush=True)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
