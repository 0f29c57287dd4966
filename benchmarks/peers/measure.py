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
        run = subprocess.Popen(command, stdout=printed, stderr=errors, cwd=home, env=environment)
        peak, done = [0.0], threading.Event()
        watcher = threading.Thread(target=watch, args=(run.pid, peak, done))
        watcher.start()
        seen = wait(run, timeout_s)
        seconds = time.time() - started
        done.set()
        watcher.join()
        end(seen)
        printed.seek(0), errors.seek(0)
        if seconds > timeout_s:
            return Measured(None, seconds, peak[0], f"not done after {timeout_s:.0f} s")
        if run.returncode:
            return Measured(None, seconds, peak[0], last_line(errors.read()) or f"ended with {run.returncode}")
        return Measured(json.loads(last_line(printed.read())), seconds, peak[0])


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
    for pid, birth in seen:
        if birth and born(pid) == birth:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def born(pid: int) -> str:
    """When the process started, in the kernel's ticks: with its number, what tells it from any other; "" if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
