"""The memory of `shard2vec embed` over many rows, process by process.

    python benchmarks/memory.py --photos DIR --model test_vit --rows 1000,20000 --shards 1
    python benchmarks/memory.py --photos DIR --model beit_base_patch16_224 --outputs embedding,classes,tokens

Repeats the photos to so many rows in so few shards, embeds them, and prints each process's own (proportional) memory
at a tenth of the run, at half and at its largest: flat means that nothing gathers.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from against_loop import memory_mb, tree

EVERY_S = 1.0


def write_shards(photos: Path, folder: Path, rows: int, shards: int) -> None:
    images = []
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            images += [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for i in range(shard, rows, shards):
                member = tarfile.TarInfo(f"{i:07d}.jpg")
                member.size = len(images[i % len(images)])
                tar.addfile(member, io.BytesIO(images[i % len(images)]))


def watch(pid: int, seen: list[dict[int, float]], done: threading.Event) -> None:
    while not done.wait(EVERY_S):
        seen.append({p: memory_mb(p) for p in tree(pid)})


def embed(asked: argparse.Namespace, rows: int, scratch: Path) -> None:
    folder, output = scratch / "in", scratch / "out"
    folder.mkdir()
    write_shards(asked.photos, folder, rows, asked.shards)
    command = [sys.executable, "-m", "jobs", "embed", "--input", str(folder), "--output", str(output), "--json"]
    command += ["--model", asked.model, "--weights", "random:0", "--outputs", asked.outputs]
    if asked.actors:
        command += ["--actors", asked.actors]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen: list[dict[int, float]] = []
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(run.pid, seen, done))
    watcher.start()
    told = json.loads(run.communicate()[0].splitlines()[-1])
    done.set()
    watcher.join()
    written = sum(f.stat().st_size for f in output.rglob("*.parquet")) / 1e9
    print(
        f"{told['rows']} rows in {told['shards']} shards, {written:.2f} GB of Parquet, "
        f"{told['images_per_s']} images/s, limited by {told['limited_by']}"
    )
    tenth, half = seen[len(seen) // 10], seen[len(seen) // 2]
    for p in sorted(half, key=lambda p: -half[p])[:3]:
        print(
            f"  process {p}: {tenth.get(p, 0):.0f} MB at a tenth of the run, {half[p]:.0f} MB at half, "
            f"{max(s.get(p, 0) for s in seen):.0f} MB at most"
        )
    print(f"  all processes: {max(sum(s.values()) for s in seen):.0f} MB at most", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--photos", type=Path, required=True, help="a folder of WebDataset tars")
    flags.add_argument("--rows", default="10000", help="one or more, by commas: each a run of its own")
    flags.add_argument("--shards", type=int, default=2)
    flags.add_argument("--model", default="beit_base_patch16_224")
    flags.add_argument("--outputs", default="embedding,classes,tokens")
    flags.add_argument("--actors", default=None)
    asked = flags.parse_args()
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}: {asked.model}, {asked.outputs}")
    for rows in asked.rows.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            embed(asked, int(rows), Path(scratch))


if __name__ == "__main__":
    main()
