"""What `gpu.py` measures: each part runs in a process of its own, and what it returns goes into the results."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tests")]

SHARD_IMAGES = 1000
BATCH = 256  # of the decoders alone
QUEUED = 8  # batches before the device


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every part is told."""

    folder: str  # scratch, with `photos/0.tar`
    device: str
    processes: int  # on the GPU
    threads: int  # that decode, of each
    measure_s: float
    plain: bool  # processes, even where Ray is


def jpegs(photos: Path) -> Iterator[bytes]:
    for path in sorted(photos.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            yield path.read_bytes()
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.lower().endswith((".jpg", ".jpeg")):
                        yield tar.extractfile(member).read()  # type: ignore[union-attr]


def tests(setting: Setting) -> dict[str, Any]:
    """The tests that are marked `gpu`, in the files that have any."""
    files = [str(f) for f in sorted((HOME / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    told = [
        line for line in lines if line.startswith(("FAILED", "ERROR", "E  ")) or " bound" in line or " levels " in line
    ]
    return {"exit_code": run.returncode, "summary": lines[-1] if lines else run.stderr[-300:], "told": told[:60]}


def decode(setting: Setting, how: str) -> dict[str, Any]:
    """Images a second of one decoder with all cores, nothing else running; on the device with all processes."""
    if how == "cuda" and setting.device != "cuda":
        raise RuntimeError("needs a CUDA device")
    rates = _together(setting, _decode_alone, how)
    return {"images_per_s": sum(r["images_per_s"] for r in rates), "gpu_percent": rates[0]["gpu_percent"]}


def _decode_alone(setting: Setting, slot: int, wait: Callable[[], None], how: str) -> dict[str, Any]:
    import made
    import torch

    from pipeline.cuda_images import DeviceImages, HeaderDecoder
    from pipeline.images import Decoder

    torch.set_num_threads(1)
    preprocessing = made.vector_set("pit_ti_224").preprocessing
    data = list(jpegs(Path(setting.folder) / "photos"))[:SHARD_IMAGES]
    headers = HeaderDecoder(preprocessing)
    one: Callable[[bytes], Any] = headers if how == "cuda" else Decoder(preprocessing, how=how)
    done = 0
    with ThreadPoolExecutor(setting.threads) as pool:
        batch = data[:BATCH]
        device = DeviceImages(preprocessing, torch.device("cuda", 0), headers.cpu) if how == "cuda" else None
        list(pool.map(one, batch[: 4 * setting.threads]))
        if device:
            device([headers(d) for d in batch])
        wait()
        with utilization(slot) as gpu:
            started = time.perf_counter()
            while time.perf_counter() - started < setting.measure_s:
                decoded = list(pool.map(one, batch))
                if device:
                    device(decoded)
                    torch.cuda.synchronize()
                done += len(batch)
            seconds = time.perf_counter() - started
    return {"images_per_s": done / seconds, "gpu_percent": gpu.mean}


def ceiling(setting: Setting, model: str, engine: str) -> dict[str, Any]:
    """Images a second of one process whose batches are on the device already; the batch size is found, and kept."""
    import oracle
    import torch

    from pipeline.backbone import Backbone

    has_engines = "engine" in inspect.signature(Backbone).parameters
    if engine != "eager" and not has_engines:
        raise RuntimeError("this version has no engines")
    options = {"engine": engine} if has_engines else {}
    started = time.perf_counter()
    precision = "bf16" if setting.device == "cuda" else "fp32"
    backbone = Backbone(oracle.module(model), device=setting.device, precision=precision, **options)  # type: ignore[arg-type]
    found_s = time.perf_counter() - started
    size = (backbone.batch_size, *backbone.preprocessing.input_size)
    batches = [torch.randint(0, 256, size, dtype=torch.uint8, device=backbone.device) for _ in range(3)]
    for images in batches:
        backbone(images).to_numpy()
    done, queued, started = 0, deque[Any](), time.perf_counter()
    while time.perf_counter() - started < setting.measure_s:
        backbone(batches[done % len(batches)])
        done += 1
        if setting.device == "cuda":  # waits for the oldest of several, so that the device never waits for us
            queued.append(torch.cuda.Event(blocking=True))
            queued[-1].record()
            if len(queued) == QUEUED:
                queued.popleft().synchronize()
    if queued:
        queued[-1].synchronize()
    seconds = time.perf_counter() - started
    layout = "channels_last" if getattr(backbone, "_layout", None) == torch.channels_last else "NCHW"
    rate = done * backbone.batch_size / seconds
    return {"images_per_s": rate, "batch": backbone.batch_size, "layout": layout, "found_s": found_s}


def end(setting: Setting, model: str, how: str, images: int) -> dict[str, Any]:
    """From tars to Parquet: the command line where Ray is, else plain processes."""
    if how == "cuda" and setting.device != "cuda":
        raise RuntimeError("needs a CUDA device")
    inputs, output = Path(setting.folder) / "in", Path(setting.folder) / "out"
    for folder in (inputs, output):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    shards = setting.processes * max(2, round(images / SHARD_IMAGES / setting.processes))
    for i in range(shards):  # one file under many names: nothing more to write, and read from memory each time
        os.link(Path(setting.folder) / "photos" / "0.tar", inputs / f"{i:04d}.tar")
    if not setting.plain and importlib.util.find_spec("ray"):
        return _by_command(setting, model, how, inputs, output)
    told = _together(setting, _embed_share, model, how)
    return _rates(setting, [receipt for t in told for receipt in t["receipts"]], told[0])


def _by_command(setting: Setting, model: str, how: str, inputs: Path, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs", "embed", "--input", str(inputs), "--output", str(output), "--json"]
    command += ["--model", model, "--weights", "random:0", "--decode", how, "--device", setting.device]
    command += ["--precision", "bf16" if setting.device == "cuda" else "fp32", "--actors", str(setting.processes)]
    with utilization(0) as gpu:
        run = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-500:])
    said = json.loads(run.stdout.splitlines()[-1])
    return {
        "by": "command line, Ray",
        "images": said["rows"],
        "images_per_s": said["images_per_s"],
        "limited_by": said["limited_by"],
        "speed": said["speed"],
        "busy_percent": None if said.get("device_busy") is None else 100 * said["device_busy"],
        "gpu_percent": gpu.busiest,
        "stage_seconds": said["stage_seconds"],
    }


def _embed_share(setting: Setting, slot: int, wait: Callable[[], None], model: str, how: str) -> dict[str, Any]:
    """As an actor does it, with every n-th shard."""
    import made
    import torch

    from pipeline.listing import list_shards

    torch.set_num_threads(1)
    cuda = setting.device == "cuda"
    job = made.job(Path(setting.folder) / "out", model=model, decode=how, precision="bf16" if cuda else "fp32")
    job = dataclasses.replace(job, decode_threads=setting.threads, device=setting.device)
    options: dict[str, Any] = {"precision": job.vectors.precision, "device": setting.device, "batch_size": None}
    embedder = made.embedder(job, **options, **({"share": 1 / setting.processes} if cuda else {}))
    shards = list_shards([str(Path(setting.folder) / "in")])
    wait()
    with utilization(slot) as gpu:
        receipts = made.receipts(embedder, shards[slot :: setting.processes])
    if errors := [r.error for r in receipts if r.error]:
        raise RuntimeError(errors[0])
    return {"receipts": receipts, "gpu_percent": gpu.busiest, "batch": embedder.backbone.batch_size}


def _rates(setting: Setting, receipts: list[Any], first: dict[str, Any]) -> dict[str, Any]:
    from pipeline.machine import cores
    from pipeline.speed import Means, Sums

    sums = Sums()
    for receipt in receipts:
        sums.add(receipt)
    gpus = 1 / setting.processes if setting.device == "cuda" else 0.0
    told = sums.speed(Means(cores=cores(), threads=setting.threads, gpus=gpus))
    return {
        "by": "plain processes",
        "images": sum(r.files.counts.rows for r in receipts),
        "images_per_s": told.images_per_s,
        "limited_by": told.limited_by,
        "speed": told.sentence,
        "busy_percent": None if told.device_busy is None else 100 * told.device_busy,
        "gpu_percent": first["gpu_percent"],
        "batch": first["batch"],
        "stage_seconds": sums.stage_seconds,
    }


# running them


def _together(setting: Setting, run: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
    """`run` in as many processes as there would be actors, which begin to measure at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(setting.processes), context.SimpleQueue()
    processes = [
        context.Process(target=_one_of_them, args=(run, setting, slot, barrier, found, args))
        for slot in range(setting.processes)
    ]
    for process in processes:
        process.start()
    told = []
    while len(told) < len(processes):
        if found.empty() and not any(p.is_alive() for p in processes):
            raise RuntimeError(f"processes died: {[p.exitcode for p in processes]}")
        if found.empty():
            time.sleep(0.05)
        else:
            told.append(found.get())
    for process in processes:
        process.join()
    if errors := [error for _, _, error in told if error]:
        raise RuntimeError(errors[0])
    return [result for _, result, _ in sorted(told, key=lambda t: t[0])]


def _one_of_them(run: Any, setting: Setting, slot: int, barrier: Any, found: Any, args: tuple[Any, ...]) -> None:
    try:
        found.put((slot, run(setting, slot, barrier.wait, *args), None))
    except Exception as e:  # whatever it is belongs in the table
        barrier.abort()
        found.put((slot, None, f"{type(e).__name__}: {e}"))


class utilization:
    """What nvidia-smi says of the GPU, twice a second, in the first process: None where it is not to be had."""

    mean: float | None = None
    busiest: float | None = None  # the mean of the upper half: without the start and the end

    def __init__(self, slot: int):
        self._slot, self._process = slot, None

    def __enter__(self) -> "utilization":
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
        if self._slot == 0:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        said, _ = self._process.communicate()
        values = sorted(int(line) for line in said.splitlines() if line.strip().isdigit())
        if values:
            self.mean = sum(values) / len(values)
            upper = values[len(values) // 2 :]
            self.busiest = sum(upper) / len(upper)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"tests": tests, "decode": decode, "ceiling": ceiling, "end": end}
