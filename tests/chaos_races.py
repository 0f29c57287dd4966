"""Runs that meet each other, places that stop taking files, and workers that never come: each ends, and rightly."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos_job import Job, Score, ended, workers_of
from containers import write_tar
from pictures import jpeg
from poison import environment, poison

from pipeline import readers, versions
from pipeline.output import Root

SMALL_BYTES = 256 * 1024  # of a disk that is full before the job is done
NEVER = """
import os, signal, sys
if sys.argv and "default_worker" in sys.argv[0]:
    class Killer:
        def find_spec(self, name, *rest):
            if name == "pipeline.weights":  # imported where the model is loaded
                os.kill(os.getpid(), signal.SIGKILL)
    sys.meta_path.insert(0, Killer())
"""


def drivers(folder: Path, rng: random.Random, rounds: int) -> Score:
    """Two drivers on one output, the second begun at a random moment of the first: both end with 0, one version."""
    score = Score()
    for n in range(rounds):
        job = Job(folder / str(n), shards=16)
        first = job.start("--actors", 1)
        time.sleep(rng.uniform(0, 12))
        second = job.start("--actors", 1)
        for name, run in (("first", first), ("second", second)):
            code, _, said = ended(run)
            score.expect(f"the {name} driver ended with {code}: {said[-300:]}", code == 0)
        score.abuses += 1
        job.count(score)
        score.expect("more than one version", versions.numbers(Root(job.output)) == [1])
    return score


def zombies(folder: Path, rng: random.Random, rounds: int) -> Score:
    """All processes of a run are stopped, another run ends the job, then the first ones go on as if nothing were.

    In every other round the input has changed meanwhile: what the zombie listed must not come back.
    """
    score = Score()
    late = 0
    for n in range(rounds):
        job = Job(folder / str(n), shards=16)
        zombie = job.start("--actors", 2)
        time.sleep(rng.uniform(8, 16))
        if zombie.poll() is not None:
            ended(zombie)
            continue
        os.killpg(zombie.pid, signal.SIGSTOP)
        if n % 2:
            (job.input / "s003.tar").unlink()
            job.ids = {i for i in job.ids if not i.startswith("s003/")}
        job.finish(score)
        before = _contents(job)
        os.killpg(zombie.pid, signal.SIGCONT)
        code, told, said = ended(zombie)
        score.expect(f"the zombie ended with {code}: {said[-300:]}", code == n % 2)
        late += told.get("shards_embedded", 0)
        score.expect("the zombie changed a file", before.items() <= _contents(job).items())
        score.expect("the zombie made a version", versions.numbers(Root(job.output)) == [1])
        job.count(score)
        score.abuses += 1
    score.told = {"shards under way when stopped or later": late}
    return score


def conflicts(folder: Path, rng: random.Random, rounds: int) -> Score:
    """Two sets are committed to one output in the same moment: both become versions, each of one set only."""
    score = Score()
    for n in range(rounds):
        job = Job(folder / str(n), shards=4, images=10)
        runs = [job.start("--actors", 1), job.start("--actors", 1, "--normalize")]
        ends = [ended(run) for run in runs]
        score.expect(f"drivers ended with {[e[0] for e in ends]}", [e[0] for e in ends] == [0, 0])
        root = Root(job.output)
        made = {versions.current(root, number).set for number in versions.numbers(root)}
        score.expect(f"versions of {made}", made == {e[1].get("set") for e in ends} and len(made) == 2)
        job.count(score)
        score.abuses += 1
    return score


def disks(folder: Path, rng: random.Random, rounds: int) -> Score:
    """The output's disk is full, then read-only in the midst of a run: 1 with a sentence; with room again, 0."""
    score = Score()
    with _small_disk(folder / "disk") as disk:
        for n in range(rounds):
            job = Job(folder / str(n), shards=12, output=str(disk / str(n)))
            code, _, said = ended(job.start("--actors", 1))
            score.expect(f"full disk: {code}, {said[-300:]}", code == 1 and "No space left" in said)
            score.expect(f"a traceback: {said[-300:]}", "Traceback" not in said)
            job.look(score)
            _remount(disk, f"size={64 * 2**20}")
            there = len(_contents(job))
            run = job.start("--actors", 1)
            _wait(lambda job=job, there=there: len(_contents(job)) > there, run)  # type: ignore[misc]
            _remount(disk, "ro")
            code, _, said = ended(run)
            score.expect(f"read-only disk: {code}, {said[-300:]}", code in (0, 1) and "Traceback" not in said)
            job.look(score)
            _remount(disk, "rw")
            job.finish(score)
            shutil.rmtree(job.output)
            _remount(disk, f"size={SMALL_BYTES}")
            score.abuses += 2
    return score


def hangs(folder: Path, rng: random.Random, rounds: int) -> Score:
    """A worker that stands still ends with 4 and its stage; workers that die at their start and GPUs that nobody has
    end in bounded time too. Afterwards the same command does the job."""
    score = Score()
    for n in range(rounds):
        job = Job(folder / str(n), shards=12)
        run = job.start("--actors", 1, "--stall-timeout", 20)
        _wait(lambda run=run: bool(workers_of(run.pid)), run)  # type: ignore[misc]
        time.sleep(rng.uniform(4, 10))
        stopped = workers_of(run.pid)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        code, _, said = ended(run, 120)
        score.expect(f"a worker that stands still: {code}, {said[-300:]}", code == 4 and "in stage" in said)
        score.expect("a stopped worker outlived its run", not any(Path(f"/proc/{pid}").exists() for pid in stopped))

        (job.input / "never").mkdir()
        (job.input / "never" / "sitecustomize.py").write_text(NEVER)
        home = environment(folder / "unused")["PYTHONPATH"].rpartition(os.pathsep)[2]
        never = {"PYTHONPATH": f"{job.input / 'never'}{os.pathsep}{home}"}
        code, _, said = ended(job.start("--actors", 1, env=never), 240)
        score.expect(f"workers that die at once: {code}, {said[-300:]}", code == 1 and "died before" in said)
        shutil.rmtree(job.input / "never")

        for flags in (["--device", "cuda"], ["--gpus-per-actor", 1]):
            code, _, said = ended(job.start(*flags), 60)
            score.expect(f"{flags}: {code}, {said[-300:]}", code == 2 and len(said.strip().splitlines()) == 1)
        score.abuses += 4
        job.finish(score)
    return score


def deadly_images(folder: Path, rng: random.Random, rounds: int) -> Score:
    """Images that kill the process that decodes them, in several shards: each is one reject, and the job is done."""
    score = Score()
    for n in range(rounds):
        job = Job(folder / str(n), shards=6)
        deadly = {}
        for shard in range(3):
            members = {f"{i:04d}.jpg": jpeg(90, 70, seed=i) for i in range(20)}
            for key in rng.sample(sorted(members), 2):
                members[key] = poison(kind := rng.choice(("segfault", "out of memory", "exit")))
                deadly[f"deadly{shard}/{key.removesuffix('.jpg')}"] = kind
            write_tar(job.input / f"deadly{shard}.tar", members)
            job.ids |= {f"deadly{shard}/{key.removesuffix('.jpg')}" for key in members}
        code, _, said = ended(job.start(env=environment(folder / "poison")))
        score.expect(f"ended with {code}: {said[-300:]}", code == 0)
        rejects = readers.open_dataset(job.output, kind="rejects").to_table(columns=["id"])["id"].to_pylist()
        named = {i for i in rejects if not i.endswith("/broken")}
        score.expect(f"rejected {named}, deadly are {deadly}", named == deadly.keys())
        job.count(score)
        score.abuses += len(deadly)
    return score


def _contents(job: Job) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(job.output).rglob("*.parquet") if ".tmp" not in p.parts}


def _wait(found: Callable[[], bool], run: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while run.poll() is None and not found() and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def _small_disk(at: Path) -> Iterator[Path]:
    """A disk in memory; mounting takes root."""
    at.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "none", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def _remount(at: Path, option: str) -> None:
    """Read-only is refused for the moment in which a file is open for writing."""
    for _ in range(200):
        if not subprocess.run(["mount", "-o", f"remount,{option}", str(at)], capture_output=True).returncode:
            return
        time.sleep(0.05)
    raise RuntimeError(f"{at} could not be remounted {option}")


RACES: dict[str, tuple[Callable[[Path, random.Random, int], Score], int]] = {
    "two drivers on one output": (drivers, 4),
    "zombie wakes after the commit": (zombies, 3),
    "two sets committed at once": (conflicts, 2),
    "disk full, then read-only": (disks, 2),
    "stopped workers, dying workers, no GPU": (hangs, 1),
    "image that kills its process": (deadly_images, 2),
}
if os.geteuid() != 0 or sys.platform != "linux":
    RACES.pop("disk full, then read-only")  # a disk of a few hundred kB takes root to mount
