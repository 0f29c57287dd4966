"""An API server that knows RayJobs, over TLS with a certificate of its own, and the folder of an account in a pod.

Only the shape of HTTP is Kubernetes': no admission, no schema. Names are unique, tokens are asked for.
"""

import datetime
import json
import ssl
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class ApiServer:
    """A context. `objects`: RayJobs by name; `requests`: all that came."""

    def __init__(self, folder: Path, *, namespace: str, token: str):
        self.folder, self.namespace, self.token = folder, namespace, token
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []

    def __enter__(self) -> "ApiServer":
        self._account(self.folder, self.token)
        key, certificate = self.folder / "key.pem", self.folder / "ca.crt"
        _certify(key, certificate)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust.load_cert_chain(certificate, key)
        self._server.socket = trust.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What Kubernetes tells a pod, and where its account is."""
        port = self._server.server_address[1]
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(port),
            "ACCOUNT_FOLDER": str(self.folder),
        }

    def other_account(self) -> Path:
        """Of somebody whose token is not taken."""
        folder = self.folder / "other"
        self._account(folder, "another")
        (folder / "ca.crt").write_bytes((self.folder / "ca.crt").read_bytes())
        return folder

    def _account(self, folder: Path, token: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "namespace").write_text(self.namespace)
        (folder / "token").write_text(token + "\n")

    def answer(self, request: Request, body: bytes) -> tuple[int, dict[str, Any]]:
        self.requests.append(request)
        path = f"/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return 403, {"message": "forbidden"}
        if request.method == "GET" and request.path.startswith(f"{path}/"):
            name = request.path.removeprefix(f"{path}/")
            return (200, self.objects[name]) if name in self.objects else self._missing(name)
        if request.method == "POST" and request.path == path:
            asked = json.loads(body)
            name = asked["metadata"]["name"]
            if name in self.objects:
                return 409, {"message": f'rayjobs.ray.io "{name}" already exists'}
            self.objects[name] = asked
            return 201, asked
        return self._missing(request.path)

    def _missing(self, name: str) -> tuple[int, dict[str, Any]]:
        return 404, {"message": f"rayjobs.ray.io {name} not found"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply()

            do_POST = do_GET

            def _reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = server.answer(Request(self.command, self.path, dict(self.headers)), body)
                answer = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None: ...

        return Handler


def _certify(key_file: Path, certificate_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
