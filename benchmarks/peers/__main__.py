"""shard2vec side by side with what else embeds images: same photos, model, weights and precision, in turns.

    python -m benchmarks.peers --photos DIR [--models a,b] [--rounds 5] [--repeat N] [--only peer,peer] [--out FILE]

Each peer is a script of this folder and runs as a process of its own. Steady: from the first read to the last row
written, without start-up. All-in: the whole process. The reference, 1.00, is two plain processes (one a core) with the
same decode: timm's own for the others, shard2vec's for shard2vec. A run whose vectors are wrong counts as failed.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.job import Job
from benchmarks.peers.measure import measure
from benchmarks.peers.table import Row, Run, markdown
from benchmarks.peers.vectors import Oracle
from pipeline.backbone import resolve_precision
from pipeline.config import RunConfig

HOME = Path(__file__).resolve().parent.parent.parent
DAFT_PYTHON = HOME / ".venv-peers/bin/python"  # .venv's packages, below Daft and the older pyarrow that it demands
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Case:
    """A model's own settings. `repeat`: how often each photo is used, so that shard2vec works for some seconds."""

    repeat: int = 1
    threads: int = os.cpu_count() or 1  # of the one model in peers whose other processes do the decoding


MODELS = {
    "pit_ti_224": Case(repeat=4),  # the forward pass is the limit
    # timm's lightest: 160 pixels, 1,300 images/s a core in bf16, so feeding is the limit. Its forward pass is too small
    # to gain from threads, which only take the cores from the decoding.
    "test_vit": Case(repeat=20, threads=1),
}


@dataclass(frozen=True)
class Peer:
    name: str
    title: str
    command: tuple[str, ...]  # its module here, and its settings
    reference: str = "two"  # the plain processes with the same decode
    python: Path = Path(sys.executable)


def peers_for(case: Case) -> list[Peer]:
    ours, cores = RunConfig.decode, str(os.cpu_count())
    plain, threads = ("plain", "--processes", cores), ("--threads", str(case.threads))
    peers = [
        Peer("two", f"{cores} plain processes", plain),
        Peer("two-ours", f"{cores} plain processes, shard2vec's {ours} decode", (*plain, "--decode", ours), "two-ours"),
        Peer("loop", "plain timm loop", ("plain", "--threads", cores)),
        Peer("loader", "torch DataLoader + webdataset", ("loader", *threads)),
        Peer("ray-images", "Ray Data, its documentation's script", ("ray_images", *threads)),
        Peer("ray-webdataset", "Ray Data, `read_webdataset`", ("ray_webdataset", *threads)),
        Peer("daft", "Daft", ("daft_udf",), python=DAFT_PYTHON),
        Peer("datasets", "Hugging Face datasets `map`", ("datasets_map",)),
        Peer("shard2vec", f"**shard2vec** ({ours} decode)", ("shard2vec",), "two-ours"),
        Peer("shard2vec-exact", "**shard2vec** (`--decode exact`)", ("shard2vec", "--decode", "exact")),
    ]
    return peers if ours != "exact" else peers[:-1]  # the last one is the same then


def prepare(photos: Path, repeat: int, scratch: Path) -> tuple[Path, Path]:
    """A folder of tars and one of the images as files: each tar so many times, as links under other names."""
    tars, files = scratch / "tars", scratch / "files"
    for folder in (tars, files):
        folder.mkdir(parents=True)
    for path in sorted(photos.glob("*.tar")):
        copy = shutil.copy(path, scratch / "copy.tar")
        with tarfile.open(copy) as tar:
            images = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
        for i in range(repeat):
            os.link(copy, tars / f"{path.stem}-{i:03}.tar")
            (files / f"{path.stem}-{i:03}").mkdir()
            for name, data in images.items():
                first, link = files / f"{path.stem}-000" / name, files / f"{path.stem}-{i:03}" / name
                os.link(first, link) if i else link.write_bytes(data)
        Path(copy).unlink()
    return tars, files


def run_peer(peer: Peer, job: Job, oracle: Oracle) -> Run:
    """One run, its vectors checked; what it wrote is removed."""
    job.output.mkdir()
    command = [str(peer.python), "-m", f"benchmarks.peers.{peer.command[0]}", *job.flags(), *peer.command[1:]]
    done = measure(command, TIMEOUT_S, HOME)
    try:
        failure = done.failure or oracle.objection(sorted(job.output.glob(done.told["vectors"])))
    except (OSError, ValueError, KeyError) as e:
        failure = f"vectors that cannot be read: {e}"
    shutil.rmtree(job.output)
    if failure:
        return Run(failure=failure)
    images = len(oracle.ids)
    return Run(
        images_per_s=images / done.told["steady_s"],
        all_in_images_per_s=images / done.all_in_s,
        first_row_s=done.told["first_row_s"],
        peak_mb=done.peak_mb,
    )


def rounds(peers: Sequence[Peer], job: Job, count: int) -> dict[str, list[Run]]:
    """All peers in turns, so often."""
    oracle = Oracle(job)
    runs: dict[str, list[Run]] = {peer.name: [] for peer in peers}
    print(f"{job.model}, {job.precision}, {len(oracle.ids)} images", file=sys.stderr, flush=True)
    for i in range(count):
        for peer in peers:
            run = run_peer(peer, job, oracle)
            runs[peer.name].append(run)
            told = run.failure or f"{run.images_per_s:.1f} images/s, {run.all_in_images_per_s:.1f} all-in"
            print(f"{time.strftime('%H:%M:%S')} round {i + 1}/{count} {peer.name}: {told}", file=sys.stderr, flush=True)
    return runs


def machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"


def asked() -> argparse.Namespace:
    names = [peer.name for peer in peers_for(Case())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", type=Path, required=True, help="a folder of WebDataset tars of .jpg, without folders in them"
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, help="use each photo so many times")
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=",".join(names))
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    flags = parser.parse_args()
    if unknown := set(flags.only) - set(names):
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {','.join(names)}")
    if not any(flags.photos.glob("*.tar")):
        parser.error(f"--photos {flags.photos}: no .tar is there")
    return flags


def main() -> None:
    flags = asked()
    precision = resolve_precision("auto", "cpu")
    figures = {"machine": machine(), "precision": precision, "models": {}}
    for model in flags.models:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            case = MODELS.get(model, Case())
            peers = [peer for peer in peers_for(case) if peer.name in flags.only]
            repeat = flags.repeat or case.repeat
            tars, files = prepare(flags.photos, repeat, Path(folder))
            job = Job(tars=tars, files=files, output=Path(folder) / "out", model=model, precision=precision)
            runs = rounds(peers, job, flags.rounds)
        rows = [Row(peer.title, runs[peer.name], runs.get(peer.reference, ())) for peer in peers]
        title = f"`{model}`, {precision}, {flags.rounds} rounds, {figures['machine']}"
        print(f"\n{title}\n\n{markdown(rows)}\n", flush=True)
        figures["models"][model] = {
            "repeat": repeat,
            "peers": {peer.name: {"command": peer.command, "runs": [*map(asdict, runs[peer.name])]} for peer in peers},
        }
        if flags.out:
            flags.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
