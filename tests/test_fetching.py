"""The promises of pipeline/fetching.py: what a URL column names is fetched, and leads to nothing private by itself."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from containers import clear_memory, write_folder
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from web import Web

from pipeline import fetching
from pipeline.addresses import Access
from pipeline.columns import Columns
from pipeline.errors import Reject
from pipeline.fetching import fetch, is_public
from pipeline.shards import Sample

PUBLIC = "127.0.0.2"  # stands for a public address: the loopback network has many
SECRET = "secret"


def get(url: str, *allowed: str, beside: str = "") -> bytes:
    return fetch(Sample(0, "k", url=url, access=Access(beside, Columns(allow_urls=allowed).allow_urls)))


def refusal(url: str, *allowed: str, beside: str = "") -> str:
    """The message of the reject, which shows no secret."""
    with pytest.raises(Reject) as e:
        get(url, *allowed, beside=beside)
    assert (e.value.reason, e.value.stage) == ("fetch_failed", "fetch")
    assert SECRET not in e.value.message and "\n" not in e.value.message
    return e.value.message


@pytest.fixture
def private() -> Iterator[Web]:
    with Web() as web:
        yield web


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server at an address that counts as public."""
    real = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda host: host == PUBLIC or real(host))
    with Web(PUBLIC) as web:
        yield web


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names and the addresses they resolve to, in turns; the system's resolver knows the others."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def resolved(host: Any, port: Any, *args: Any, **more: Any) -> list[Any]:
        if host not in known:
            return real(host, port, *args, **more)
        turn = known[host]
        ips = (turn.pop(0) if len(turn) > 1 else turn[0]).split()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ips]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    return known


# Which addresses are public

NOT_PUBLIC = """
127.0.0.1 127.8.8.8 0.0.0.0 0.1.2.3 10.0.0.5 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
100.127.255.255 192.0.0.8 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1
255.255.255.255 192.88.99.1 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 ff02::1 fec0::1 2001:db8::1 100::1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe
64:ff9b:1::8.8.8.8 2002:7f00:1:: 2002:a00:1::1 2001:0:1:1:1:1:1:1 3fff::1 5f00::1 localhost 0x7f.1 2130706433
"""


@pytest.mark.parametrize("ip", NOT_PUBLIC.split())
def test_these_addresses_are_private(ip: str) -> None:
    """Loopback, private, link-local, shared, multicast, unspecified, reserved, documentation; inside IPv6 as well."""
    assert not is_public(ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_these_addresses_are_public(ip: str) -> None:
    """What the internet is made of."""
    assert is_public(ip)


# Private addresses


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.1", "0.0.0.0", "0",
     "１２７.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "user:secret@127.0.0.1"],
)  # fmt: skip
def test_no_spelling_of_a_private_address_is_connected_to(host: str, private: Web) -> None:
    """The server there is never asked; the message has no password and no query."""
    message = refusal(f"http://{host}:{private.port}/a.jpg?sig=secret")
    assert private.asked == []
    # aiohttp itself refuses IPv4 in other spellings; before 3.14 it connected to what they mean.
    assert "/a.jpg: a private address, not fetched" in message or message.endswith(": InvalidUrlClientError")


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_ipv6_loopback_is_private_until_allowed() -> None:
    """By its literal; the prefix is compared in the same spelling."""
    with Web("::1") as web:
        assert "a private address" in refusal(f"{web.url}/a.jpg") and web.asked == []
        assert get(f"{web.url}/a.jpg", f"http://[0:0:0:0:0:0:0:1]:{web.port}/") == b"image"


def test_a_name_is_judged_by_what_it_resolves_to(public: Web, private: Web, names: dict[str, list[str]]) -> None:
    """A name of a private address is refused; of several, only the public ones are connected to."""
    names["inside.example"] = ["127.0.0.1"]
    names["both.example"] = [f"127.0.0.1 {PUBLIC}"]
    names["all.example"] = ["127.0.0.1 10.1.2.3 127.0.0.3"]
    assert refusal(f"http://inside.example:{private.port}/a.jpg") == (
        f"http://inside.example:{private.port}/a.jpg: a private address, not fetched unless allowed, "
        f"as by --allow-url http://inside.example:{private.port}/"
    )
    with Web("127.0.0.1", public.port) as twin:
        assert get(f"http://both.example:{public.port}/a.jpg") == b"image"
        assert "a private address" in refusal(f"http://all.example:{public.port}/a.jpg")
        assert (len(public.asked), twin.asked, private.asked) == (1, [], [])


def test_a_name_that_resolves_otherwise_the_second_time(
    public: Web, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding: the check is of the connection, so there is no moment between check and use."""
    monkeypatch.setattr(fetching, "_client", fetching._client.__wrapped__)  # no kept connection to serve the second
    names["rebinding.example"] = [PUBLIC, "127.0.0.1"]
    with Web("127.0.0.1", public.port) as twin:
        assert get(f"http://rebinding.example:{public.port}/a.jpg") == b"image"
        assert "a private address" in refusal(f"http://rebinding.example:{public.port}/a.jpg")
        assert (len(public.asked), twin.asked) == (1, [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_leads_to_nothing_private(status: int, public: Web, private: Web) -> None:
    """Not by address and not by name; to public addresses it is followed."""
    public.answers = {
        "/ip": (status, f"{private.url}/admin?{SECRET}"),
        "/name": (status, f"http://localhost:{private.port}/admin"),
        "/schemeless": (status, f"//127.0.0.1:{private.port}/admin"),
        "/good": (status, "elsewhere/b.jpg"),
        "/twice": (status, "/ip"),
    }
    assert get(f"{public.url}/good") == b"image" and public.asked[-1] == "/elsewhere/b.jpg"
    for path in ("ip", "name", "schemeless", "twice"):
        assert "/admin: a private address, not fetched unless" in refusal(f"{public.url}/{path}")
    assert private.asked == []


def test_a_redirect_leaves_the_web_for_nothing(public: Web, tmp_path: Path) -> None:
    """Other schemes are refused even where the address itself would be allowed; circles and dead ends are too."""
    write_folder(tmp_path, {"a.jpg": b"local"})
    public.answers = {
        "/file": (302, f"file://{tmp_path}/a.jpg"),
        "/path": (302, f"ftp://{PUBLIC}/a.jpg"),
        "/data": (302, f"data:image/png,{SECRET}"),
        "/round": (302, "/round"),
        "/nowhere": (302, ""),
        "/bad": (302, "http://[secret"),
    }
    for path, told in {
        "file": "a redirect to an address of file, only http and https are followed",
        "path": "a redirect to an address of ftp, only http and https are followed",
        "data": "a redirect to nothing that can be fetched",
        "round": "more than 10 redirects",
        "nowhere": "a redirect to nothing that can be fetched",
        "bad": "a redirect to nothing that can be fetched",
    }.items():
        assert told in refusal(f"{public.url}/{path}", "file://")
    assert public.asked.count("/round") == 11


# What the user allows


def test_an_allowed_host_may_be_private(private: Web) -> None:
    """Below the prefix, and where its own server leads; not beside the prefix, not at another port."""
    private.answers = {"/photos/moved.jpg": (302, "/cdn/a.jpg")}
    prefix = f"{private.url}/photos/"
    with Web() as other:
        private.answers["/photos/out.jpg"] = (302, f"{other.url}/a.jpg")
        assert get(f"{private.url}/photos/a.jpg", prefix) == b"image"
        assert get(f"{private.url}/photos/moved.jpg", prefix) == b"image" and private.asked[-1] == "/cdn/a.jpg"
        asked = len(private.asked)
        for path in ("admin", "photos2/a", "photos/%2e%2e/admin", "photos/..%2fadmin"):
            assert "a private address" in refusal(f"{private.url}/{path}", prefix)
        assert len(private.asked) == asked
        assert "a private address" in refusal(f"{private.url}/photos/out.jpg", prefix)
        assert "a private address" in refusal(f"{other.url}/photos/a.jpg", prefix) and other.asked == []


def test_an_allowed_name_may_resolve_to_a_private_address(private: Web, names: dict[str, list[str]]) -> None:
    """That name, not every name of the same address; and no connection made for it serves anybody else."""
    names |= {"photos.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    prefix = f"http://photos.example:{private.port}/in/"
    assert get(f"http://PHOTOS.example:{private.port}/in/a.jpg", prefix) == b"image"
    for _ in range(2):
        assert "a private address" in refusal(f"http://other.example:{private.port}/in/a.jpg", prefix)
        assert "a private address" in refusal(f"http://photos.example:{private.port}/out/a.jpg", prefix)
    assert private.asked == ["/in/a.jpg"]


def test_a_public_address_does_not_lead_to_an_allowed_host_beside_its_prefix(public: Web, private: Web) -> None:
    """A redirect is an address like any other: below the prefix it is followed, elsewhere not."""
    prefix = f"{private.url}/photos/"
    public.answers = {"/in": (302, f"{private.url}/photos/a"), "/out": (302, f"{private.url}/admin")}
    private.answers = {"/photos/bounced": (302, f"{public.url}/out")}
    assert get(f"{private.url}/photos/first", prefix) == b"image"
    assert get(f"{public.url}/in", prefix) == b"image"
    assert "a private address" in refusal(f"{public.url}/out", prefix)
    assert "a private address" in refusal(f"{private.url}/photos/bounced", prefix)
    assert private.asked == ["/photos/first", "/photos/a", "/photos/bounced"]


def test_no_proxy_of_the_environment_is_asked(public: Web, private: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would connect in our place, to wherever a name leads it."""
    monkeypatch.setattr(fetching, "_client", fetching._client.__wrapped__)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"trust_env": True, "proxy": private.url}})
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, private.url)
    assert get(f"{public.url}/a.jpg") == b"image"
    assert (len(public.asked), private.asked) == (1, [])


def test_a_password_goes_to_the_server_it_is_for(public: Web, private: Web) -> None:
    """A redirect to another server does not carry it along."""
    public.answers = {"/moved": (302, f"{private.url}/a.jpg")}
    assert get(f"http://user:{SECRET}@{public.at}/moved", f"{private.url}/") == b"image"
    assert "Authorization" in public.headers[0] and "Authorization" not in private.headers[0]


def test_local_files_below_an_allowed_folder(tmp_path: Path) -> None:
    """Regular ones that really lie there: no link leads out of it, no device or pipe is opened."""
    photos = write_folder(tmp_path / "photos", {"a.jpg": b"a", "deep/b.jpg": b"b"})
    write_folder(tmp_path, {"photos2/c.jpg": b"c", "secret/d.jpg": b"d"})
    (photos / "in.jpg").symlink_to("deep/b.jpg")
    (photos / "out.jpg").symlink_to(tmp_path / "photos2" / "c.jpg")
    (photos / "up").symlink_to("..")
    (photos / "gone.jpg").symlink_to(tmp_path / "none")
    (photos / "device").symlink_to("/dev/zero")
    (tmp_path / "named").symlink_to(photos)
    os.mkfifo(photos / "pipe")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.path.relpath(photos / "socket"))
    prefix = str(photos)
    for path in ("a.jpg", "deep/b.jpg", "in.jpg", "./deep/../a.jpg"):
        assert get(f"{photos}/{path}", prefix) in (b"a", b"b")
    assert get(f"file://{photos}/a.jpg", f"file://{prefix}/") == b"a"
    assert get(f"{tmp_path}/named/a.jpg", str(tmp_path / "named")) == b"a"
    for path, told in {
        "out.jpg": "a link that leads out of what --allow-url allows, to",
        "gone.jpg": "a link that leads out of what",
        "up/photos2/c.jpg": "a link that leads out of what",
        "device": "a link that leads out of what",
        "../photos2/c.jpg": "a local file, not fetched unless allowed",
        "none.jpg": "not found",
        "pipe": "no regular file",
        "deep": "no regular file",
        "": "no regular file",
    }.items():
        assert told in refusal(f"{photos}/{path}", prefix), path
    refusal(f"{photos}/socket", prefix)
    sock.close()
    assert get(f"{tmp_path}/photos2/c.jpg", "file://") == b"c"
    assert "no regular file" in refusal("/dev/zero", "file://")


class Bucket(MemoryFileSystem):
    """Stands for a store with buckets."""

    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("gs://")))


def test_the_parquet_files_own_bucket_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a flag; another bucket of the same store with one."""
    clear_memory()
    monkeypatch.setitem(_registry, "gs", Bucket)
    for path in ("mine/a.jpg", "other/b.jpg"):
        MemoryFileSystem().pipe_file(f"/{path}", path.encode())
    beside = "gs://mine/tables/x.parquet"
    assert get("gs://mine/a.jpg", beside=beside) == b"mine/a.jpg"
    assert "in another bucket" in refusal("gs://other/b.jpg", beside=beside)
    assert get("gs://other/b.jpg", "gs://other/", beside=beside) == b"other/b.jpg"
    assert get("memory://mine/a.jpg", "memory://mine/") == b"mine/a.jpg"
    assert refusal("gs://mine/none.jpg?sig=secret", beside=beside) == "gs://mine/none.jpg: not found"
    clear_memory()


# What servers answer


def test_what_cannot_be_had_is_a_reject(private: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the URL, but not its query; never more than the limit is held."""
    monkeypatch.setattr(fetching, "MAX_IMAGE_BYTES", 2000)
    private.answers = {"/gone.jpg": (404, b"<html>"), "/big.jpg": (200, b"b" * 3000), "/empty.jpg": (200, b"")}
    prefix = private.url
    assert get(f"{private.url}/a.jpg?token=secret#secret", prefix) == b"image"
    assert private.asked == ["/a.jpg?token=secret"]
    assert refusal(f"{private.url}/gone.jpg?token=secret", prefix) == f"{private.url}/gone.jpg: not found"
    for path, reason in (("big", "too_large"), ("empty", "empty")):
        with pytest.raises(Reject) as e:
            get(f"{private.url}/{path}.jpg?secret", prefix)
        assert e.value.reason == reason and SECRET not in e.value.message
    for unknown in ("nothing://x/secret", "reference://x/secret"):
        assert refusal(unknown.replace(SECRET, "y"), unknown.partition("/")[0] + "//x/").startswith(unknown[:5])


def test_only_what_may_pass_is_fetched_again() -> None:
    """404 and 403 at once; 503 and a broken connection up to three times."""
    for status, tries in ((404, 1), (403, 1), (503, 3), (0, 3)):
        with answering(status) as (url, asked):
            message = refusal(f"{url}/a.jpg?token=secret", url)
            # aiohttp itself asks twice where a connection breaks.
            assert len(asked) == tries * (2 if status == 0 else 1)
            assert message.endswith({404: "not found", 0: "ServerDisconnectedError"}.get(status, f"HTTP {status}"))


class answering:
    """A server that answers every request with one status, or hangs up (0); gives its URL and the requests so far."""

    def __init__(self, status: int):
        self._status, self._asked = status, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self._asked.append(connection.recv(65536))
                if self._status:
                    head = f"HTTP/1.1 {self._status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    connection.sendall(head.encode())

    def __enter__(self) -> tuple[str, list[bytes]]:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}", self._asked

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
