"""A real Ray cluster of several nodes on this machine: `ray start` for each, which a test may kill with all it runs."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import requests

START_S = 240.0  # 8 s on a free machine


class Nodes:
    """A head with a dashboard, and further nodes, each with one CPU; whoever asks must bring the token."""

    def __init__(self, folder: Path, token: str | None = None):
        self._folder, ports = folder, _free_ports(3)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        # `python` of a job is found on the head's PATH, as where an environment is activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
        # A node that does not answer is dead after 3 s rather than 15; one that is slow to answer has 30 s still.
        quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
        quick["RAY_worker_niceness"] = "0"  # Ray's 15 starves a worker beside whatever else a machine does
        self.environment = ours | auth | quick | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        self._gcs, self.address = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._nodes = [
            self._start(
                "--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}",
                "--dashboard-host=127.0.0.1",
            )
        ]  # fmt: skip

    def __enter__(self) -> "Nodes":
        try:
            self._wait("the dashboard", lambda: requests.get(f"{self.address}/api/version", timeout=5).ok or True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            _kill(node.pid)
            node.wait()

    def add(self) -> int:
        """Starts another node; its number. It joins in its own time."""
        self._nodes.append(self._start(f"--address={self._gcs}"))
        return len(self._nodes) - 1

    def wait_for(self, count: int) -> None:
        """Until so many nodes are alive."""

        def alive() -> bool:
            found = self.get("/nodes?view=summary").json()
            return sum(n["raylet"]["state"] == "ALIVE" for n in found["data"]["summary"]) >= count

        self._wait(f"{count} nodes", alive)

    def get(self, path: str) -> requests.Response:
        """What the dashboard answers."""
        return requests.get(f"{self.address}{path}", headers=self._headers, timeout=20)

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of a node, as when a machine goes."""
        _kill(self._nodes[number].pid)

    def workers(self, number: int, name: str = "ray::EmbedShards") -> list[int]:
        """The processes of a node that Ray calls so."""
        return [p.pid for p in _below(self._nodes[number].pid) if name in _title(p)]

    @contextlib.contextmanager
    def standing_still(self, name: str) -> Iterator[None]:
        """Meanwhile the processes of all nodes that Ray calls so do nothing."""
        pids = [pid for number in range(len(self._nodes)) for pid in self.workers(number, name)]
        assert pids, f"no process is {name}"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _start(self, *flags: str) -> "subprocess.Popen[bytes]":
        # A folder for each, as each machine has one: a node that shares it takes a job's working directory away.
        own = tempfile.mkdtemp(dir=self._folder)
        log = (self._folder / f"node-{time.monotonic_ns()}.log").open("wb")
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *flags,
             "--node-ip-address=127.0.0.1", f"--object-store-memory={100 * 2**20}", f"--temp-dir={own}",
             "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0",
             "--disable-usage-stats", "--include-log-monitor=false"],
            env=self.environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def _wait(self, what: str, is_there: "object") -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if any(node.poll() is not None for node in self._nodes):
                break
            with contextlib.suppress(requests.RequestException, KeyError, ValueError):
                if is_there():  # type: ignore[operator]
                    return
            time.sleep(0.3)
        said = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self._folder.glob("node-*.log")))
        raise TimeoutError(f"Ray did not start: {what} did not come\n{said}")


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(pid: int) -> None:
    """A process and all below it; those that are stopped first cannot start others meanwhile."""
    for process in [pid, *(p.pid for p in _below(pid))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
    for process in [*(p.pid for p in _below(pid)), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
