"""An HTTP reverse proxy that breaks what passes through it, by a seed and under control of the test that runs it.

It stands between a client and a real store, in a thread of its own. Requests go through byte for byte, with their
Host, raw path and headers, so that S3's signatures hold. What it did to each is in `log`, counted in `injected`.
"""

import asyncio
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import yarl
from aiohttp import web

KINDS = ("slow_down", "bad_gateway", "reset", "cut", "stall", "lost_answer")
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>F0</RequestId></Error>"
)
BAD_GATEWAY = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
FORBIDDEN = SLOW_DOWN.replace(b"SlowDown", b"AccessDenied").replace(
    b"Please reduce your request rate.", b"Access Denied."
)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}  # this side of the proxy's alone
CHUNK_BYTES = 2**16
MAX_BODY_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong. `share` of the requests that `hits` take one of `kinds`, drawn by the proxy's seed.

    `slow_down`: 503, and so `burst` requests in a row. `bad_gateway`: 502 and a page of HTML, as load balancers give.
    `reset`: before the store hears of it. `cut` and `stall`: midway through the answer's body, or behind `cut_at` bytes
    of longer ones; a stall holds for `stall_s`. `lost_answer`: the store has done what was asked. Answers without a
    body are lost where they would be cut, and kept back whole where they would stall.
    """

    share: float = 0.0
    kinds: tuple[str, ...] = KINDS
    burst: int = 1
    cut_at: int | None = None
    stall_s: float = 3.0
    latency_s: float = 0.0
    is_forbidden: bool = False  # every request gets 403: the permission was revoked
    hits: Callable[[str, str], bool] = lambda method, path: True


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and what became of it. `sent`: bytes of the answer's body that the client could get."""

    method: str
    path: str  # raw, with the query
    range: str
    fault: str  # "" where there was none
    status: int  # the store's; 0 where it was not asked
    sent: int


@dataclass
class FaultProxy:
    """A context: a proxy on a free port in front of `upstream`. Set `faults` at any time; `outage` begins at once."""

    upstream: str
    seed: int = 0
    faults: Faults = Faults()
    log: list[Exchange] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "FaultProxy":
        self._random, self._burst, self._dark_until = random.Random(self.seed), 0, 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._call(self._start())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def outage(self, seconds: float) -> None:
        """Until then every connection is reset, the open ones too."""
        self._dark_until = time.monotonic() + seconds

    def calm(self, seed: int | None = None) -> Counter[str]:
        """No faults from here on; returns what was injected since the last time, and forgets that and the log."""
        self.faults, self._burst, counted = Faults(), 0, Counter(self.injected)
        self._random.seed(self.seed if seed is None else seed)
        self.log.clear()
        self.injected.clear()
        return counted

    def _call(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> int:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._client = aiohttp.ClientSession(
            auto_decompress=False, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )
        self._runner = web.ServerRunner(web.Server(self._handle), handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._client.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # stalls that still hold
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # one request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        faults, path = self.faults, request.raw_path
        if time.monotonic() < self._dark_until:
            return self._reset(request, "outage")
        body = await _read(request)
        if faults.latency_s:
            await asyncio.sleep(faults.latency_s)
        if faults.is_forbidden:
            return self._refuse(request, "forbidden", 403, FORBIDDEN)
        kind = self._draw(faults, request.method, path)
        if kind == "slow_down":
            return self._refuse(request, kind, 503, SLOW_DOWN)
        if kind == "bad_gateway":
            return self._refuse(request, kind, 502, BAD_GATEWAY, "text/html")
        if kind == "reset":
            return self._reset(request, kind)
        status, headers, content = await self._ask(request, body)
        if time.monotonic() < self._dark_until:
            return self._reset(request, "outage", status)
        if kind == "stall" and not content:
            await asyncio.sleep(faults.stall_s)
            return self._reset(request, kind, status)
        if kind == "lost_answer" or (kind and not content):
            return self._reset(request, "lost_answer", status)
        if faults.cut_at is not None and len(content) <= faults.cut_at:
            kind = ""
        response = web.StreamResponse(status=status)
        for name, value in headers:
            response.headers.add(name, value)
        sent = len(content)
        if kind:
            sent = self._random.randrange(sent) if faults.cut_at is None else faults.cut_at
        self._note(request, kind, status, sent)
        await response.prepare(request)
        for at in range(0, sent, CHUNK_BYTES):
            await response.write(content[at : min(at + CHUNK_BYTES, sent)])
        if kind:
            # What was written shall be read: an abort takes from the client what lies in its own socket.
            await asyncio.sleep(faults.stall_s if kind == "stall" else 0.02)
            _hang_up(request)
            return response
        await response.write_eof()
        return response

    async def _ask(self, request: web.BaseRequest, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The store's whole answer."""
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in HOP_BY_HOP]
        async with self._client.request(
            request.method,
            yarl.URL(self.upstream + request.raw_path, encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:
            content = await answer.read()
            return answer.status, [(n, v) for n, v in answer.headers.items() if n.lower() not in HOP_BY_HOP], content

    def _draw(self, faults: Faults, method: str, path: str) -> str:
        if not faults.hits(method, path):
            return ""
        if self._burst:
            self._burst -= 1
            return "slow_down"
        if self._random.random() >= faults.share:
            return ""
        kind = self._random.choice(faults.kinds)
        self._burst = faults.burst - 1 if kind == "slow_down" else 0
        return kind

    def _refuse(
        self, request: web.BaseRequest, kind: str, status: int, body: bytes, of: str = "application/xml"
    ) -> web.Response:
        sent = 0 if request.method == "HEAD" else len(body)
        self._note(request, kind, 0, sent)
        return web.Response(status=status, body=body, content_type=of)

    def _reset(self, request: web.BaseRequest, kind: str, status: int = 0) -> web.Response:
        self._note(request, kind, status, 0)
        _hang_up(request)
        return web.Response()

    def _note(self, request: web.BaseRequest, fault: str, status: int, sent: int) -> None:
        asked = request.headers.get("Range", "")
        self.log.append(
            Exchange(method=request.method, path=request.raw_path, range=asked, fault=fault, status=status, sent=sent)
        )
        if fault:
            self.injected[fault] += 1


async def _read(request: web.BaseRequest) -> bytes:
    """The body as it came: signed chunks stay as they are."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts = bytearray()
    while chunk := await request.content.readany():
        parts += chunk
        if len(parts) > MAX_BODY_BYTES:
            raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, len(parts))
    return bytes(parts)


def _hang_up(request: web.BaseRequest) -> None:
    """A reset, not a polite end."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
