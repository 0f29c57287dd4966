"""The promises of pipeline/storage.py and pipeline/output.py on a real Azure server, found by the usual environment."""

import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import azure_server
import fsspec
import made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from azure_server import AzureServer
from containers import tar_bytes
from url_job import REPOSITORY, check_etags, embed_by_urls, put, shown

from pipeline.errors import StorageError, UsageError
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.storage import is_unchanged, list_files, open_input, read_bytes

MISSING = azure_server.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

WRONG = "aSecretThatIsWrong"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    with AzureServer(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture
def container(server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh container, with the environment that leads to it."""
    for name in [n for n in os.environ if n.startswith(("AZURE_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection)
    forget_clients()
    yield f"az://{server.create_container(f'c{uuid.uuid4().hex}')}"
    forget_clients()


def forget_clients() -> None:
    """adlfs keeps a client for each set of arguments, and the environment is none of them."""
    fsspec.get_filesystem_class("az").clear_instance_cache()


@pytest.mark.parametrize("as_file", [False, True])
def test_of_eight_threads_one_creates(container: str, tmp_path: Path, as_file: bool) -> None:
    """One True, and the winner's content, whole; a later put is refused."""
    root = Root(f"{container}/out")
    barrier = threading.Barrier(8)

    def put_one(i: int) -> bool:
        content: bytes | Path = bytes([i]) * 300_000
        if as_file:
            (tmp_path / str(i)).write_bytes(bytes([i]) * 300_000)
            content = tmp_path / str(i)
        barrier.wait()
        return root.put_new("sets/a/x.parquet", content)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put_one, range(8)))
    assert won.count(True) == 1
    assert root.read("sets/a/x.parquet") == bytes([won.index(True)]) * 300_000
    assert root.list("sets") == {"sets/a/x.parquet": 300_000}
    assert not root.put_new("sets/a/x.parquet", b"later")


def test_what_another_client_does_is_seen_at_once(container: str, server: AzureServer) -> None:
    """No listing of adlfs' is believed: objects put and deleted elsewhere come and go."""
    root, client = Root(f"{container}/out"), server.client().get_container_client(container.removeprefix("az://"))
    assert root.top() == [] and root.list("") == {} and Root(container).top() == []
    client.upload_blob("out/a/x", b"abc")
    client.upload_blob("out/out", b"")
    assert root.top() == ["a", "out"] and root.list("a") == {"a/x": 3} and Root(container).top() == ["out"]
    client.upload_blob("out/a/y", b"abcd")
    assert root.read("a/y") == b"abcd" and root.open("a/y").read() == b"abcd"
    client.delete_blob("out/a/x")
    assert root.list("a") == {"a/y": 4}
    for name in ("a/x", "a"):
        for read in (root.read, root.open):
            with pytest.raises(FileNotFoundError, match=f"abfs://.*/out/{name}: not found$"):
                read(name)
    root.delete("a/y")
    root.delete("a/y")
    root.overwrite("note", b"1")
    root.overwrite("note", b"2")
    assert root.read("note") == b"2" and root.top() == ["note", "out"]
    with pytest.raises(NotADirectoryError):
        Root(f"{container}/out/note").top()


def test_the_etag_moves_with_the_content(container: str) -> None:
    """A listing and a look at the object agree; another content of the same size is another etag."""
    check_etags(container)


def test_a_name_may_hold_any_character(container: str) -> None:
    """It is found by its folder and by itself, under any of Azure's schemes."""
    keys = ("sp ace", "per%20cent", "ha#sh", "ünï", "br[1]", "br1", "q?", "st*r", "pl+us", "a::b", "quo'te", "m@1")
    for key in keys:
        put(f"{container}/in/{key}.tar", key.encode())
    found = list_files(f"{container}/in")
    name = container.removeprefix("az://")
    assert [e.url for e in found] == sorted(f"abfs://{name}/in/{key}.tar" for key in keys)
    for pattern in (f"az://{name}/*/*.tar", f"abfs://{name}/**", f"abfss://{name}/in/"):
        assert list_files(pattern) == found
    for e in found:
        key = e.url.removeprefix(f"abfs://{name}/in/").removesuffix(".tar")
        assert list_files(e.url) == [e] and is_unchanged(e)
        assert open_input(e.url, e.size).read() == read_bytes(e.url) == key.encode()


def test_a_name_may_be_an_object_and_a_folder(container: str) -> None:
    """The object wins; with `/` at the end it is the folder."""
    for name in ("in/x", "in/x/y", "in/xy"):
        put(f"{container}/{name}", b"1")
    root = container.replace("az://", "abfs://")
    assert [e.url for e in list_files(f"{container}/in/x")] == [f"{root}/in/x"]
    assert [e.url for e in list_files(f"{container}/in/x/")] == [f"{root}/in/x/y"]
    assert [e.url for e in list_files(f"{container}/in")] == [f"{root}/in/{name}" for name in ("x", "x/y", "xy")]
    assert Root(f"{container}/in").list("") == {"x": 1, "x/y": 1, "xy": 1}
    assert Root(f"{container}/in").list("x") == {"x/y": 1}


def test_shards_are_read_over_ranges(container: str) -> None:
    """tarfile over `open_input`, streaming and seeking, and pyarrow over `Root.open`."""
    members = {f"{i:03}.jpg": os.urandom(20_000 + i) for i in range(200)}
    content = tar_bytes(members)
    put(f"{container}/in/x.tar", content)
    for mode in ("r|", "r:"):
        with open_input(f"{container}/in/x.tar", len(content)) as raw:
            tar = tarfile.open(fileobj=raw, mode=mode)  # noqa: SIM115
            assert {m.name: cast(IO[bytes], tar.extractfile(m)).read() for m in tar} == members
    table = pa.table({"n": list(range(300_000))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=50_000, compression="none", use_dictionary=False)
    put(f"{container}/out/x.parquet", sink.getvalue().to_pybytes())
    with Root(f"{container}/out").open("x.parquet") as f:
        file = pq.ParquetFile(f)
        assert file.read_row_group(5, ["n"])["n"][0].as_py() == 250_000 and file.read() == table
    put(f"{container}/out/empty", b"")
    assert Root(f"{container}/out").open("empty").read() == read_bytes(f"{container}/out/empty") == b""


# Credentials


@pytest.mark.parametrize("wrong", ["key", "key that is none", "account", "signature", "string"])
def test_wrong_credentials_are_named_and_not_shown(
    container: str, server: AzureServer, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """At once, in one line, with no secret, right or wrong; what is asked of an output root fails too."""
    put(f"{container}/in/x.tar", b"abc")
    allowed = server.signature().partition("sig=")[0]
    strings = {
        "key": server.connection.replace(server.key, "d3Jvbmcga2V5"),
        "key that is none": server.connection.replace(server.key, WRONG),
        "account": server.connection.replace(f"AccountName={server.account}", "AccountName=nobody"),
        "signature": f"BlobEndpoint={server.url};SharedAccessSignature={allowed}sig={WRONG}",
        "string": WRONG,
    }
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", strings[wrong])
    forget_clients()
    secrets = (server.key, "d3Jvbmcga2V5", WRONG)
    began = time.monotonic()
    for url in (f"{container}/in", f"{container}/in/x.tar", f"{container}/in/*.tar", f"{container}/**", container):
        with pytest.raises(UsageError, match=r"az://c.*: .*(authenticate|credentials|Connection string)") as caught:
            list_files(url)
        assert not shown(secrets, str(caught.value)) and "\n" not in str(caught.value)
    asked: tuple[Callable[[Root], object], ...] = (
        Root.top,
        lambda root: root.put_new("y", b"1"),
        lambda root: root.read("x.tar"),
        lambda root: root.list(""),
    )
    for ask in asked:
        with pytest.raises((PermissionError, StorageError, UsageError)) as refused:
            ask(Root(f"{container}/in"))
        assert not shown(secrets, str(refused.value)) and "\n" not in str(refused.value)
    assert time.monotonic() - began < 10


ASK = """
import os, sys
from pipeline.output import Root
from pipeline.storage import list_files
print([(e.url, e.size) for e in list_files(sys.argv[1])], Root(sys.argv[1]).put_new(sys.argv[2], b"1"))
"""


def test_an_account_with_its_key_or_a_signature_is_enough(tmp_path: Path) -> None:
    """AZURE_STORAGE_ACCOUNT_NAME with _KEY or _SAS_TOKEN, over HTTPS; a missing one is named, and none is shown."""
    with AzureServer(tmp_path, tls=True) as server:
        server.client().create_container("box").upload_blob("in/x.tar", b"abc")
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("AZURE_", "FSSPEC_"))}
        plain |= {
            "AZURE_STORAGE_ACCOUNT_NAME": server.account,
            "FSSPEC_ABFS_ACCOUNT_HOST": server.host,
            "SSL_CERT_FILE": str(server.certificate),
        }
        ways = {"AZURE_STORAGE_ACCOUNT_KEY": server.key, "AZURE_STORAGE_SAS_TOKEN": server.signature()}

        def ask(way: str) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-c", ASK, "az://box/in", way]
            environment = plain | ({way: ways[way]} if way in ways else {"AZURE_STORAGE_ANON": "true"})
            return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)

        with ThreadPoolExecutor(3) as pool:
            by_key, by_signature, by_none = pool.map(ask, [*ways, "none"])
        assert "('abfs://box/in/x.tar', 3)" in by_key.stdout and by_key.stdout.endswith("] True\n"), by_key.stderr
        assert "('abfs://box/in/x.tar', 3)" in by_signature.stdout, by_signature.stderr
        assert by_signature.stdout.endswith("] True\n")
        assert "could not list az://box/in" in by_none.stderr
        for done in (by_key, by_signature, by_none):
            assert not shown(tuple(ways.values()), done.stdout + done.stderr)


def test_a_signed_url_is_an_input_and_is_not_shown(
    container: str, server: AzureServer, shards: Path, tmp_path: Path
) -> None:
    """It is listed, read and embedded; its signature is in no output; a wrong one is refused and not shown."""
    put(f"{container}/in/x.tar", (shards / "a" / "two.tar").read_bytes())
    plain, signature = f"{server.url}/{container.removeprefix('az://')}/in/x.tar", server.signature()
    (found,) = list_files(f"{plain}?{signature}")
    assert is_unchanged(found) and read_bytes(found.url) == (shards / "a" / "two.tar").read_bytes()
    (receipt,) = made.embed(made.job(tmp_path / "out"), list_shards([f"{plain}?{signature}"]))
    assert receipt.files and receipt.files.counts.samples == 7, receipt.error
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written and not [content for content in written if signature[-20:].encode() in content]
    began = time.monotonic()
    with pytest.raises(UsageError, match=f"could not list {plain}: ") as caught:
        list_files(f"{plain}?{signature.partition('sig=')[0]}sig={WRONG}")
    assert not shown((WRONG, "sig="), str(caught.value)) and time.monotonic() - began < 5


# What is not there


def test_what_is_not_there_is_told_at_once(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container or prefix that is not there: one line; an output root there is empty, and cannot be written."""
    began = time.monotonic()
    for url in ("az://no-such-box", "az://no-such-box/x", "az://no-such-box/*.tar", "az://no-such-box/**"):
        with pytest.raises(UsageError, match="there is no bucket no-such-box") as caught:
            list_files(url)
        assert url in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=f"could not list {container}/none: not found$"):
        list_files(f"{container}/none")
    with pytest.raises(UsageError, match="name contains invalid characters"):
        list_files("az://No_Such+Box/x")
    with pytest.raises(FileNotFoundError, match=r"The specified container does not exist\.$"):
        Root("az://no-such-box/out").put_new("x", b"1")
    assert Root(f"{container}/none").top() == [] and Root(f"{container}/none").list("") == {}
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    forget_clients()
    with pytest.raises(UsageError, match="connection_string or account_name"):
        list_files(container)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("host", ["refuses", "is silent"])
def test_a_host_that_does_not_answer_is_told_in_bounded_time(
    container: str, server: AzureServer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Within the time for looking; the client left alone takes 85 s to say that nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = 9 if host == "refuses" else silent.getsockname()[1]
        dead = server.connection.replace(server.url.split("/")[2], f"127.0.0.1:{port}")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", dead)
        monkeypatch.setattr("pipeline.storage.LOOK_GIVE_UP_S", 1.0)
        monkeypatch.setattr("pipeline.output.LOOK_GIVE_UP_S", 1.0)
        forget_clients()
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"could not list az://.*(Cannot connect to host|no answer in 1 s)"):
            list_files(f"{container}/in")
        with pytest.raises(StorageError, match=r"could not list abfs://.*(Cannot connect to host|no answer in 1 s)"):
            Root(f"{container}/out").top()
        assert time.monotonic() - began < 15


def test_a_job_that_knows_only_urls(container: str, server: AzureServer, shards: Path) -> None:
    """Input, output, weights, labels and job file on Azure: committed, verified, and no key written anywhere."""
    embed_by_urls(container, shards, (server.key, server.connection))
