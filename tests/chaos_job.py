"""A job that is abused and then counted: its shards, its command, and what of it is to be seen at any moment."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from containers import write_tar
from pictures import jpeg

from pipeline import readers, versions
from pipeline.errors import StorageError
from pipeline.output import Root

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = 24  # different ones; shards hold them again and again under other keys


@dataclass
class Score:
    """What an abuse came to. All but the first three must be 0."""

    abuses: int = 0
    samples: int = 0
    files_looked_at: int = 0
    lost: int = 0
    duplicated: int = 0
    half_files: int = 0
    wrong: list[str] = field(default_factory=list)  # whatever else was not as promised
    told: dict[str, Any] = field(default_factory=dict)  # figures of this abuse alone

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicated or self.half_files or self.wrong)

    def expect(self, what: str, holds: bool) -> None:
        if not holds:
            self.wrong.append(what)


class Job:
    """So many shards of so many images and one broken one each; `start` runs the real command on them."""

    def __init__(self, folder: Path, shards: int = 24, images: int = 40, output: str | None = None):
        self.input, self.output = folder / "in", output or str(folder / "out")
        made = [jpeg(90, 70, seed=seed) for seed in range(IMAGES)]
        for s in range(shards):
            members = {f"{i:04d}.jpg": made[(s + i) % IMAGES] for i in range(images)}
            write_tar(self.input / f"s{s:03d}.tar", members | {"broken.jpg": b"\xff\xd8\xff no"})
        keys = [f"{i:04d}" for i in range(images)] + ["broken"]
        self.ids = {f"s{s:03d}/{key}" for s in range(shards) for key in keys}
        self.runs = 0

    def command(self, *more: object) -> list[str]:
        asked: list[object] = ["embed", "--input", self.input, "--output", self.output, "--model", "pit_ti_224"]
        asked += ["--weights", "random:0", "--precision", "fp32", "--batch-size", 2, "--max-reject-rate", 0.1, "--json"]
        return [sys.executable, "-m", "jobs", *map(str, [*asked, *more])]

    def start(self, *more: object, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        """In a process group of its own; what it says is read with `ended`."""
        self.runs += 1
        return subprocess.Popen(
            self.command(*more),
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | (env or {}),
            cwd=REPOSITORY,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, score: Score, *more: object) -> dict[str, Any]:
        """The same command, undisturbed: it must commit. Then every id is counted."""
        code, told, said = ended(self.start(*more))
        score.expect(f"the last run ended with {code}: {said[-500:]}", code == 0)
        self.count(score)
        return told

    def published(self) -> int:
        """Shards whose embeddings can be seen."""
        return sum("/embeddings/" in name for name in Root(self.output).list("sets"))

    def look(self, score: Score) -> None:
        """Reads every file that can be seen under a final name, to its last page, and what readers are offered."""
        root = Root(self.output)
        for name in root.list("sets"):
            if name.endswith(".parquet"):
                score.files_looked_at += 1
                try:
                    with root.open(name) as file:
                        pq.ParquetFile(file, page_checksum_verification=True).read()
                    if "/embeddings/" in name:
                        versions.read_files(root, name)
                except (OSError, StorageError, ValueError) as e:
                    score.half_files += 1
                    score.wrong.append(f"{name}: {e}")
        for number in versions.numbers(root):
            readers.files(self.output, version=number)

    def count(self, score: Score) -> None:
        """Compares the current version's ids with the input's, and `verify` with both."""
        self.look(score)
        found = Counter[str]()
        for kind in ("embeddings", "rejects"):
            table = readers.open_dataset(self.output, kind=kind).to_table(columns=["id"])
            found.update(table["id"].to_pylist())
        score.samples += len(self.ids)
        score.lost += len(self.ids - found.keys())
        score.duplicated += sum(n - 1 for n in found.values())
        score.expect(f"ids out of nowhere: {sorted(found.keys() - self.ids)[:3]}", found.keys() <= self.ids)
        asked = [sys.executable, "-m", "jobs", "verify", self.output, "--input", str(self.input), "--json"]
        checked = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True)
        score.expect(f"verify: {checked.stderr[-500:]}", checked.returncode == 0)

    def rows(self) -> list[dict[str, Any]]:
        return list(readers.open_dataset(self.output).to_table().sort_by("id").to_pylist())


def ended(run: "subprocess.Popen[str]", timeout_s: float = 600) -> tuple[int, dict[str, Any], str]:
    """(exit code, the object of `--json` or nothing, stderr) once it has ended; 124 where it had to be killed."""
    try:
        out, err = run.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(run)
        return 124, {}, f"did not end in {timeout_s:.0f} s"
    last = out.splitlines()[-1:] or ["{}"]
    return run.returncode, json.loads(last[0]), err


def kill_all(run: "subprocess.Popen[str]") -> None:
    """SIGKILL for the whole process group, as when a machine goes."""
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def workers_of(pid: int, name: str = "ray::EmbedShards") -> list[int]:
    """The processes that Ray calls so below this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name.encode() in path.read_bytes() and pid in _ancestors(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def _ancestors(pid: int) -> list[int]:
    parents = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        parents.append(pid)
    return parents
