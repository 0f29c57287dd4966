"""Kills at random moments: the driver, its workers, the store below a run, a node of a cluster.

Between any two kills every visible file is whole; after the last one the same command ends with each id once, and the
rows have the very bits of an undisturbed run.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from chaos_job import REPOSITORY, Job, Score, ended, kill_all, workers_of
from s3_server import S3Server

UP_S = 8.0  # a driver's way to its first image on two free cores


def drivers(folder: Path, rng: random.Random, kills: int) -> Score:
    """SIGKILL for the driver alone, whose Ray must end by itself, or for all of its processes at once.

    Of four kills one falls anywhere, planning and Ray's start included, three soon after a shard was published.
    """
    score, job = Score(), Job(folder, shards=80)
    alone = embedding = 0
    while score.abuses < kills:
        run, there = job.start(), job.published()
        if is_embedding := rng.random() < 0.75:
            _wait(run, lambda there=there: job.published() > there)  # type: ignore[misc]
        until = time.monotonic() + rng.uniform(0, 2 if is_embedding else 2 * UP_S)
        _wait(run, lambda until=until: time.monotonic() >= until)  # type: ignore[misc]
        if run.poll() is not None:  # done before the kill: the next one begins with an empty output
            ended(run)
            job.count(score)
            job.output = f"{folder}/out{job.runs}"
            continue
        if rng.random() < 0.5:
            alone += 1
            run.kill()
            run.communicate()
        else:
            kill_all(run)
        score.abuses += 1
        embedding += is_embedding
        job.look(score)
    job.finish(score)
    same_as_undisturbed(job, folder, score)
    score.told = {"runs": job.runs, "driver alone": alone, "while embedding": embedding}
    return score


def _wait(run: "subprocess.Popen[str]", found: Callable[[], bool]) -> None:
    while run.poll() is None and not found():
        time.sleep(0.05)


def workers(folder: Path, rng: random.Random, kills: int) -> Score:
    """SIGKILL for embedding processes, and now and then for the board that they report to."""
    score, job = Score(), Job(folder, shards=60)
    boards = 0
    while score.abuses < kills:
        run = job.start("--actors", 2)
        while run.poll() is None and score.abuses < kills:
            time.sleep(rng.uniform(1, UP_S))
            name = "ray::Board" if rng.random() < 0.15 else "ray::EmbedShards"
            if found := workers_of(run.pid, name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    score.abuses += 1
                    boards += name == "ray::Board"
            job.look(score)
        code, _, said = ended(run)
        score.expect(f"a run whose workers were killed ended with {code}: {said[-500:]}", code == 0)
        job.count(score)
        if score.abuses < kills:
            job.output = f"{folder}/out{job.runs}"
    same_as_undisturbed(job, folder, score)
    score.told = {"runs": job.runs, "boards": boards}
    return score


def stores(folder: Path, rng: random.Random, kills: int) -> Score:
    """`kill -9` of the S3 server in the middle of a run that reads from it and writes to it, and its restart."""
    (folder / "s3").mkdir(parents=True)
    score = Score()
    with S3Server(folder / "s3") as server, _environment(server.environment()):
        server.create_bucket("chaos")
        job = Job(folder, shards=60, output="s3://chaos/out")
        fs = fsspec.filesystem("s3")
        fs.put(f"{job.input}/", "chaos/in/", recursive=True)
        local, job.input = job.input, "s3://chaos/in"  # type: ignore[assignment]
        run = job.start()
        while score.abuses < kills and run.poll() is None:
            time.sleep(rng.uniform(2, UP_S))
            server.kill()
            time.sleep(rng.uniform(0.5, 6))
            server.start()
            score.abuses += 1
        code, told, said = ended(run)
        score.expect(f"a run whose store was killed ended with {code}: {said[-500:]}", code == 0)
        score.expect(f"{score.abuses} kills only: the run was too short", score.abuses == kills)
        job.count(score)
        score.told = {"seconds": told.get("seconds")}
        got = job.rows()
        job.input, job.output = local, str(folder / "undisturbed")
        _finish_undisturbed(job, score)
        score.expect("rows differ from an undisturbed run's", got == job.rows())
    return score


def nodes(folder: Path, rng: random.Random, kills: int) -> Score:
    """A node of a two-node cluster goes, with all its processes; another comes; the run goes on with what there is."""
    score, job = Score(), Job(folder, shards=60)
    script = [sys.executable, str(Path(__file__).resolve()), str(job.input), job.output, str(kills), str(rng.random())]
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(script, env=env, capture_output=True, text=True, timeout=900)
    score.expect(f"a run whose nodes were killed: {run.stderr[-800:]}", run.returncode == 0)
    score.abuses = int((run.stdout.split() or ["0"])[-1])
    score.expect(f"{score.abuses} kills only: the run was too short", score.abuses == kills)
    if run.returncode == 0:
        job.count(score)
        same_as_undisturbed(job, folder, score)
    return score


def _on_a_cluster(inputs: str, output: str, kills: int, seed: str) -> int:
    """The driver of `nodes`: it sits on the head, and the second node is killed again and again."""
    from pipeline import head  # first: it sets Ray's environment

    import ray  # isort: skip
    from ray.cluster_utils import Cluster  # isort: skip

    from pipeline.config import RunConfig
    from pipeline.run import embed

    config = RunConfig(
        inputs=(inputs,),
        output=output,
        model="pit_ti_224",
        weights="random:0",
        precision="fp32",
        batch_size=2,
        max_reject_rate=0.1,
        actors=(2, 2),
    )
    node = {"num_cpus": 1, "object_store_memory": head.OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=node)
    second = cluster.add_node(**node)
    rng, killed = random.Random(seed), 0
    with ThreadPoolExecutor(1) as beside:  # nodes are started from the main thread only
        run = beside.submit(embed, config, partial(print, file=sys.stderr))
        while killed < kills and not _is_over(run, rng.uniform(UP_S, 2 * UP_S)):
            cluster.remove_node(second, allow_graceful=False)
            killed += 1
            _is_over(run, rng.uniform(1, 5))
            second = cluster.add_node(**node)
        ended_as = run.result()
    print(ended_as.message, file=sys.stderr, flush=True)
    print(killed, flush=True)
    ray.shutdown()
    cluster.shutdown()
    return ended_as.exit_code


def _is_over(run: Future[Any], wait_s: float) -> bool:
    return bool(futures.wait([run], timeout=wait_s).done)


def same_as_undisturbed(job: Job, folder: Path, score: Score) -> None:
    got = job.rows()
    job.output = str(folder / "undisturbed")
    _finish_undisturbed(job, score)
    score.expect("rows differ from an undisturbed run's", got == job.rows())


def _finish_undisturbed(job: Job, score: Score) -> None:
    code, _, said = ended(job.start())
    score.expect(f"the undisturbed run ended with {code}: {said[-500:]}", code == 0)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


KILLS: dict[str, tuple[Callable[[Path, random.Random, int], Score], int]] = {
    "driver killed": (drivers, 24),
    "worker killed": (workers, 24),
    "store killed, started again": (stores, 6),
    "node of a cluster killed": (nodes, 3),
}

if __name__ == "__main__":
    os._exit(_on_a_cluster(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
