"""What every peer is given and tells: its job on the command line, time marks between processes, one line of JSON.

A peer's output is Parquet with id (`<tar's name>/<key>`), embedding, topk_index and topk_score, written the way its
documentation does it. Its steady seconds go from the first read to the last row written, with imports done and the
model loaded.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

BATCH = 32
TOP = 5
STARTED = "PEER_STARTED"  # environment: when the runner started the process, seconds since 1970


@dataclass(frozen=True, kw_only=True)
class Job:
    """`tars` and `files` hold the same images: WebDataset tars, and `<tar's name>/<key>.jpg`."""

    tars: Path
    files: Path
    output: Path  # a folder, empty
    model: str
    precision: str  # fp32 or bf16

    def flags(self) -> list[str]:
        return [part for name, value in asdict(self).items() for part in (f"--{name}", str(value))]

    def shards(self) -> list[str]:
        return sorted(map(str, self.tars.glob("*.tar")))


def job_flags(description: str | None) -> argparse.ArgumentParser:
    """A peer's command line; its own settings are added to it."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("tars", "files", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", required=True)
    return parser


def job_of(asked: argparse.Namespace) -> Job:
    return Job(**{name: getattr(asked, name) for name in Job.__dataclass_fields__})


def mark(job: Job, name: str) -> None:
    """Notes the time of an event in this process, for `marked` in any other."""
    (job.output / f".{name}-{os.getpid()}").write_text(repr(time.time()))


def marked(job: Job, name: str) -> list[float]:
    return [float(path.read_text()) for path in job.output.glob(f".{name}-*")]


def tell(steady_s: float, first: float, vectors: str = "**/*.parquet") -> None:
    """Prints what the runner reads. `first`: when the first row was there, seconds since 1970; `vectors`: a glob."""
    told = {"steady_s": steady_s, "first_row_s": first - float(os.environ[STARTED]), "vectors": vectors}
    print(json.dumps(told), flush=True)
