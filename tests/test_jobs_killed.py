"""Runs of the command line that are killed, interrupted, or lose their workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made
import pytest
from chaos_job import workers_of
from containers import write_tar
from pictures import jpeg
from poison import environment, poison
from test_jobs import call

from pipeline import readers, versions
from pipeline.output import Root


def start(*args: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
    """The real command in a process group of its own."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, args)],
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )  # type: ignore[call-overload]


ENDS = (signal.SIGINT, signal.SIGTERM)


def wait_for(found, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


SHARDS, IMAGES = 5, 18


def many_shards(folder: Path) -> Path:
    for shard in range(SHARDS):
        members = {f"{i:03d}.jpg": jpeg(90, 70, seed=shard * 50 + i) for i in range(IMAGES)}
        write_tar(folder / f"s{shard}.tar", members | {"broken.jpg": b"\xff\xd8\xff no"})
    return folder


def slow_args(shards: Path, output: Path) -> list[object]:
    """Small batches of a larger model, so that a kill falls in the middle of the work."""
    asked = ["embed", "--input", shards, "--output", output, "--model", "pit_ti_224", "--weights", "random:0"]
    return [*asked, "--batch-size", 2, "--precision", "fp32", "--max-reject-rate", 0.1, "--json"]


def killed_when(finished: int, shards: Path, output: Path) -> None:
    """Starts a run and kills its process group soon after so many shards are there, in the midst of the next."""
    run = start(*slow_args(shards, output))
    wait_for(lambda: len(list(output.rglob("embeddings/*.parquet"))) >= finished or run.poll() is not None)
    assert run.poll() is None, run.communicate()
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_result_of_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL of the whole process group, mid-shard; no half file is to be seen; the same command ends it right."""
    shards = many_shards(tmp_path / "in")
    output = tmp_path / "killed"
    killed_when(2, shards, output)
    assert not (output / "versions").exists()
    for file in (output / "sets").rglob("embeddings/*.parquet"):
        versions.read_files(Root(str(output)), str(file.relative_to(output)))
    run = start(*slow_args(shards, output))
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["shards_unchanged"] >= 2 and told["shards_unchanged"] + told["shards_embedded"] == SHARDS
    undisturbed = made.job(tmp_path / "whole", model="pit_ti_224", batch_size=2, decode="fast")
    files = [r.files for r in made.embed(undisturbed, shards)]
    versions.commit(Root(str(tmp_path / "whole")), undisturbed.vectors.name, files)
    tables = [
        readers.open_dataset(str(o), kind=kind).to_table()
        for o in (output, tmp_path / "whole")
        for kind in ("embeddings", "rejects")
    ]
    own = ["topk_label"]  # the command's classes have names
    assert tables[0].drop_columns(own).equals(tables[2].drop_columns(own)) and tables[1].equals(tables[3])
    assert len(tables[0]) == SHARDS * IMAGES and len(tables[1]) == SHARDS
    assert call("verify", output, "--input", shards)[0] == 0


@pytest.mark.slow
def test_an_interrupted_run_ends_soon_and_resumes(tmp_path: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM end with 130 in seconds, saying how to go on; nothing but our lines is shown."""
    shards = many_shards(tmp_path / "in")
    sent = {
        tmp_path / sent.name: (sent, start(*slow_args(shards, tmp_path / sent.name), "--actors", 1)) for sent in ENDS
    }
    for output, (signal_sent, run) in sent.items():
        wait_for(lambda: list(output.rglob("embeddings/*.parquet")) or run.poll() is not None)  # noqa: B023
        os.kill(run.pid, signal_sent)
        started = time.monotonic()
        out, err = run.communicate(timeout=60)
        assert run.returncode == 130, err
        assert time.monotonic() - started < 30
        assert "interrupted; run the same command to go on" in err
        for line in err.splitlines():
            assert line.startswith(("pit_ti_224@", "embedding ", "shard2vec: ")), line
        assert json.loads(out.splitlines()[-1])["version"] is None
        assert json.loads(call("status", output, "--json")[1])["last_run"]["state"] == "interrupted"


@pytest.mark.slow
def test_a_killed_worker_and_images_that_kill_theirs_cost_time_and_no_row(tmp_path: Path) -> None:
    """Workers are started again and unpublished shards done again; each deadly image is one reject, named.

    Three of them lie in two shards, before and after sound ones. Stdout is still the result alone.
    """
    shards, output = many_shards(tmp_path / "in"), tmp_path / "out"
    images = {f"{i:03d}.jpg": jpeg(90, 70, seed=i) for i in range(IMAGES)}
    write_tar(shards / "s6.tar", {"a.jpg": poison("segfault"), **images, "z.jpg": poison("out of memory")})
    write_tar(shards / "s7.tar", images | {"010.jpg": poison("exit")})
    run = start(*slow_args(shards, output), "--actors", 1, env=environment(tmp_path / "poison"))
    wait_for(lambda: list(output.rglob("embeddings/*.parquet")) or run.poll() is not None)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "died and had a successor" in err and "Traceback" not in err
    told = json.loads(out)
    assert len(out.splitlines()) == 1 and told["rows"] == (SHARDS + 2) * IMAGES - 1
    assert told["rejects"] == {"corrupt": 2, "too_large": 1, "truncated": SHARDS}
    rejects = readers.open_dataset(str(output), kind="rejects").to_table().to_pylist()
    found = {r["id"]: r["message"] for r in rejects if not r["id"].endswith("/broken")}
    assert found == {
        "s6/a": "its decoder crashed (SIGSEGV)",
        "s6/z": "its decoder was killed, as the system does where memory runs out",
        "s7/010": "its decoder crashed (exit status 3)",
    }
    assert call("verify", output, "--input", shards)[0] == 0
