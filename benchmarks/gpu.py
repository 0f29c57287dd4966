"""One GPU and its cores, in one call without a network and within nine minutes: tests, ceilings, decoders, end to end.

    python benchmarks/gpu.py [--out DIR] [--photos DIR] [--models a,b] [--minutes 9] [--parts tests,end]
    python benchmarks/gpu.py --smoke            the same on the CPU with next to nothing, to see that it runs

Needs what the package needs but for Ray. Where that can be imported, end to end is the command line; else it is as many
plain processes as there would be actors, each with the same embedder, feed and share of the device. On a machine
without a network, Ray and what else is missing come as wheels, fetched elsewhere for its Python:

    pip download --only-binary=:all: --python-version 3.12 --dest wheels ray simplejpeg stamina braceexpand
    pip install --no-index --find-links wheels ray simplejpeg stamina braceexpand

For each model, with seeded weights in bf16: the ceiling (batches on the device already, nothing else), and the rate of
JPEG tars on a local disk with each decoder, as a share of the ceiling; how busy the device was by its own events and by
nvidia-smi, and what limited. Each part is a process of its own with its own time: what fails or takes too long is said
in the table, and the rest goes on. Writes gpu.json and gpu.md to --out, $OUT or here, anew after each part.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, SHARD_IMAGES, Setting, jpegs

MODELS = (
    "convit_base.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "pit_b_224",
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",
    "pit_ti_224",
)
# In the order of what is wanted most, should time run out; images/s that 16 cores or an A100 are known for.
DECODES = {"fast": 12_600, "cuda": 7_800, "exact": 6_000}
END_S = 8  # about, of a run from end to end, by the ceilings
DISTINCT, WIDTH, HEIGHT, QUALITY = 200, 500, 375, 88  # of the pictures where there are no photos
SECONDS = {"tests": 150, "decode": 60, "ceiling": 60, "end": 60, "compile": 120}  # at most, of one part


def write_photos(folder: Path, photos: Path | None, images: int) -> None:
    """`0.tar`: so many JPEGs, those of `photos` (files, or in tars) over and over, or pictures made here."""
    several = list(jpegs(photos)) if photos else []
    if not several:
        with multiprocessing.get_context("spawn").Pool() as pool:
            several = pool.map(_picture, range(min(DISTINCT, images)), chunksize=4)
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, data in zip(range(images), itertools.cycle(several), strict=False):
            header = tarfile.TarInfo(f"{i:06d}.jpg")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def _picture(seed: int) -> bytes:
    from jobs.pictures import LOOKS, photo

    sink = io.BytesIO()
    photo(LOOKS[seed % len(LOOKS)], seed, WIDTH, HEIGHT).save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


class Results:
    """What is known so far, in two files."""

    def __init__(self, out: Path, setting: Setting, until: float):
        self.parts: dict[str, dict[str, Any]] = {}
        self._out, self._setting, self._until = out, setting, until

    def run(self, name: str, *args: Any, at_most: float) -> dict[str, Any]:
        """The part's result, or `{"error": …}`; it has its own process group, of which nothing is left."""
        key, left = " ".join(map(str, (name, *args))), self._until - time.monotonic()
        started = time.monotonic()
        if left < 10:
            found: dict[str, Any] = {"error": "no time was left"}
        else:
            told = json.dumps([name, dataclasses.asdict(self._setting), args])
            command = [sys.executable, str(Path(__file__).resolve()), "--part", told]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                said, errors = process.communicate(timeout=min(at_most, left))
                found = json.loads(said.splitlines()[-1]) if said.strip() else {"error": errors[-600:]}
            except ValueError:  # it died while it printed, or something beneath it prints too
                found = {"error": f"its last line is no JSON: {said.splitlines()[-1][:200]} {errors[-400:]}"}
            except subprocess.TimeoutExpired:
                found = {"error": f"took more than {min(at_most, left):.0f} s"}
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        self.parts[key] = found | {"seconds": round(time.monotonic() - started, 1)}
        print(key, json.dumps({k: v for k, v in self.parts[key].items() if k != "stage_seconds"}), flush=True)
        self.write()
        return found

    def write(self) -> None:
        (self._out / "gpu.json").write_text(json.dumps({"machine": machine(), "parts": self.parts}, indent=1))
        (self._out / "gpu.md").write_text(self.table())

    def table(self) -> str:
        setting, rows = self._setting, []
        for key, part in self.parts.items():
            kind, *args = key.split()
            best = self.best(args[0]) if kind == "end" else 0.0
            rate, share = part.get("images_per_s"), part.get("images_per_s", 0.0) / best if best else 0.0
            cells = [
                " ".join([kind, *args[:2]]),
                part.get("error", part.get("summary", "")).replace("\n", " ").replace("|", "/")[:160]
                if rate is None
                else f"{rate:,.0f}",
                f"{share:.0%}" if share else "",
                *(f"{part[k]:.0f} %" if part.get(k) is not None else "" for k in ("busy_percent", "gpu_percent")),
                part.get("limited_by", ""),
                " ".join(str(part[k]) for k in ("batch", "layout", "by") if k in part),
            ]
            rows.append(f"| {' | '.join(cells)} |")
        head = "| part | images/s | of the ceiling | device's events | nvidia-smi | limited by | setting |"
        facts = f"{machine()}; {setting.processes} processes on the GPU with {setting.threads} decoding threads each"
        return "\n".join([facts, "", head, "| --- | --- | --- | --- | --- | --- | --- |", *rows, ""])

    def best(self, model: str) -> float:
        """The model's ceiling: the faster engine's, 0 where there is none."""
        rates = [part.get("images_per_s", 0.0) for key, part in self.parts.items() if f"ceiling {model} " in key]
        return max(rates, default=0.0)


@cache
def machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{time.strftime('%Y-%m-%d')}, {gpu}, {os.cpu_count()} cores, {versions}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    flags.add_argument("--photos", type=Path, help="a folder of JPEGs, or of tars with them")
    flags.add_argument("--models", default=",".join(MODELS))
    flags.add_argument("--minutes", type=float, default=9)
    flags.add_argument("--parts", default=",".join(SECONDS), help="some of: %(default)s")
    flags.add_argument("--plain", action="store_true", help="plain processes, even where Ray is")
    flags.add_argument("--smoke", action="store_true")
    flags.add_argument("--part", help=argparse.SUPPRESS)
    asked = flags.parse_args()
    if asked.part:
        name, setting, args = json.loads(asked.part)
        try:
            found = PARTS[name](Setting(**setting), *args)
        except Exception as e:  # whatever it is belongs in the table
            found = {"error": f"{type(e).__name__}: {e}"[:600]}
        print(json.dumps(found))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    cores = os.cpu_count() or 1
    processes = 2 if asked.smoke else max(1, min(4, cores // 5))  # as `actors.size` has it; that one needs Ray
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHARD2VEC_CACHE"] = str(Path(folder) / "cache")
        setting = Setting(
            folder=folder,
            device="cpu" if asked.smoke else "cuda",
            processes=processes,
            threads=max(1, cores // processes),
            measure_s=0.5 if asked.smoke else 4.0,
            plain=asked.plain,
        )
        results = Results(asked.out, setting, time.monotonic() + 60 * asked.minutes)
        write_photos(Path(folder) / "photos", asked.photos, 60 if asked.smoke else SHARD_IMAGES)
        measure(results, ["test_vit"] if asked.smoke else asked.models.split(","), set(asked.parts.split(",")))
        results.write()
        print(f"\n{results.table()}")


def measure(results: Results, models: list[str], parts: set[str]) -> None:
    """What is wanted most first."""
    if "tests" in parts:
        results.run("tests", at_most=SECONDS["tests"])
    for model in models if "ceiling" in parts else ():
        results.run("ceiling", model, "eager", at_most=SECONDS["ceiling"])
    for how in DECODES if "decode" in parts else ():
        results.run("decode", how, at_most=SECONDS["decode"])
    for how in DECODES if "end" in parts else ():
        rate = results.parts.get(f"decode {how}", {}).get("images_per_s", DECODES[how])
        for model in models:
            images = round(END_S * min(results.best(model) or rate, rate))
            results.run("end", model, how, images, at_most=SECONDS["end"])
    for model in models if "compile" in parts else ():
        results.run("ceiling", model, "compile", at_most=SECONDS["compile"])


if __name__ == "__main__":
    main()
