"""An image's address → its bytes, at most `MAX_IMAGE_BYTES`: in threads, many at a time.

An address out of a Parquet column is somebody's data. Whatever is wrong with it is a `Reject`, and it leads to no local
file and no private address unless `--allow-url` says so (`addresses.py`): not by a name that resolves to one, not by a
name that resolves otherwise the second time, not by a redirect. That is seen to where each connection is made.
"""

import errno
import ipaddress
import os
import socket
import stat
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import aiohttp
import stamina
import yarl
from aiohttp.abc import ResolveResult
from fsspec.implementations.http import HTTPFileSystem

from pipeline.addresses import WEB, Access, Address, parse, refused, without_flag
from pipeline.errors import Reject, UsageError
from pipeline.storage import CLIENT_MODULES, read_listed, resolve

if TYPE_CHECKING:  # shards.py imports us
    from pipeline.shards import Sample

MAX_IMAGE_BYTES = 256 * 2**20  # one image as stored; scans of maps reach about 100 MiB
FETCH_ATTEMPTS = 3  # of an address out of a column: most that fail are dead, and every one costs the waits
FETCH_TIMEOUT_S = 60.0  # one attempt, with its redirects and the body
MAX_REDIRECTS = 10
REDIRECT_BYTES = 2**16  # of a redirect's own body, read so that its connection serves again
REDIRECTS = (301, 302, 303, 307, 308)
# What the registries of special addresses hold and Python's own `is_global` lets through, at least in some version.
SPECIAL = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "2001::/23", "3fff::/20"))
)
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is given out of IPv6
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # the last 32 bits are an IPv4 address

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(sample: "Sample") -> bytes:
    """The image at `sample.url`.

    A folder's own file raises `StorageError` after storage.py's retries. An address out of a column is data: whatever
    is wrong with it raises a `Reject`, at once where the server's answer is final, else after `FETCH_ATTEMPTS`.
    """
    assert sample.url is not None, "the sample holds its image itself"
    if sample.listed is not None:
        return read_listed(sample.listed)
    shown, access = "a malformed URL", sample.access
    try:
        address = access.admit(sample.url)
        shown = address.shown
        for attempt in stamina.retry_context(on=_may_pass, attempts=FETCH_ATTEMPTS, wait_initial=0.2, wait_max=2):
            with attempt:
                content = _read(address, access)
    except (MemoryError, Reject):
        raise
    except Exception as e:  # whatever a client makes of an address out of data is that sample's
        why = str(e) if isinstance(e, UsageError) else f"{shown}: {_cause(e)}"
        raise refused(why) from e
    if not content:
        raise Reject("empty", "fetch", f"{shown}: no bytes")
    if len(content) > MAX_IMAGE_BYTES:
        raise Reject("too_large", "fetch", f"{shown}: more than {MAX_IMAGE_BYTES} bytes")
    return content


def _read(address: Address, access: Access) -> bytes:
    if address.scheme in WEB:
        return _read_web(address, access)
    if address.scheme == "file":
        with _open_local(address, access) as file:
            return _bounded(file)
    fs, path = resolve(address.url)
    with cast(BinaryIO, fs.open(path, "rb")) as file:
        return _bounded(file)


def _bounded(file: BinaryIO) -> bytes:
    """All bytes, or one more than `MAX_IMAGE_BYTES`, whatever size the server claims."""
    parts, wanted = list[bytes](), MAX_IMAGE_BYTES + 1
    while wanted > 0 and (part := file.read(wanted)):
        parts.append(part)
        wanted -= len(part)
    return b"".join(parts)


# Local files


def _open_local(address: Address, access: Access) -> BinaryIO:
    """A regular file that really lies below an allowed folder, whatever links there are on the way."""
    real = os.path.realpath(address.url)
    roots = [parse(os.path.realpath(p.url)) for p in map(parse, access.allowed) if p.scheme == "file"]
    if not any(root.holds(parse(real)) for root in roots):
        raise refused(f"{address.shown}: a link that leads out of what --allow-url allows, to {parse(real).shown}")
    # Of a link put there meanwhile, and of a pipe, which would block for ever, nothing is read.
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise refused(f"{address.shown}: no regular file")
    return os.fdopen(fd, "rb")


# The web


def _read_web(address: Address, access: Access) -> bytes:
    """Follows redirects itself, since each of them is an address out of somebody's data as well."""
    until, granted = time.monotonic() + FETCH_TIMEOUT_S, cast(str | None, None)
    for _ in range(MAX_REDIRECTS + 1):
        if access.prefix_of(address):
            granted = address.host
        elif address.host != granted:  # an allowed server may lead to whatever else is its own
            granted = None
        try:
            file = _client(granted).open(
                address.url, "rb",
                block_size=0, size=1,  # a plain stream: one request, no HEAD before it; `size` only has to be there
                timeout=aiohttp.ClientTimeout(total=max(0.001, until - time.monotonic())),
                allow_redirects=False, proxy=None,
            )  # fmt: skip
        except aiohttp.ClientConnectorError as e:
            if isinstance(e.os_error, PrivateAddress):
                raise refused(without_flag(address, str(e.os_error))) from e
            raise
        with file:
            if file.r.status not in REDIRECTS:
                return _bounded(file)
            file.read(REDIRECT_BYTES)
            address = _redirected(address, file.r.headers.get("Location", ""))
    raise refused(f"{address.shown}: more than {MAX_REDIRECTS} redirects")


def _redirected(address: Address, location: str) -> Address:
    """Where a redirect leads: to the web again, or the image is refused."""
    try:
        if not location:
            raise ValueError
        target = parse(str(yarl.URL(address.url).join(yarl.URL(location))))
    except ValueError:
        raise refused(f"{address.shown}: a redirect to nothing that can be fetched") from None
    if target.scheme not in WEB:
        raise refused(f"{address.shown}: a redirect to an address of {target.scheme}, only http and https are followed")
    return target


class PrivateAddress(PermissionError):
    """The address that a name stands for, or an address itself, is not public. One text for all, see `_Guard`."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "a private address")

    def __str__(self) -> str:
        return "a private address"


@lru_cache(maxsize=64)
def _client(granted: str | None) -> HTTPFileSystem:
    """fsspec's client with connections of its own. `granted`: host and port that may be private, None: nothing may.

    A client for each, so that no connection made under one permission is ever used under another.
    """

    async def session(**settings: Any) -> aiohttp.ClientSession:
        guard = _Guard(granted)
        # A proxy would make the connection in our place, to wherever the name leads it.
        settings |= {"connector": guard.connector(), "trust_env": False, "proxy": None}
        return aiohttp.ClientSession(**settings)

    return HTTPFileSystem(get_client=session, skip_instance_cache=True)


class _Guard(aiohttp.ThreadedResolver):
    """Looks at each address that a connection is about to be made to, however it was come by."""

    def __init__(self, granted: str | None):
        super().__init__()
        self._granted = granted
        self._addresses = set[tuple[str, int]]()  # of the granted host, as it resolves

    def connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(resolver=self, socket_factory=self._socket)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if f"{host.rstrip('.').lower()}:{port}" == self._granted:
            self._addresses.update((result["host"], port) for result in found)
        return found

    def _socket(self, info: Any) -> socket.socket:
        """aiohappyeyeballs raises the first error of several only where they read alike: so `PrivateAddress` does."""
        family, kind, proto, _, (host, port, *_) = info
        literal = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if literal != self._granted and (host, port) not in self._addresses and not is_public(host):
            raise PrivateAddress
        return socket.socket(family, kind, proto)


def is_public(host: str) -> bool:
    """Whether an IP address, as a socket takes it, is one of the public internet. False for anything else."""
    try:
        ip: IP = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        within = _embedded(ip)
        if within is not None:
            return is_public(str(within))
        if ip not in UNICAST:
            return False
    special = any(ip in network for network in SPECIAL if network.version == ip.version)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or special)


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to `ip` end up at, where a translator or tunnel makes one of it."""
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


# Errors


def _may_pass(e: Exception) -> bool:
    if status := _status(e):
        return status in (408, 425, 429) or status >= 500
    is_client = type(e).__module__.partition(".")[0] in CLIENT_MODULES
    return isinstance(e, ConnectionError) or (is_client and not isinstance(e, ValueError | TimeoutError))


def _status(e: Exception) -> int:
    """HTTP's; 0 where there was no answer."""
    return int(getattr(e, "status", 0) or 0)


def _cause(e: Exception) -> str:
    """What went wrong, without the client's own words: they hold the URL with its query."""
    if isinstance(e, FileNotFoundError):
        return "not found"
    if status := _status(e):
        return f"HTTP {status}"
    return f"{type(e).__name__} {getattr(e, 'strerror', None) or ''}".strip()
