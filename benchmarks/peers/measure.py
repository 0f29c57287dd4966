"""One run of one peer: a process of its own, its seconds, the memory of all its processes, nothing left behind."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.against_loop import tree, watch
from benchmarks.peers.job import STARTED

KILLED_WITHIN_S = 10.0


@dataclass(frozen=True)
class Measured:
    """`told`: what the peer printed; None where it failed, and `failure` says why."""

    told: dict[str, Any] | None
    all_in_s: float
    peak_mb: float
    failure: str = ""


def measure(command: Sequence[str], timeout_s: float, home: Path) -> Measured:
    """Runs a peer in the folder `home`, which is where its modules are found."""
    started = time.time()
    environment = {**os.environ, STARTED: repr(started), "PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        try:
            run = subprocess.Popen(command, stdout=printed, stderr=errors, cwd=home, env=environment)
        except OSError as e:
            return Measured(None, 0.0, 0.0, str(e))
        peak, done = [0.0], threading.Event()
        watcher = threading.Thread(target=watch, args=(run.pid, peak, done), daemon=True)
        watcher.start()
        seen = wait(run, timeout_s)
        seconds = time.time() - started
        done.set()
        watcher.join()
        end(seen)
        printed.seek(0)
        errors.seek(0)
        told, failure = None, f"not done after {timeout_s:.0f} s"
        if seconds <= timeout_s:
            told, failure = outcome(run.returncode, last_line(printed.read()), last_line(errors.read()))
    return Measured(told, seconds, peak[0], failure)


def outcome(returncode: int, printed: str, error: str) -> tuple[dict[str, Any] | None, str]:
    """What the peer told, or why it failed."""
    if returncode:
        return None, error or f"ended with {returncode}"
    try:
        return json.loads(printed), ""
    except ValueError:
        return None, f"told nothing: {printed or error}"


def wait(run: subprocess.Popen[bytes], timeout_s: float) -> set[tuple[int, str]]:
    """Until it ends or its time is up. All processes that were seen below it."""
    deadline, seen = time.time() + timeout_s, set[tuple[int, str]]()
    while time.time() < deadline:
        seen |= {(pid, born(pid)) for pid in tree(run.pid)}
        with suppress(subprocess.TimeoutExpired):
            run.wait(0.5)
            return seen
    run.kill()
    run.wait()
    return seen


def end(seen: set[tuple[int, str]]) -> None:
    """Kills what still runs of them, and waits until it is gone."""
    left = [(pid, birth) for pid, birth in seen if birth and born(pid) == birth]
    for pid, _ in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.time() + KILLED_WITHIN_S
    while any(born(pid) == birth for pid, birth in left) and time.time() < deadline:
        time.sleep(0.05)


def born(pid: int) -> str:
    """When the process started, in the kernel's ticks: with its number, what tells it from any other; "" if gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
