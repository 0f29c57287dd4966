"""Google's object store for tests: gcp-storage-emulator, in memory.

It reads, writes and lists as Google does. It asks for no credentials and ignores preconditions, so nothing that rests
on those can be shown here.
"""

import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read when gcsfs is imported: see `environment`

START_S = 60.0  # 1 s where nothing else runs


class GcsServer:
    """A context: starts the server on a free port and kills it."""

    def __init__(self, folder: Path):
        self._log = folder / "gcs.log"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = int(s.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "GcsServer":
        program = os.path.join(sysconfig.get_path("scripts"), "gcp-storage-emulator")
        command = [program, "start", "--host=127.0.0.1", f"--port={self._port}", "--in-memory", "--quiet"]
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=sink)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"gcp-storage-emulator did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def environment(self) -> dict[str, str]:
        """What leads gcsfs here, without its support for zonal buckets, which asks Google over gRPC."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }

    def create_bucket(self, name: str) -> str:
        body = f'{{"name": "{name}"}}'.encode()
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=tests", data=body, headers={"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).close()
        return name

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=5).close()
        except OSError:
            return False
        return True
