"""The promises of pipeline/ behind a network that fails: real S3 clients, a real server, and a proxy between them."""

import functools
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.config  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import fsspec
import made
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import serving, tar_bytes
from fault_proxy import KINDS, FaultProxy, Faults
from s3_server import S3Server

from pipeline.errors import StorageError
from pipeline.listing import Shard, list_shards
from pipeline.output import Root
from pipeline.retries import RangeReader
from pipeline.shards import read_samples
from pipeline.storage import list_files, open_input, read_bytes, resolve

pytestmark = pytest.mark.slow

BLOCK_BYTES = 500_000  # a range request's here: several of them a shard
TIMEOUT_S, OUTAGE_S = 0.7, 5.0  # of a client without a byte of an answer; of the store, and ten in chaos_faults.py
PART_BYTES = 5 * 2**20  # the smallest that S3 takes
IMAGES = {f"{i:03}": bytes([i]) + os.urandom(50_000 + i) for i in range(32)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def shared_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """Where the usual environment leads to; clients are made once for all tests, and are impatient."""
    with FaultProxy(server.endpoint, seed=4) as proxy, pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("AWS_", "FSSPEC_"))]:
            patch.delenv(name)
        for name, value in (server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            patch.setenv(name, value)
        patch.setattr("pipeline.storage.READ_TIMEOUT_S", TIMEOUT_S)
        patch.setattr("pipeline.storage.RangeReader", functools.partial(RangeReader, block_bytes=BLOCK_BYTES))
        forget_clients()
        yield proxy
    forget_clients()


@pytest.fixture
def proxy(shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """Calm, before and after."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared_proxy.calm()
    yield shared_proxy
    shared_proxy.calm()


@pytest.fixture
def bucket(server: S3Server, proxy: FaultProxy, request: pytest.FixtureRequest) -> str:
    return f"s3://{server.create_bucket(f'b{abs(hash(request.node.nodeid))}')}"


def forget_clients() -> None:
    """fsspec keeps a client for each set of arguments; environment and timeouts are none of them."""
    for scheme in ("s3", "http"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@functools.cache
def client_of(server: S3Server) -> Any:
    """Half a second to make."""
    return server.client()


def put(server: S3Server, url: str, content: bytes) -> None:
    """Past the proxy."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client_of(server).put_object(Bucket=bucket, Key=key, Body=content)


def get(server: S3Server, url: str) -> bytes:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bytes(client_of(server).get_object(Bucket=bucket, Key=key)["Body"].read())


def tar(images: dict[str, bytes]) -> bytes:
    return tar_bytes({f"{key}.jpg": image for key, image in images.items()})


def parquet(images: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"id": list(images), "image": pa.array(list(images.values()), pa.binary())})
    pq.write_table(table, sink, row_group_size=8, use_dictionary=False, compression="none")
    return sink.getvalue()


def put_shards(server: S3Server, bucket: str) -> list[Shard]:
    put(server, f"{bucket}/in/a.tar", tar(IMAGES))
    put(server, f"{bucket}/in/b.parquet", parquet(IMAGES))
    return [list_shards([f"{bucket}/in/{name}"])[0] for name in ("a.tar", "b.parquet")]


def read(shard: Shard) -> dict[str, bytes]:
    """Key → image of a shard in which nothing is rejected or doubled."""
    samples = list(read_samples(shard))
    assert not [s.reject for s in samples if s.reject]
    found = {s.key: s.image for s in samples}
    assert len(found) == len(samples)
    return found


def first(count: int, method: str, word: str = "") -> Callable[[str, str], bool]:
    """Hits the first requests of a method whose path holds a word."""
    left = itertools.count(count, -1)
    return lambda m, path: m == method and word in path and next(left) > 0


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_comes_whole_where_requests_fail(bucket: str, server: S3Server, proxy: FaultProxy, kind: str) -> None:
    """Three of ten requests fail: the images of a tar are the stored ones."""
    (shard, _) = put_shards(server, bucket)
    proxy.calm()
    proxy.faults = Faults(share=0.3, kinds=(kind,))
    assert read(shard) == IMAGES
    assert proxy.injected[kind] >= 1


def test_shards_come_whole_where_requests_fail_in_every_way(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """Three of ten requests fail, now thus and now otherwise: a tar and a Parquet file give the stored images."""
    shards = put_shards(server, bucket)
    proxy.calm()
    proxy.faults = Faults(share=0.3, burst=2)
    assert [read(shard) for shard in shards] == [IMAGES, IMAGES]
    assert sum(proxy.injected.values()) >= 3


def test_a_cut_answer_is_gone_on_with_where_it_ended(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """A link that cuts every answer behind 200,000 bytes gives the whole shard, at once and without a byte twice."""
    (shard, _) = put_shards(server, bucket)
    proxy.calm()
    proxy.faults = Faults(share=1, kinds=("cut",), cut_at=200_000)
    began = time.monotonic()
    assert read(shard) == IMAGES
    assert time.monotonic() - began < 5, "resuming does not wait: the store is there"
    log = list(proxy.log)
    starts = [int(e.range.removeprefix("bytes=").partition("-")[0]) for e in log]
    assert starts == sorted(starts) and len(set(starts)) == len(starts) >= shard.size // 200_000
    # What a client had not taken from its socket when the reset came is sent again: not more than it buffers.
    assert sum(e.sent for e in log) <= shard.size + len(log) * 2**17


def test_a_whole_object_is_read_like_a_shard(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """Weights, labels and lists: one request, and after a cut the rest alone."""
    content = os.urandom(1_000_000)
    put(server, f"{bucket}/w.safetensors", content)
    assert read_bytes(f"{bucket}/w.safetensors") == content and [e.range for e in proxy.log] == [""]
    proxy.calm()
    proxy.faults = Faults(share=1, kinds=("cut",), cut_at=600_000, hits=first(1, "GET"))
    assert read_bytes(f"{bucket}/w.safetensors") == content
    assert [e.fault for e in proxy.log] == ["cut", ""] and proxy.log[1].sent < 600_000


@pytest.mark.parametrize("other", [dict(zip(IMAGES, reversed(IMAGES.values()), strict=True)), {"000": b"one image"}])
def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(
    bucket: str, server: S3Server, other: dict[str, bytes]
) -> None:
    """With the same size, or shorter: never a sample of the other content, and no reject in its place."""
    for shard, made_of in zip(put_shards(server, bucket), (tar, parquet), strict=True):
        samples = read_samples(shard)
        found = {s.key: s.image for s in itertools.islice(samples, 3)}
        put(server, shard.url, made_of(other))
        with pytest.raises(StorageError, match=rf"{shard.url} changed while it was read.*: run again"):
            found |= {s.key: s.image for s in samples if not s.reject or pytest.fail(str(s.reject))}
        assert found.items() <= IMAGES.items()


def test_a_shard_replaced_before_it_is_read_costs_its_receipt_only(bucket: str, server: S3Server, shards: Path) -> None:
    """Between listing and reading: nothing is published under the old name, other shards go on."""
    for name in ("one", "two"):
        put(server, f"{bucket}/in/{name}.tar", (shards / f"a/{name}.tar").read_bytes())
    listed = list_shards([f"{bucket}/in"])
    put(server, f"{bucket}/in/one.tar", (shards / "a/one.tar").read_bytes().replace(b"photo_1", b"photo_X"))
    changed, kept = made.embed(made.job(f"{bucket}/out"), listed)
    assert "changed while it was read: run again" in (changed.error or "") and changed.files is None
    assert kept.error is None and sorted(Root(f"{bucket}/out").list("sets")) == sorted(kept.files.names.values())


def test_a_stall_is_noticed(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """An answer that stops midway costs the client's timeout, and not the stall's half a minute."""
    (shard, _) = put_shards(server, bucket)
    proxy.faults = Faults(share=1, kinds=("stall",), stall_s=30, cut_at=100_000, hits=first(2, "GET"))
    began = time.monotonic()
    assert read(shard) == IMAGES and proxy.injected == {"stall": 2}
    assert 2 * TIMEOUT_S < time.monotonic() - began < 10


def test_a_listing_is_whole_or_not_at_all(
    bucket: str, server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages fail midway, objects looked at fail: every key is listed once, none is taken for gone."""
    for i in range(20):
        put(server, f"{bucket}/in/{i:02}.tar", bytes(i))
    monkeypatch.setitem(resolve(bucket)[0].s3_additional_kwargs, "MaxKeys", 4)
    calm = list_files(f"{bucket}/in")
    assert len(calm) == 20 and len(proxy.log) >= 5
    proxy.calm()
    proxy.faults = Faults(share=0.3)
    assert list_files(f"{bucket}/in") == calm and list_files(calm[7].url) == [calm[7]]
    assert sum(proxy.injected.values()) >= 2


# Web servers


def signed(server: S3Server, proxy: FaultProxy, url: str) -> str:
    """A plain web address of an S3 object, through the proxy."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    behind = botocore.session.Session().create_client(
        "s3",
        endpoint_url=proxy.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
        config=botocore.config.Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    return str(behind.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}))


def test_a_web_server_with_ranges_is_read_as_a_store_is(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """Through every fault, going on behind a cut; what is replaced meanwhile is an error that shows no signature."""
    (shard, _) = put_shards(server, bucket)
    url, content = signed(server, proxy, shard.url), tar(IMAGES)
    assert list_files(url)[0].size == len(content)
    proxy.calm()
    proxy.faults = Faults(share=1, kinds=("cut",), cut_at=200_000)
    assert open_input(url, shard.size).read() == content
    assert len(content) <= sum(e.sent for e in proxy.log) < 1.5 * len(content)
    proxy.calm()
    proxy.faults = Faults(share=0.3)
    assert open_input(url, shard.size).read() == content == read_bytes(url) and proxy.injected.total() >= 1
    proxy.calm()
    reader = open_input(url, shard.size)
    assert reader.read(1000) == content[:1000]
    put(server, shard.url, tar(dict(zip(IMAGES, reversed(IMAGES.values()), strict=True))))
    with pytest.raises(StorageError, match="changed while it was read") as caught:
        reader.read()
    assert "Signature" not in str(caught.value)


def test_a_web_server_without_ranges_is_asked_again_for_the_whole(proxy: FaultProxy, tmp_path: Path) -> None:
    """A cut answer is never taken for the object, nor its rest for its beginning; a stall is noticed there too."""
    content = os.urandom(700_000)
    (tmp_path / "x.tar").write_bytes(content)
    with serving(tmp_path) as upstream, FaultProxy(upstream) as before:
        before.faults = Faults(share=1, kinds=("cut", "stall"), stall_s=30, cut_at=300_000, hits=first(3, "GET"))
        reader = open_input(f"{before.endpoint}/x.tar", len(content))
        reader.seek(600_000)
        assert reader.read(1000) == content[600_000:601_000]
        assert reader.seek(0) == 0 and reader.read() == content
        assert [e.sent for e in before.log] == [300_000] * 3 + [700_000]
        before.faults = Faults(share=1, kinds=("cut",), cut_at=300_000, hits=first(1, "GET"))
        assert read_bytes(f"{before.endpoint}/x.tar") == content


# Writing


def uploads(server: S3Server, bucket: str) -> list[Any]:
    """Parts that were never put together: they cost money and no listing shows them."""
    return list(client_of(server).list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", []))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("bytes", "lost_answer"), ("bytes", "stall"), ("parts", "lost_answer"), ("parts", "cut")],
)
def test_a_put_whose_answer_is_lost_is_one_whole_object(
    bucket: str,
    server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fault: str,
) -> None:
    """Whatever is lost: no error, the content whole, no later put accepted, no part left behind."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *size, **options: PART_BYTES)
    content: bytes = os.urandom(2 * PART_BYTES + 1 if kind == "parts" else 300_000)
    (tmp_path / "x").write_bytes(content)
    root = Root(f"{bucket}/out")
    final = "POST" if kind == "parts" else "PUT"
    proxy.faults = Faults(share=1, kinds=(fault,), hits=first(2, final, "uploadId" if kind == "parts" else ""))
    root.put_new("x", tmp_path / "x" if kind == "parts" else content)
    assert proxy.injected.total() >= 1
    assert get(server, f"{bucket}/out/x") == content and not root.put_new("x", b"later")
    assert get(server, f"{bucket}/out/x") == content and root.list("") == {"x": len(content)}
    assert uploads(server, bucket) == []


def test_an_upload_in_parts_outlives_the_loss_of_any(
    bucket: str, server: S3Server, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of ten requests of a put in parts fail; what is there in the end is the file, once."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *size, **options: PART_BYTES)
    (tmp_path / "x").write_bytes(os.urandom(3 * PART_BYTES))
    proxy.calm()
    proxy.faults = Faults(share=0.3, kinds=("slow_down", "reset", "lost_answer"))
    Root(f"{bucket}/out").put_new("x", tmp_path / "x")
    assert proxy.injected.total() >= 1
    assert get(server, f"{bucket}/out/x") == (tmp_path / "x").read_bytes()
    assert not Root(f"{bucket}/out").put_new("x", b"later")


# All at once


def test_an_outage_costs_its_own_length(bucket: str, server: S3Server, proxy: FaultProxy) -> None:
    """Seconds without a store, begun while a shard is read: reads, puts and listings wait, nothing is lost."""
    shard, other = put_shards(server, bucket)
    samples = read_samples(shard)
    found = {s.key: s.image for s in itertools.islice(samples, 3)}
    root = Root(f"{bucket}/out")
    began = time.monotonic()
    proxy.outage(OUTAGE_S)
    with ThreadPoolExecutor(3) as pool:
        rest = pool.submit(lambda: {s.key: s.image for s in samples})
        put_there = pool.submit(root.put_new, "x", b"content")
        listed = pool.submit(list_files, f"{bucket}/in")
        assert found | rest.result() == IMAGES
        assert put_there.result() and root.read("x") == b"content"
        assert [e.url for e in listed.result()] == [shard.url, other.url]
    assert proxy.injected["outage"] > 3 and OUTAGE_S <= time.monotonic() - began < 3 * OUTAGE_S + 5


def test_a_permission_revoked_midway_ends_at_once(
    bucket: str, server: S3Server, proxy: FaultProxy, shards: Path
) -> None:
    """One request each, and a sentence that says so; what was begun is not published."""
    shard, other = put_shards(server, bucket)
    samples = read_samples(shard)
    found = {s.key: s.image for s in itertools.islice(samples, 3)}
    proxy.calm()
    proxy.faults = Faults(is_forbidden=True)
    began = time.monotonic()
    with pytest.raises(PermissionError, match=rf"could not read {shard.url}: .*Access Denied"):
        found |= {s.key: s.image for s in samples}
    with pytest.raises(PermissionError, match=r"could not write .*/out/x: .*Access Denied"):
        Root(f"{bucket}/out").put_new("x", b"content")
    with pytest.raises(PermissionError, match=r"could not list .*/out: .*Access Denied"):
        Root(f"{bucket}/out").list("")
    assert found.items() <= IMAGES.items() and len(proxy.log) == 3 and time.monotonic() - began < 3
    receipts = made.embed(made.job(f"{bucket}/out"), [shard, other])
    assert all(r.files is None and "check the credentials" in (r.error or "") for r in receipts)
    assert time.monotonic() - began < 20


def rows_of(root: Root, receipts: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Kind → all rows of the receipts' files."""
    assert [r.error for r in receipts] == [None] * len(receipts)
    return {
        kind: [row for r in receipts for row in pq.read_table(root.open(r.files.names[kind])).to_pylist()]
        for kind in ("embeddings", "rejects")
    }


def test_an_embedding_where_requests_fail_is_the_undisturbed_one(
    bucket: str, server: S3Server, proxy: FaultProxy, shards: Path
) -> None:
    """From S3 to S3, three of ten requests failing in every way: the same rows and rejects, each once."""
    for path in ("a/one.tar", "a/two.tar", "three.tar.gz"):
        put(server, f"{bucket}/in/{path}", (shards / path).read_bytes())
    told, seconds = [], []
    for share in (0.0, 0.3):
        proxy.calm()
        proxy.faults = Faults(share=share)
        root, began = Root(f"{bucket}/out-{share}"), time.monotonic()
        receipts = made.embed(made.job(root.url), list_shards([f"{bucket}/in"]))
        seconds.append(time.monotonic() - began)
        counted = proxy.calm()
        told.append(rows_of(root, receipts))
        assert len(root.list("sets")) == 6, "one file of a kind for each shard"
    assert told[0] == told[1]
    assert counted.total() >= 3 and len({row["id"] for rows in told[1].values() for row in rows}) == oracle.SAMPLES
    print(f"undisturbed {seconds[0]:.1f} s, with {counted.total()} faults {seconds[1]:.1f} s: {dict(counted)}")
