"""What needs no cluster: who answers at an address, the log's lines, how a job ended."""

from pathlib import Path

import pytest
from containers import serving
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline import reach
from pipeline.errors import UsageError
from pipeline.submission import JobServer, _ended, _Lines


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # which the address given must win over
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")


def test_no_cluster_at_an_address_is_a_mistake(tmp_path: Path) -> None:
    """Nobody there, or another server: one sentence, without what the URL may hide."""
    with serving(tmp_path) as url, pytest.raises(UsageError, match=f"no Ray job server answers at {url}: .*404"):
        JobServer(url)
    with pytest.raises(UsageError, match=r"no Ray job server answers at http://127\.0\.0\.1:9: ") as told:
        JobServer("http://me:secret@127.0.0.1:9")
    assert "secret" not in str(told.value) and "\n" not in str(told.value)


def test_no_driver_is_started_to_ask_for_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever RAY_ADDRESS says: all that is asked goes to the job server."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    asked = list[str]()
    monkeypatch.setattr(reach, "asking", asked.append)
    done = CliRunner().invoke(app, ["submit", "--list", "--status", "x"])
    assert (done.exit_code, asked) == (2, []), done.output


def test_each_line_comes_once() -> None:
    """In whatever pieces, and after a connection that began anew from the first byte."""
    said = list[str]()
    lines = _Lines(said.append)
    lines.begin()
    for piece in ("a", "b\ncd", "\n\nunfini"):
        lines.add(piece)
    assert said == ["ab", "cd", ""]
    for _ in range(2):  # twice as far as before, then beyond
        lines.begin()
        for piece in ("ab\nc", "d\n"):
            lines.add(piece)
    assert said == ["ab", "cd", ""]
    lines.begin()
    lines.add("ab\ncd\n\nunfinished\nlast")
    assert said == ["ab", "cd", "", "unfinished"]
    lines.end()
    assert said[-1] == "last"


def test_how_a_job_ended_is_an_exit_code() -> None:
    """Its own; of a signal as a shell tells it; 130 where it was stopped, 1 where Ray failed, 2 without interpreter."""

    def told(status: str, code: int | None = None, message: str = "") -> tuple[int | None, str]:
        kind, state = JobType.SUBMISSION, JobStatus(status)
        return _ended(JobDetails(type=kind, status=state, entrypoint="exec py", message=message, driver_exit_code=code))

    assert told("PENDING", message="waits") == (None, "waits") and told("RUNNING") == (None, "")
    assert told("SUCCEEDED", 0, "fine") == (0, "") and told("STOPPED") == (130, "stopped")
    assert told("FAILED", 3, "failed with exit code 3, last available logs (…):\nx") == (3, "")
    assert told("FAILED", -9) == (137, "") and told("FAILED", 137) == (137, "")
    assert told("FAILED", None, "the node\nhas died") == (1, "the node has died")
    code, why = told("FAILED", 127)
    assert code == 2 and "cannot run `exec py`" in why and "--python" in why
