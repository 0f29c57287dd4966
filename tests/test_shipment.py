"""What a job takes along, and what it does first: the same program or none, and two streams in one log."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import arrival
from pipeline.build import PACKAGES, build_id, package_folder
from pipeline.shipment import Shipment

REPOSITORY = Path(__file__).resolve().parent.parent
ASKED = Shipment("files", ["files", "--kind=rejects", "--", "/no/such/output?sig=secret"], {"lists/0.txt": "/a.tar\n"})


def arrive(folder: Path, *flags: str, home: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """The job's first act in its working directory, as the cluster starts it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"}
    if home:
        environment["PYTHONPATH"] = str(home)
    return subprocess.run(
        [sys.executable, *flags, "-m", "shipment", "files"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_what_is_shipped_runs_and_nothing_else(tmp_path: Path) -> None:
    """The verb gets its arguments, secrets and all, from the folder; the code there is this code; lists lie beside."""
    ASKED.write(tmp_path, build_id(), is_shipped=True)
    assert not list(tmp_path.rglob("__pycache__"))
    ran = arrive(tmp_path)
    first, last = ran.stdout.splitlines()
    assert first.startswith(f"shard2vec: source {build_id()['source']}, as shipped; torch ")
    assert last.startswith("shard2vec: ") and "/no/such/output" in last and ran.returncode == 2
    assert (tmp_path / "lists" / "0.txt").read_text() == "/a.tar\n"


def test_other_code_or_packages_end_the_job_with_what_differs(tmp_path: Path) -> None:
    """Exit 2 and one sentence, though the image's code may be of any age and the interpreter may have nothing."""
    ASKED.write(tmp_path, build_id(), is_shipped=False)
    assert not (tmp_path / "jobs").exists()
    same = arrive(tmp_path, home=REPOSITORY)
    assert "of the image; torch" in same.stdout.splitlines()[0] and "/no/such/output" in same.stdout
    for package in PACKAGES:
        (tmp_path / "old" / package).mkdir(parents=True)
        (tmp_path / "old" / package / "__main__.py").write_text("raise SystemExit('an old one ran')")
    for flags, home, named in (
        ((), tmp_path / "old", f"shard2vec's source {build_id()['source']}, here "),
        (("-S",), REPOSITORY, f"timm {build_id()['versions']['timm']}, here missing"),
    ):
        ran = arrive(tmp_path, *flags, home=home)
        assert ran.returncode == 2 and named in ran.stdout and len(ran.stdout.splitlines()) == 1


def test_lines_of_stdout_are_known_from_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines, each in one write with its mark; what never ended is a line when it is flushed."""
    writes: list[str] = []

    class Log:
        write, flush = staticmethod(writes.append), staticmethod(lambda: None)

    stream: Any = arrival.Marked(Log())  # type: ignore[arg-type]
    print("a", "b\nc", file=stream)
    print("end", end="", file=stream, flush=True)
    assert writes == ["stdout| a b\n", "stdout| c\n", "stdout| end\n"]


def test_a_run_is_what_is_asked_for(tmp_path: Path) -> None:
    """`--json` makes no other run; another flag, list or resource does."""
    run = ASKED.run_id({})
    assert len(run) == 8 and int(run, 16) >= 0
    assert Shipment("files", [*ASKED.arguments, "--json"], ASKED.lists).run_id({}) == run
    others = {
        Shipment("files", ["files", "--", "/b"], ASKED.lists).run_id({}),
        Shipment("files", ASKED.arguments, {"lists/0.txt": "/b.tar\n"}).run_id({}),
        ASKED.run_id({"cpu": 1}),
    }
    assert len(others | {run}) == 4


def test_no_secret_leaves_the_folder(tmp_path: Path) -> None:
    """The arguments lie in one file, and the id tells none of them."""
    ASKED.write(tmp_path, build_id(), is_shipped=False)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and "secret" in path.read_text()]
    assert holders == [tmp_path / "shipment" / "shipment.json"]
    assert json.loads(holders[0].read_text())["arguments"] == ASKED.arguments
    assert package_folder("jobs") == REPOSITORY / "jobs"
