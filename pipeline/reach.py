"""Whether a Ray cluster answers at an address: found out in bounded time, by a process of its own.

Ray's client (2.60) tries for two to three and a half minutes where nobody answers it, hears no signal meanwhile, then
ends its own process; that a token was wrong it tells in its core's log alone. Here it may do all that, and is killed.
"""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.errors import UsageError

ANSWER_S = 45.0  # Python and Ray are imported in it, on a machine that has other work: 2 s on a free one
CONNECT_S = 5.0
YES = "connected"
AUTH = "RAY_AUTH_MODE"

_asking: "tuple[str, subprocess.Popen[str]] | None" = None


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Asks meanwhile; `check` waits for the answer. An address that cannot be one is not asked."""
    global _asking
    if _asking is not None or "://" in address:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.reach", address],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (_home(), os.environ.get("PYTHONPATH", "")) if p)},
    )
    _asking = address, process
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        _asking = None


def check(address: str) -> None:
    """Raises `UsageError` with the reason where no cluster answers, or it turns us away."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except (OSError, OverflowError) as e:
            raise UsageError(f"--ray-address {address}: nobody answers there: {e}") from None
    with asking(address):
        assert _asking is not None
        said = _read(_asking[1])
    if said != YES:
        raise UsageError(f"--ray-address {address}: {_why(said)}")


def _read(process: "subprocess.Popen[str]") -> str:
    """`YES`, or the lines that tell why not, once one of them suffices or the time is up."""
    lines, deadline = queue.Queue[str](), time.monotonic() + ANSWER_S

    def drain() -> None:
        assert process.stdout is not None
        with suppress(ValueError):  # closed meanwhile
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=drain, daemon=True).start()
    said = list[str]()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return "\n".join(said)
        if line.strip() == YES:
            return YES
        said.append(line.strip())
        if not line or "InvalidAuthToken" in line:
            return "\n".join(said)


def _why(said: str) -> str:
    if "InvalidAuthToken" in said:
        if os.environ.get(AUTH, "").lower() == "token":
            return "the cluster refuses this token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)"
        return f"the cluster asks for a token: set {AUTH}=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    if "AuthenticationError" in said:
        return f"{AUTH} is token and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    told = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("failed: ")]
    what = told[-1] if told else f"no Ray answered within {ANSWER_S:.0f} s"
    return f"{what} (a run starts on a node of its cluster; from elsewhere, `shard2vec submit` sends it there)"


def _home() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _main() -> None:
    import logging

    import ray

    try:
        ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    except Exception as e:  # whatever it is, it is the answer
        text = re.sub(r"\s+", " ", str(e))[:300]
        print(f"failed: {type(e).__name__}: {text}", flush=True)
        os._exit(1)
    print(YES, flush=True)
    os._exit(0)


if __name__ == "__main__":
    _main()
