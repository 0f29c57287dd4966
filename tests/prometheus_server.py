"""A real Prometheus for tests, and promtool: what they say of an endpoint, of rules, of expressions."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHY_NOT = "needs Prometheus: apt-get install prometheus"
IS_THERE = bool(shutil.which("prometheus") and shutil.which("promtool"))


def promtool(*args: object, stdin: str = "") -> str:
    """What it prints; fails with that where promtool finds a mistake."""
    ended = subprocess.run(["promtool", *map(str, args)], input=stdin, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


class Prometheus:
    """One that runs, at this port of the machine itself."""

    def __init__(self, port: int):
        self.port = port

    def get(self, path: str, **query: object) -> Any:
        """The answer's data. Raises `urllib.error.HTTPError`, 400 for an expression that does not parse."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str, **at: object) -> list[dict[str, Any]]:
        return list(self.get("query", query=expression, **at)["result"])

    def value(self, expression: str) -> float | None:
        """Of the only series; None where there is none."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None


@contextmanager
def prometheus(folder: Path, scrape: dict[str, Any], rules: Path) -> Iterator[Prometheus]:
    """`scrape`: the configuration of its one job, asked every second. `folder`: an empty one for its data."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "shard2vec", **scrape}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    try:
        yield _answering(server, Prometheus(port))
    finally:
        server.kill()
        server.wait()


def _answering(server: "subprocess.Popen[bytes]", asked: Prometheus) -> Prometheus:
    for _ in range(600):
        try:
            asked.query("vector(1)")
            return asked
        except OSError:
            assert server.poll() is None, f"prometheus ended with {server.returncode}"
            time.sleep(0.1)
    raise AssertionError("prometheus does not answer")
