"""Ray's early start: cheap to abandon, gone when it is not wanted any more, and never for a dry run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline import head


def group(leader: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def until(is_so: object, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process is that uses no Ray yet; this one may have the session's."""
    monkeypatch.setattr(head, "_head", None)
    monkeypatch.setattr(head, "_address", "")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))


def test_a_start_that_is_abandoned_costs_no_time_and_leaves_no_process(no_ray: None) -> None:
    """As after a usage error, and where nothing is to do."""
    with head.starting():
        assert head._head is not None
        leader = head._head.pid
        with head.starting():
            assert head._head.pid == leader, "one is enough"
        until(lambda: len(group(leader)) > 1)  # Ray's own processes are coming up
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 2 and head._head is None
    until(lambda: not group(leader), 5)


def test_nothing_starts_where_nothing_is_wanted(no_ray: None) -> None:
    """A dry run has no use for Ray."""
    with head.starting(is_wanted=False):
        assert head._head is None


def test_a_run_that_may_find_nothing_new_starts_none(tmp_path: Path) -> None:
    """Where a version is there, Ray waits until something is to do."""
    assert head.is_early(str(tmp_path)) and head.is_early("s3://bucket/out")
    (tmp_path / "versions").mkdir()
    assert not head.is_early(str(tmp_path))


def test_it_ends_with_the_process_that_wanted_it() -> None:
    """SIGKILL gives that one no time to say so."""
    script = (
        "import time\nfrom pipeline import head\n"
        "with head.starting():\n    print(head._head.pid, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        leader = int(run.stdout.readline())
        until(lambda: len(group(leader)) > 1)
        os.kill(run.pid, signal.SIGKILL)
        until(lambda: not group(leader), 10)


def test_a_ray_that_cannot_start_is_told(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, whatever it was."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with head.starting(), pytest.raises(OSError, match="Ray cannot be started"):
        head.address()


def test_a_ray_that_never_answers_is_told_too(no_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not waited for without end."""
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(head, "START_S", 0.2)
    with head.starting(), pytest.raises(OSError, match="Ray cannot be started"):
        head.address()
    assert head._head is None


def test_ray_starts_without_what_nobody_has_here(ray_session: None) -> None:
    """No process shows workers' logs, and none would start nodes: each is a Python of its own."""
    assert head._head is not None
    started = psutil.Process(head._head.pid).children(recursive=True)
    commands = [" ".join(process.cmdline()) for process in started]
    assert any("raylet" in command for command in commands)
    assert not [command for command in commands if "monitor.py" in command]


def test_a_connected_process_keeps_its_token(ray_session: None) -> None:
    """Asked for another cluster it goes on as it was: without its token Ray's core would end the process."""
    before = os.environ["RAY_AUTH_TOKEN"]
    with head.reaching("127.0.0.1:9"):
        assert os.environ["RAY_AUTH_TOKEN"] == before


def test_ray_tells_nobody_unless_it_is_asked_to(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No task and no metric goes to a dashboard that is not there; a setting of the user's own holds."""
    monkeypatch.delenv("RAY_task_events_report_interval_ms", raising=False)
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")
    with head.starting():
        assert head._head is not None
        settings = psutil.Process(head._head.pid).environ()
    assert settings["RAY_task_events_report_interval_ms"] == "0" and settings["RAY_enable_metrics_collection"] == "1"
