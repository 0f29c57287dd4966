"""The promises of pipeline/storage.py and pipeline/output.py on an emulator of Google's store.

It ignores preconditions and takes any credentials, so create-only puts are not shown here.
"""

import json
import os
import socket
import tarfile
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, cast

import fsspec
import pytest
from containers import tar_bytes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcs_server import GcsServer
from url_job import check_etags, embed_by_urls, put, shown

from pipeline.errors import StorageError, UsageError
from pipeline.output import Root
from pipeline.storage import is_unchanged, list_files, open_input, read_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    with GcsServer(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def bucket(server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh bucket, with the environment that leads to it."""
    for name in [n for n in os.environ if n.startswith(("GOOGLE_", "CLOUDSDK_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield f"gs://{server.create_bucket(f'b{uuid.uuid4().hex}')}"
    forget_clients()


def forget_clients() -> None:
    """gcsfs keeps a client for each set of arguments, and the environment is none of them."""
    fsspec.get_filesystem_class("gs").clear_instance_cache()


def test_objects_come_and_go(bucket: str) -> None:
    """Put, read, replaced, deleted; what another client did is seen at once, whatever was listed before."""
    root = Root(f"{bucket}/out")
    forget_clients()
    other = Root(f"{bucket}/out")
    assert other.fs is not root.fs
    assert root.top() == [] and root.list("") == {} and Root(bucket).top() == []
    assert other.put_new("a/x", b"abc") and other.put_new("out", b"")
    assert root.top() == ["a", "out"] and root.list("a") == {"a/x": 3} and Root(bucket).top() == ["out"]
    assert root.read("a/x") == root.open("a/x").read() == b"abc"
    other.overwrite("a/x", b"1234")
    assert root.read("a/x") == b"1234" and root.list("") == {"a/x": 4, "out": 0}
    for name in ("a/none", "a"):
        for read in (root.read, root.open):
            with pytest.raises(FileNotFoundError, match=f"{bucket}/out/{name}: not found$"):
                read(name)
    other.delete("a/x")
    root.delete("a/x")
    assert root.list("a") == {} and root.top() == ["out"]
    with pytest.raises(NotADirectoryError):
        Root(f"{bucket}/out/out").top()


def test_files_are_put_whole(bucket: str, tmp_path: Path) -> None:
    """Also one that gcsfs sends in parts, which are of 5 MiB at least."""
    for size in (0, 1000, 12_345_678):
        path = tmp_path / str(size)
        path.write_bytes(os.urandom(size))
        assert Root(bucket).put_new(f"out/{size}", path)
        assert Root(bucket).read(f"out/{size}") == path.read_bytes()
    assert Root(bucket).list("out") == {"out/0": 0, "out/1000": 1000, "out/12345678": 12_345_678}


def test_the_etag_moves_with_the_content(bucket: str) -> None:
    """A listing and a look at the object agree; another content of the same size is another etag."""
    check_etags(bucket)


def test_a_name_may_hold_any_character(bucket: str) -> None:
    """It is found by its folder, by a pattern and by itself, as `gs://` and as `gcs://`."""
    keys = ("sp ace", "per%20cent", "ha#sh", "ünï", "br[1]", "br1", "q?", "st*r", "pl+us", "a::b", "quo'te", "m@1")
    for key in keys:
        put(f"{bucket}/in/{key}.tar", key.encode())
    found = list_files(f"{bucket}/in")
    assert [e.url for e in found] == sorted(f"{bucket}/in/{key}.tar" for key in keys)
    for pattern in (f"{bucket}/*/*.tar", f"{bucket}/**", f"{bucket}/in/", bucket.replace("gs://", "gcs://")):
        assert list_files(pattern) == found
    for e in found:
        key = e.url.removeprefix(f"{bucket}/in/").removesuffix(".tar")
        assert list_files(e.url) == [e] and is_unchanged(e)
        assert open_input(e.url, e.size).read() == read_bytes(e.url) == key.encode()


def test_a_name_may_be_an_object_and_a_folder(bucket: str) -> None:
    """The object wins; with `/` at the end it is the folder."""
    for name in ("in/x", "in/x/y", "in/xy"):
        put(f"{bucket}/{name}", b"1")
    assert [e.url for e in list_files(f"{bucket}/in/x")] == [f"{bucket}/in/x"]
    assert [e.url for e in list_files(f"{bucket}/in/x/")] == [f"{bucket}/in/x/y"]
    assert Root(f"{bucket}/in").list("") == {"x": 1, "x/y": 1, "xy": 1}


def test_a_shard_is_read_over_ranges(bucket: str) -> None:
    """tarfile over `open_input`, streaming and seeking."""
    members = {f"{i:03}.jpg": os.urandom(20_000 + i) for i in range(200)}
    content = tar_bytes(members)
    put(f"{bucket}/in/x.tar", content)
    for mode in ("r|", "r:"):
        with open_input(f"{bucket}/in/x.tar", len(content)) as raw:
            tar = tarfile.open(fileobj=raw, mode=mode)  # noqa: SIM115
            assert {m.name: cast(IO[bytes], tar.extractfile(m)).read() for m in tar} == members
    with Root(bucket).open("in/x.tar") as raw:  # 1 MiB blocks
        raw.seek(len(content) - 5)
        assert raw.read() == content[-5:]


def test_what_is_not_there_is_told_at_once(bucket: str) -> None:
    """A bucket or prefix that is not there: one line; an output root there is empty, and cannot be written."""
    began = time.monotonic()
    for url in ("gs://no-such-box", "gs://no-such-box/x", "gs://no-such-box/*.tar", "gs://no-such-box/**"):
        with pytest.raises(UsageError, match="there is no bucket no-such-box") as caught:
            list_files(url)
        assert url in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=f"could not list {bucket}/none: not found$"):
        list_files(f"{bucket}/none")
    with pytest.raises(FileNotFoundError, match="could not write gs://no-such-box/out/x: not found"):
        Root("gs://no-such-box/out").put_new("x", b"1")
    assert Root(f"{bucket}/none").top() == [] and Root(f"{bucket}/none").list("") == {}
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("host", ["refuses", "is silent"])
def test_a_host_that_does_not_answer_is_told_in_bounded_time(
    bucket: str, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Within the time for looking; gcsfs left alone tries for half a minute, or waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = 9 if host == "refuses" else silent.getsockname()[1]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("pipeline.storage.LOOK_GIVE_UP_S", 1.0)
        monkeypatch.setattr("pipeline.output.LOOK_GIVE_UP_S", 1.0)
        forget_clients()
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"could not list gs://.*: no answer in 1 s: check the address"):
            list_files(f"{bucket}/in")
        with pytest.raises(StorageError, match=r"could not list gs://.*: no answer in 1 s: check the address"):
            Root(f"{bucket}/out").top()
        assert time.monotonic() - began < 15


class Refusing(BaseHTTPRequestHandler):
    """Answers every request for a token as Google does for an account that it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"error": "invalid_grant", "error_description": "Invalid grant: account not found"}'
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def account(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A service account whose tokens are refused."""
    with HTTPServer(("127.0.0.1", 0), Refusing) as tokens:
        Thread(target=tokens.serve_forever, daemon=True).start()
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        yield {
            "type": "service_account",
            "project_id": "tests",
            "private_key_id": "0123456789abcdef",
            "private_key": key.private_bytes(*pem).decode(),
            "client_email": "nobody@tests.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"http://127.0.0.1:{tokens.server_port}/token",
        }
        tokens.shutdown()


def test_refused_credentials_are_not_shown(
    bucket: str, account: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service account that Google does not know: an error in bounded time, with nothing of its key."""
    put(f"{bucket}/in/x.tar", b"abc")
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    monkeypatch.setattr("pipeline.storage.LOOK_GIVE_UP_S", 1.0)
    monkeypatch.setattr("pipeline.output.LOOK_GIVE_UP_S", 1.0)
    forget_clients()
    secrets = (*account["private_key"].split("\n")[1:-2], account["private_key_id"])
    with pytest.raises(UsageError, match=r"could not list gs://.*[Cc]redentials") as listed:
        list_files(f"{bucket}/in")
    with pytest.raises((StorageError, PermissionError), match=r"could not list gs://.*[Cc]redentials") as looked:
        Root(f"{bucket}/in").top()
    for text in (str(listed.value), str(looked.value)):
        assert not shown(secrets, text) and "\n" not in text


def test_a_job_that_knows_only_urls(bucket: str, shards: Path) -> None:
    """Input, output, weights, labels and job file on Google's store: committed and verified."""
    embed_by_urls(bucket, shards, ())
