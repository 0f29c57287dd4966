"""The promises of pipeline/storage.py on a real S3 server, addressed as users do: by the usual environment."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import tar_bytes
from lease_race import processes, race
from s3_server import S3Server
from url_job import REPOSITORY, call, check_etags, embed_by_urls, put, shown

from pipeline.errors import StorageError, UsageError
from pipeline.fetching import fetch
from pipeline.lease import Lease, Lost, Taken, holder, latest
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.shards import read_samples
from pipeline.storage import is_unchanged, list_files, open_input, read_bytes, resolve

pytestmark = pytest.mark.slow

PART_BYTES = 5 * 2**20  # the smallest that S3 takes; s3fs' own are 50 MiB, and files from 100 MiB on come in parts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a fresh bucket, with the environment that leads to it."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield f"s3://{server.create_bucket(f'b{abs(hash(request.node.nodeid))}')}"
    forget_clients()


def forget_clients() -> None:
    """s3fs keeps a client for each set of arguments, and the environment is none of them."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("kind", ["bytes", "file", "file in parts"])
def test_of_eight_threads_one_creates(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One True, and the winner's content, whole; a later put is refused.

    Of uploads in parts SeaweedFS lets several win that end in one moment (its lock came with seaweedfs#8801 for single
    requests; AWS answers 409 or 412): here the object is whole, a winner's, and stays.
    """
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *size, **options: PART_BYTES)
    size = 2 * PART_BYTES + 12_345 if kind == "file in parts" else 300_000
    root = Root(f"{bucket}/out")
    barrier = threading.Barrier(8)

    def put_one(i: int) -> bool:
        content: bytes | Path = bytes([i]) * size
        if kind != "bytes":
            path = tmp_path / str(i)
            path.write_bytes(bytes([i]) * size)
            content = path
        barrier.wait()
        return root.put_new("sets/a/x.parquet", content)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put_one, range(8)))
    assert won.count(True) == 1 or (kind == "file in parts" and any(won))
    content = root.read("sets/a/x.parquet")
    assert won[content[0]] and content == content[:1] * size
    assert root.list("sets") == {"sets/a/x.parquet": size}
    assert not root.put_new("sets/a/x.parquet", b"later") and root.read("sets/a/x.parquet") == content


def test_of_four_starts_one_holds_the_lease_until_it_has_been_dead_for_a_while(bucket: str) -> None:
    """Processes, all at once; the winner is killed. Who was overtaken meanwhile is told so."""
    root = Root(f"{bucket}/out")
    with processes() as started:
        winner = race(root.url, started, 4, 5)
        winner.kill()
        winner.wait()
        with pytest.raises(Taken, match=f":{winner.pid} since"), Lease(root, 60):
            pass
        of_the_dead = root.read("reports/lease/00000001.json")
        while holder(root) is not None:
            time.sleep(0.1)
        with Lease(root, 60) as lease:
            lease.check()
            assert latest(root)[0] == 2
            root.put_new("reports/lease/00000003.json", of_the_dead)
            with pytest.raises(Lost, match="taken over"):
                lease.check()


def test_what_another_client_does_is_seen_at_once(bucket: str, server: S3Server) -> None:
    """No listing of s3fs' is believed: objects put and deleted elsewhere come and go."""
    root, client, name = Root(f"{bucket}/out"), server.client(), bucket.removeprefix("s3://")
    assert root.top() == [] and root.list("") == {} and Root(bucket).top() == []
    client.put_object(Bucket=name, Key="out/a/x", Body=b"abc")
    client.put_object(Bucket=name, Key="out/out", Body=b"")
    assert root.top() == ["a", "out"] and root.list("a") == {"a/x": 3} and Root(bucket).top() == ["out"]
    client.put_object(Bucket=name, Key="out/a/y", Body=b"abcd")
    assert root.read("a/y") == b"abcd" and root.open("a/y").read() == b"abcd"
    client.delete_object(Bucket=name, Key="out/a/x")
    assert root.list("a") == {"a/y": 4}
    for read in (root.read, root.open):
        with pytest.raises(FileNotFoundError):
            read("a/x")
    with pytest.raises(FileNotFoundError):
        root.open("a")
    root.delete("a/y")
    root.delete("a/y")
    root.overwrite("note", b"1")
    root.overwrite("note", b"2")
    assert root.read("note") == b"2"
    assert set(root.top()) - {"a"} == {"note", "out"}  # SeaweedFS keeps showing a folder that has emptied
    with pytest.raises(NotADirectoryError):
        Root(f"{bucket}/out/note").top()


def test_the_etag_moves_with_the_content(bucket: str) -> None:
    """A listing and a look at the object agree; another content of the same size is another etag."""
    check_etags(bucket)


def test_a_folders_image_is_the_one_that_was_listed(bucket: str) -> None:
    """Replaced since, by as many bytes: it is told, as its vector would stand under the other's etag."""
    put(f"{bucket}/in/a.jpg", b"abc")
    (shard,) = list_shards([f"{bucket}/in"])
    (sample,) = read_samples(shard)
    assert fetch(sample) == b"abc"
    Root(f"{bucket}/in").overwrite("a.jpg", b"abd")
    with pytest.raises(StorageError, match=r"in/a\.jpg has changed since it was listed: run again"):
        fetch(sample)


def test_a_name_may_hold_any_character(bucket: str) -> None:
    """It is found by its folder and by itself, though it reads as a pattern, a query or a chain."""
    keys = ("sp ace", "per%20cent", "ha#sh", "ünï", "br[1]", "br1", "q?", "st*r", "pl+us", "a::b", "quo'te")
    for key in keys:
        put(f"{bucket}/in/{key}.tar", key.encode())
    found = list_files(f"{bucket}/in")
    assert [e.url for e in found] == sorted(f"{bucket}/in/{key}.tar" for key in keys)
    assert list_files(f"{bucket}/*/*.tar") == list_files(f"{bucket}/**") == found
    for e in found:
        key = e.url.removeprefix(f"{bucket}/in/").removesuffix(".tar")
        assert list_files(e.url) == [e] and is_unchanged(e)
        assert open_input(e.url, e.size).read() == read_bytes(e.url) == key.encode()


def test_what_is_not_there_costs_one_request(bucket: str) -> None:
    """Each shard's output is asked for: s3fs' own `info` would list too, for it might be a folder."""
    root, asked = Root(f"{bucket}/out"), list[str]()
    put(f"{bucket}/out/x", b"abc")
    (there,) = list_files(f"{bucket}/out/x")
    root.fs.s3.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    for name in ("y", "y/z"):
        with pytest.raises(FileNotFoundError, match=rf"could not look at {bucket}/out/{name}: not found"):
            root.open(name)
    assert is_unchanged(there) and asked == ["HeadObject"] * 3


def test_a_name_may_be_an_object_and_a_folder(bucket: str, server: S3Server) -> None:
    """The object wins; with `/` at the end it is the folder. What only marks a folder is no object."""
    put(f"{bucket}/in/x", b"1")
    put(f"{bucket}/in/x/y", b"12")
    server.client().put_object(Bucket=bucket.removeprefix("s3://"), Key="in/marked/", Body=b"")
    assert [e.url for e in list_files(f"{bucket}/in/x")] == [f"{bucket}/in/x"]
    assert [e.url for e in list_files(f"{bucket}/in/x/")] == [f"{bucket}/in/x/y"]
    assert [e.url for e in list_files(f"{bucket}/in")] == [f"{bucket}/in/x", f"{bucket}/in/x/y"]
    assert Root(f"{bucket}/in").list("") == {"x": 1, "x/y": 2}
    assert Root(f"{bucket}/in").top() == ["marked", "x"]


def test_more_keys_than_one_page(bucket: str, server: S3Server) -> None:
    client, name = server.client(), bucket.removeprefix("s3://")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=name, Key=f"out/{i:04}", Body=b"1"), range(1100)))
    assert sorted(Root(f"{bucket}/out").list("")) == [f"{i:04}" for i in range(1100)]
    assert len(list_files(f"{bucket}/out")) == len(list_files(f"{bucket}/out/????")) == 1100


def test_shards_are_read_over_ranges(bucket: str) -> None:
    """tarfile over `open_input`, streaming and seeking, and pyarrow over `Root.open`."""
    members = {f"{i:03}.jpg": os.urandom(20_000 + i) for i in range(200)}
    content = tar_bytes(members)
    put(f"{bucket}/in/x.tar", content)
    for mode in ("r|", "r:"):
        with open_input(f"{bucket}/in/x.tar", len(content)) as raw:
            tar = tarfile.open(fileobj=raw, mode=mode)  # noqa: SIM115
            assert {m.name: cast(IO[bytes], tar.extractfile(m)).read() for m in tar} == members
    table = pa.table({"n": list(range(400_000)), "text": ["abc"] * 400_000})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=50_000, compression="none", use_dictionary=False)
    put(f"{bucket}/out/x.parquet", sink.getvalue())
    root = Root(f"{bucket}/out")
    assert len(sink.getvalue()) > 2**22
    for size in (None, len(sink.getvalue())):
        with root.open("x.parquet", size) as f:
            file = pq.ParquetFile(f)
            assert file.metadata.num_rows == 400_000 and file.read_row_group(5, ["n"])["n"][0].as_py() == 250_000
            assert file.read() == table
    put(f"{bucket}/out/empty", b"")
    assert root.open("empty").read() == root.read("empty") == read_bytes(f"{bucket}/out/empty") == b""


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_and_not_shown(bucket: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At once, in one line, with neither key nor secret; reads and puts raise `PermissionError`."""
    put(f"{bucket}/in/x.tar", b"abc")
    monkeypatch.setenv(name, "aSecretThatIsWrong")
    forget_clients()
    secrets = (S3Server.key, S3Server.secret, "aSecretThatIsWrong")
    began = time.monotonic()
    for url in (f"{bucket}/in", f"{bucket}/in/x.tar", f"{bucket}/in/*.tar", f"{bucket}/**/*.tar", bucket):
        with pytest.raises(UsageError, match=r"could not list s3://b\d+.*: .*(credentials|key|signing)") as caught:
            list_files(url)
        assert not shown(secrets, str(caught.value)) and "\n" not in str(caught.value)
    root = Root(f"{bucket}/in")
    for ask in (root.top, lambda: root.put_new("y", b"1"), lambda: root.read("x.tar"), lambda: root.list("")):
        with pytest.raises(PermissionError) as refused:
            ask()
        assert not shown(secrets, str(refused.value))
    assert time.monotonic() - began < 10


def test_what_is_not_there_is_told_at_once(bucket: str) -> None:
    """A bucket or prefix that is not there: one line; an output root there is empty, and cannot be written."""
    began = time.monotonic()
    for url in ("s3://no-such-bucket", "s3://no-such-bucket/x", "s3://no-such-bucket/*.tar", f"{bucket}/none"):
        with pytest.raises(UsageError) as caught:
            list_files(url)
        assert url in str(caught.value) and "\n" not in str(caught.value)
    for url in ("s3://no-such-bucket/x", "s3://no-such-bucket/", "s3://no-such-bucket/*.tar", "s3://no-such-bucket/**"):
        with pytest.raises(UsageError, match="there is no bucket no-such-bucket"):
            list_files(url)
    with pytest.raises(UsageError, match="Invalid bucket name"):
        list_files("s3://no_such+bucket/x")
    with pytest.raises(FileNotFoundError):
        Root("s3://no-such-bucket/out").put_new("x", b"1")
    assert Root(f"{bucket}/none").top() == [] and Root(f"{bucket}/none").list("") == {}
    assert time.monotonic() - began < 10


def test_an_endpoint_where_nobody_listens_ends_in_bounded_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, within the time for looking. s3fs and botocore left alone take ten minutes."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("pipeline.storage.LOOK_GIVE_UP_S", 3.0)
    forget_clients()
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"could not list s3://.*(Could not connect to the endpoint|no answer in 3 s)"):
        list_files(f"{bucket}/in")
    assert time.monotonic() - began < 20


def test_an_endpoint_that_says_nothing_ends_in_bounded_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers: inputs and outputs are given up after the time for looking."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("pipeline.storage.LOOK_GIVE_UP_S", 1.0)
        monkeypatch.setattr("pipeline.output.LOOK_GIVE_UP_S", 1.0)
        forget_clients()
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"could not list s3://.*no answer in 1 s"):
            list_files(f"{bucket}/in")
        with pytest.raises(StorageError, match=r"could not list s3://.*no answer in 1 s"):
            Root(f"{bucket}/out").top()
        assert time.monotonic() - began < 10


def test_a_profile_is_enough(bucket: str, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key, secret, region and endpoint from the files of a named profile, as any S3 client finds them."""
    put(f"{bucket}/in/x.tar", b"abc")
    for name in server.environment():
        monkeypatch.delenv(name)
    secrets = f"aws_access_key_id = {server.key}\naws_secret_access_key = {server.secret}\n"
    (tmp_path / "credentials").write_text(f"[mine]\n{secrets}")
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    forget_clients()
    assert [e.size for e in list_files(f"{bucket}/in")] == [3] and Root(f"{bucket}/in").put_new("y", b"1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_clients()
    with pytest.raises(UsageError, match=r"s3://.*profile \(nobody\) could not be found") as caught:
        list_files(f"{bucket}/in")
    assert not shown((server.key, server.secret), str(caught.value))


def test_times_are_those_that_the_client_reads(bucket: str, server: S3Server) -> None:
    """Our quicker parser gives what botocore's own gives, of a listing and of an object's headers."""
    put(f"{bucket}/in/x.tar", b"abc")
    fs, path = resolve(f"{bucket}/in/x.tar")
    (theirs,) = server.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert fs.find(path.rpartition("/")[0], detail=True)[path]["LastModified"] == theirs["LastModified"]
    fs.invalidate_cache()
    assert fs.info(path)["LastModified"] == theirs["LastModified"].replace(microsecond=0)


READ = "import sys; from pipeline.storage import read_bytes; print(read_bytes(sys.argv[1]).decode())"


def test_fsspecs_own_configuration_is_honoured(bucket: str, server: S3Server, tmp_path: Path) -> None:
    """FSSPEC_S3_… variables, read when fsspec is imported, in place of AWS's."""
    put(f"{bucket}/x", b"found")
    ours = {
        "FSSPEC_S3_ENDPOINT_URL": server.endpoint,
        "FSSPEC_S3_KEY": server.key,
        "FSSPEC_S3_SECRET": server.secret,
        "HOME": str(tmp_path),
    }
    environment = {n: v for n, v in os.environ.items() if not n.startswith("AWS_")} | ours
    command = [sys.executable, "-c", READ, f"{bucket}/x"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "found\n", done.stderr


def test_a_read_survives_the_death_of_the_server(bucket: str, server: S3Server) -> None:
    """kill -9 in the middle of a shard, and a start on the same data: the rest comes, no byte lost or twice."""
    content = os.urandom(3_000_000)
    put(f"{bucket}/in/x.tar", content)
    fs, path = resolve(f"{bucket}/in/x.tar")
    assert fs.exists(path)
    with Root(f"{bucket}/in").open("x.tar", len(content)) as reader:  # 1 MiB blocks
        first = reader.read(1_500_000)
        server.kill()
        restart = threading.Timer(1.0, server.start)
        restart.start()
        rest = reader.read()
        restart.join()
    assert first + rest == content
    assert Root(f"{bucket}/in").put_new("y", b"1") and not Root(f"{bucket}/in").put_new("x.tar", b"1")


def test_a_job_that_knows_only_urls(bucket: str, server: S3Server, shards: Path) -> None:
    """Input, output, weights, labels and job file on S3: committed, verified, resumed, and no key written anywhere."""
    secrets = (server.key, server.secret)
    embed_by_urls(bucket, shards, secrets)
    again = call("embed", "--config", f"{bucket}/job.yaml", secrets=secrets)
    assert (again["version"], again["shards_embedded"], again["shards_unchanged"]) == (1, 0, 3)
