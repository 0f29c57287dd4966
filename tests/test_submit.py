"""`submit` against a real cluster that asks for a token: a head, and a second node that a test kills."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_job import Job, Score
from ray_nodes import Nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parent.parent
TOKEN = "5ec4e7" * 8
WAIT_S = 240.0
SHARDS = 8
RUNS: "list[subprocess.Popen[str]]" = []


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets lie below it
    with Nodes(folder, TOKEN) as nodes:
        nodes.add()
        yield nodes
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"), shards=SHARDS, images=12)


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    """What a test that failed has left is ended, and shows what it said."""
    yield
    while RUNS:
        run = RUNS.pop()
        if run.poll() is None:
            run.kill()
            print(*run.communicate())


def start(nodes: Nodes, *asked: object, **env: str) -> "subprocess.Popen[str]":
    """The real command, as another machine would give it: with the token in its environment and nothing else."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    run = subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", "--address", nodes.address, *map(str, asked)],
        env=ours | {"RAY_AUTH_TOKEN": TOKEN} | env, cwd=REPOSITORY, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    RUNS.append(run)
    return run


def call(nodes: Nodes, *asked: object, **env: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    run = start(nodes, *asked, **env)
    out, err = run.communicate(timeout=WAIT_S)
    return run.returncode, out, err


def wait(what: str, is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def shards_done(job: Job) -> int:
    return job.published() if Path(job.output).exists() else 0


def asked(job: Job, *more: object) -> list[object]:
    return job.command(*more)[3:]


def status(nodes: Nodes, id: str) -> dict[str, Any]:
    code, out, err = call(nodes, "--status", id, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def test_a_token_is_asked_for_and_none_is_made(nodes: Nodes, tmp_path: Path) -> None:
    """No token, or a wrong one: exit 2, a sentence, and nothing written to the user's home. A file may hold it."""
    for env, sentence in (
        ({"RAY_AUTH_TOKEN": ""}, "asks for a token: set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "0" * 48}, "refuses the token that it was given"),
    ):
        code, out, err = call(nodes, "--list", "--json", HOME=str(tmp_path), **env)
        assert code == 2 and sentence in err and len(err.splitlines()) == 1, err
        assert json.loads(out) == {"error": err.strip().removeprefix("shard2vec: "), "exit_code": 2}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "token").write_text(TOKEN)
    code, out, err = call(
        nodes, "--list", HOME=str(tmp_path), RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")
    )
    assert (code, out) == (0, ""), err


def test_a_stopped_job_resumes_and_outlives_a_node(nodes: Nodes, job: Job) -> None:
    """Two ask at once: one job, followed by both, stopped by a third. The same command makes attempt 2, which keeps
    what is done, loses a node with all that runs there, commits and ends with 0: `verify` finds every id once."""
    nodes.wait_for(2)
    both = [start(nodes, *asked(job, "--actors", 2)) for _ in range(2)]
    wait("the first shard", lambda: shards_done(job) or all(run.poll() is not None for run in both))
    assert shards_done(job), [run.communicate() for run in both]
    with nodes.standing_still("ray::EmbedShards"):  # however fast the machine is, it is stopped in the midst
        [known] = json.loads(call(nodes, "--list", "--json")[1])["jobs"]
        id = known["id"]
        assert known["status"] == "RUNNING" and known["attempt"] == 1 and id == f"embed-{known['run']}-1"
        assert call(nodes, "--stop", id)[0] == 0
    ends = [run.communicate(timeout=WAIT_S) for run in both]
    for run, (out, err) in zip(both, ends, strict=True):
        assert run.returncode == 130 and "embedding " in err and json.loads(out.splitlines()[-1]), err
    assert sorted(f"job {id} is this run, and " in err for _, err in ends) == [False, True]
    assert "interrupted; run the same command to go on" in call(nodes, "--logs", id)[1]
    kept = shards_done(job)
    assert 0 < kept < SHARDS

    again = start(nodes, *asked(job, "--actors", 2))
    wait("another shard", lambda: shards_done(job) > kept or again.poll() is not None)
    wait("a worker there", lambda: nodes.workers(1) or again.poll() is not None)
    nodes.kill(1)
    out, err = again.communicate(timeout=WAIT_S)
    told = json.loads(out.splitlines()[-1])
    assert again.returncode == 0, err
    assert told["shards_unchanged"] >= kept and told["samples"] == len(job.ids) and told["version"] == 1
    assert f"job embed-{known['run']}-2 on {nodes.address}" in err and "embedding " in err
    assert status(nodes, f"embed-{known['run']}-2")["exit_code"] == 0
    score = Score()
    job.count(score)
    assert score.is_clean, score


def test_the_jobs_own_exit_code_comes_back(nodes: Nodes, job: Job, tmp_path: Path) -> None:
    """2 for what only the cluster can find wrong, 3 for a gate, with the sentence; and the log tells it still. A job
    that nothing can start ends in time, with 1."""
    wrong = start(nodes, "--json", "describe", "pit_b_242")
    waiting = start(nodes, "--resource", "moon=1", "--start-timeout", 5, "describe", "pit_b_224")
    flags = {
        "input": job.input,
        "output": job.output,
        "model": "pit_ti_224",
        "weights": "random:0",
        "precision": "fp32",
    }
    (tmp_path / "job.yaml").write_text("".join(f"{k}: {v}\n" for k, v in flags.items()) + "max-reject-rate: 0\n")
    gated = ("embed", "--config", tmp_path / "job.yaml")
    code, out, err = call(nodes, "--no-wait", "--json", "--env", "GREETING", *gated, GREETING="good day")
    id = json.loads(out)["id"]
    assert code == 0 and id.startswith("embed-") and id.endswith("-1") and "GREETING" not in err
    code, out, err = call(nodes, "--json", *gated)
    assert code == 3 and json.loads(out.splitlines()[-1])["version"] is None, err
    assert "no version was committed" in err and f"job {id} is this run, and under way" in err

    out, err = wrong.communicate(timeout=WAIT_S)
    assert wrong.returncode == 2 and "pit_b_224" in json.loads(out)["error"], err
    _, err = waiting.communicate(timeout=WAIT_S)
    assert waiting.returncode == 1 and "has not started within 5 s" in err, err
    jobs = {j["id"]: j for j in json.loads(call(nodes, "--list", "--json")[1])["jobs"]}
    assert (jobs[id]["status"], jobs[id]["exit_code"]) == ("FAILED", 3)
    [failed] = [j for j in jobs.values() if j["verb"] == "describe" and j["exit_code"]]
    assert failed["exit_code"] == 2 and "pit_b_224" in call(nodes, "--logs", failed["id"])[1]

    # To everybody who may look: which verb it is, and what was passed on with --env.
    told = [{k: j[k] for k in ("entrypoint", "metadata", "runtime_env")} for j in nodes.get("/api/jobs/").json()]
    assert '"GREETING": "good day"' in json.dumps(told) and "shipment embed" in json.dumps(told)
    assert str(job.input) not in json.dumps(told) and "max-reject-rate" not in json.dumps(told)
