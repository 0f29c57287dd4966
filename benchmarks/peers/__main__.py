"""shard2vec side by side with what else embeds images: same photos, model, weights and precision, in turns.

    python -m benchmarks.peers --photos DIR [--cases a,b] [--rounds 5] [--repeat N] [--only peer,peer] [--out FILE]

Each peer is a script of this folder and runs as a process of its own. Steady: from the first read to the last row
written, without start-up. All-in: the whole process. The reference, 1.00, is two plain processes (one a core) with the
same decode: timm's own for the others, shard2vec's for shard2vec. A run whose vectors are wrong counts as failed.
"""

import argparse
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

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
    """One table. `repeat`: how often each photo is used, so that shard2vec works for some seconds."""

    model: str
    repeat: int = 1
    size: tuple[int, int] | None = None  # of the photos, width and height; None: as they are
    threads: int = os.cpu_count() or 1  # of the one model in peers whose other processes do the decoding


CASES = {
    "pit_ti": Case("pit_ti_224", repeat=4),  # the forward pass is the limit
    # timm's lightest, 160 pixels: decoding and the forward pass take about as long. It is too small to gain from
    # threads, which only take the cores from the decoding.
    "test_vit": Case("test_vit", repeat=20, threads=1),
    # … and four times as many pixels to decode, so that feeding is the limit.
    "large_photos": Case("test_vit", repeat=8, size=(1024, 768), threads=1),
}
QUALITY = 90  # of the photos in another size


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


def prepare(photos: Path, case: Case, scratch: Path) -> tuple[Path, Path]:
    """A folder of tars and one of the images as files: each tar so many times, as links under other names."""
    tars, files, repeat = scratch / "tars", scratch / "files", case.repeat
    for folder in (tars, files):
        folder.mkdir(parents=True)
    for path in sorted(photos.glob("*.tar")):
        copy = scratch / "copy.tar"
        with tarfile.open(path) as tar:
            images = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
        if case.size is None:
            shutil.copy(path, copy)
        else:
            images = {name: resized(data, case.size) for name, data in images.items()}
            write_tar(copy, images)
        for i in range(repeat):
            os.link(copy, tars / f"{path.stem}-{i:03}.tar")
            (files / f"{path.stem}-{i:03}").mkdir()
            for name, data in images.items():
                first, link = files / f"{path.stem}-000" / name, files / f"{path.stem}-{i:03}" / name
                os.link(first, link) if i else link.write_bytes(data)
        Path(copy).unlink()
    return tars, files


def resized(jpeg: bytes, size: tuple[int, int]) -> bytes:
    """The photo in so many pixels, upright ones turned that way round."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    size = size if image.width >= image.height else size[::-1]
    found = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(found, "JPEG", quality=QUALITY)
    return found.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


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
    names = [peer.name for peer in peers_for(CASES["pit_ti"])]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", type=Path, required=True, help="a folder of WebDataset tars of .jpg, without folders in them"
    )
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, help="use each photo so many times")
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=",".join(names))
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    flags = parser.parse_args()
    for flag, asked_for, known in (("--only", flags.only, names), ("--cases", flags.cases, list(CASES))):
        if unknown := set(asked_for) - set(known):
            parser.error(f"{flag} {','.join(sorted(unknown))}: choose from {','.join(known)}")
    if not any(flags.photos.glob("*.tar")):
        parser.error(f"--photos {flags.photos}: no .tar is there")
    return flags


def main() -> None:
    flags = asked()
    precision = resolve_precision("auto", "cpu")
    figures = {"machine": machine(), "precision": precision, "cases": {}}
    for name in flags.cases:
        case = replace(CASES[name], repeat=flags.repeat or CASES[name].repeat)
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            peers = [peer for peer in peers_for(case) if peer.name in flags.only]
            tars, files = prepare(flags.photos, case, Path(folder))
            job = Job(tars=tars, files=files, output=Path(folder) / "out", model=case.model, precision=precision)
            runs = rounds(peers, job, flags.rounds)
        rows = [Row(peer.title, runs[peer.name], runs.get(peer.reference, ())) for peer in peers]
        size = f", photos of {case.size[0]}x{case.size[1]}" if case.size else ""
        print(f"\n`{case.model}`{size}, {precision}, {flags.rounds} rounds, {figures['machine']}\n\n{markdown(rows)}\n")
        sys.stdout.flush()
        figures["cases"][name] = asdict(case) | {
            "peers": {peer.name: {"command": peer.command, "runs": [*map(asdict, runs[peer.name])]} for peer in peers},
        }
        if flags.out:
            flags.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
