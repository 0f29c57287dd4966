"""An HTTP server for tests that answers as it is told and remembers what it was asked."""

import http.server
import socket
import threading


class Web:
    """An HTTP server: `answers` by path, (status, Location or body); `asked` are the request lines' paths."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        web = self
        self.answers: dict[str, tuple[int, bytes | str]] = {}
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, so that their reuse is tested

            def do_GET(self) -> None:
                web.asked.append(self.path)
                web.headers.append(dict(self.headers))
                status, what = web.answers.get(self.path.partition("?")[0], (200, b"image"))
                self.send_response(status)
                if isinstance(what, str):
                    self.send_header("Location", what)
                    what = b"moved"
                self.send_header("Content-Length", str(len(what)))
                self.end_headers()
                self.wfile.write(what)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

        self._server = Server((host, port), Handler)
        self.port = self._server.server_port
        self.at = f"{f'[{host}]' if ':' in host else host}:{self.port}"
        self.url = f"http://{self.at}"

    def __enter__(self) -> "Web":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
