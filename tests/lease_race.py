"""Processes that all want one lease: for the tests of leases, on local disks and on object stores."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# Takes the lease when told to, and says what it became: "held" or who holds it. Holds it until stdin closes.
STARTER = """
import sys
from pipeline.lease import Lease, Taken
from pipeline.output import Root
root = Root(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease(root, float(sys.argv[2])) as lease:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            lease.check()
            print("fine", flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {e}", flush=True)
except Taken as e:
    print(f"taken by {e}", flush=True)
"""


def start(url: str, timeout_s: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, url, str(timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )


def hear(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextmanager
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    """Those that are added are gone when the context is."""
    started: list[subprocess.Popen[str]] = []
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def race(url: str, started: list["subprocess.Popen[str]"], count: int, timeout_s: float) -> "subprocess.Popen[str]":
    """All at once; returns the one winner. The others name it."""
    started += [start(url, timeout_s) for _ in range(count)]
    assert [hear(p) for p in started] == ["ready"] * count
    for process in started:
        tell(process)
    said = [hear(p) for p in started]
    assert said.count("held") == 1, said
    winner = started[said.index("held")]
    for line in set(said) - {"held"}:
        assert f":{winner.pid} since 20" in line and line.startswith("taken by ") and "until 20" in line
    return winner
