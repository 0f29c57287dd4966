"""The promises of pipeline/retries.py: a store is asked until it answers, for what may pass, and no secret is shown."""

import errno
import io
import os
import tarfile
import time
from pathlib import Path
from typing import IO, cast

import fsspec
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stamina
from botocore.exceptions import ClientError, NoCredentialsError  # type: ignore[import-untyped]
from containers import Fault, FlakyStore, serving, tar_bytes
from hypothesis import given, settings
from s3fs.errors import translate_boto_error  # type: ignore[import-untyped]

from pipeline.errors import StorageError
from pipeline.output import Root
from pipeline.retries import RangeReader, redact, retrying, said
from pipeline.storage import resolve


def client_error(status: int, code: str) -> Exception:
    """What s3fs raises for an answer of S3."""
    answer = {
        "Error": {"Code": code, "Message": f"{code} of the store"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error: Exception = translate_boto_error(ClientError(answer, "PutObject"))
    return error


def test_a_conflict_is_tried_again_and_a_failed_precondition_is_not(flaky: type[FlakyStore]) -> None:
    """409 and 503 pass; 412, in AWS's words or SeaweedFS', means that the name is taken."""
    root = Root("flaky://out")
    flaky.writes = [client_error(409, "ConditionalRequestConflict"), client_error(503, "SlowDown")]
    assert root.put_new("x", b"content") and flaky.calls == 3
    flaky.writes = [client_error(404, "NoSuchUpload")]  # AWS's answer to the end of an upload that has ended already
    assert root.put_new("z", b"content") and flaky.calls == 5
    for code in ("PreconditionFailed", "412"):
        flaky.writes = [client_error(412, code)]
        assert not root.put_new("y", b"content")
    assert root.list("") == {"x": 7, "z": 7}


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (client_error(400, "InvalidArgument"), StorageError),
        (client_error(403, "SignatureDoesNotMatch"), PermissionError),
        (OSError("Forbidden: https://storage.googleapis.com/b/o"), PermissionError),
        (client_error(404, "NoSuchBucket"), FileNotFoundError),
        (NoCredentialsError(), StorageError),
    ],
)
def test_what_cannot_pass_is_not_tried_again(
    flaky: type[FlakyStore], fault: Exception, raised: type[Exception]
) -> None:
    flaky.writes = [fault]
    with pytest.raises(raised, match=r"could not write flaky:///out/x: "):
        Root("flaky://out").put_new("x", b"content")
    assert flaky.calls == 1


@pytest.mark.parametrize("code", ["IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"])
def test_bytes_that_were_altered_on_their_way_are_sent_again(flaky: type[FlakyStore], code: str) -> None:
    """S3 calls it our mistake, with status 400."""
    flaky.writes = [client_error(400, code)]
    assert Root("flaky://out").put_new("x", b"content") and flaky.calls == 2


def test_a_call_that_took_long_before_it_failed_is_made_again(flaky: type[FlakyStore]) -> None:
    """The time to give up after runs from the first failure: an upload of minutes has its second chance too."""
    fs, _ = resolve("flaky://x")
    calls = list[float]()

    def slow() -> str:
        calls.append(time.monotonic())
        time.sleep(0.05)
        if len(calls) == 1:
            raise ConnectionResetError("no answer")
        return "done"

    assert retrying(fs, "write", "flaky://x", slow, give_up_s=0.01) == "done"
    with pytest.raises(StorageError, match="could not write flaky://x: no answer"):
        calls.clear()
        retrying(fs, "write", "flaky://x", lambda: calls.append(0.0) or slow_failure(), give_up_s=0.01)
    assert len(calls) == 2, "and no third one after that time"


def slow_failure() -> str:
    time.sleep(0.05)
    raise ConnectionResetError("no answer")


def test_what_may_pass_ends_after_bounded_attempts(flaky: type[FlakyStore]) -> None:
    flaky.reads = [ConnectionResetError("no answer")] * 100
    with pytest.raises(StorageError, match="could not read flaky:///out/x: no answer"):
        Root("flaky://out").read("x")
    assert flaky.calls == 16


# What is shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/a?b=c#d.tar", "/data/a?b=c#d.tar"),
        ("file:///data/a?b=c", "file:///data/a?b=c"),
        ("https://me:secret@host:1/x.tar?sig=secret#secret", "https://host:1/x.tar"),
        ("https://host?secret", "https://host"),
        ("s3://bucket/sets/m@1/x-??.tar", "s3://bucket/sets/m@1/x-??.tar"),
        ("s3://key:secret@bucket/a#b?versionId=7", "s3://bucket/a#b"),
        ("az://box/x.tar?sv=1&sig=secret", "az://box/x.tar"),
        ("https://[bad", "https://[bad"),
    ],
)
def test_what_is_shown_of_a_url_holds_no_secret(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_a_clients_words_are_cut_after_their_secrets() -> None:
    """Else the cut could take the `@` away, by which a password is known."""
    text = said(OSError(f"{'x' * 270}\nhttps://me:{'secret' * 9}@host/x.tar?sig=secret or not"))
    assert text == f"{'x' * 270} https://host/x.tar or not"


# RangeReader


def short(data: bytes) -> bytes:
    return data[:-1]


FAULTS = st.sampled_from([ConnectionResetError("cut"), TimeoutError("stalled"), OSError("unknown"), short])
STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 70), st.just(0)),
    st.tuples(st.just("readinto"), st.integers(0, 70), st.just(0)),
    st.tuples(st.just("seek"), st.integers(-80, 80), st.sampled_from([0, 1, 2])),
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    content=st.binary(max_size=60),
    block_bytes=st.integers(1, 70),
    faults=st.lists(st.none() | FAULTS, max_size=12),
    steps=st.lists(STEPS, max_size=12),
)
def test_a_range_reader_reads_as_bytes_in_memory_do(
    content: bytes, block_bytes: int, faults: list[Exception | Fault | None], steps: list[tuple[str, int, int]]
) -> None:
    """Any order of reads and seeks gives what `io.BytesIO` gives, through cuts, stalls and short answers."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    fs, path = resolve("flaky://x")
    fs.pipe_file(path, content)
    FlakyStore.reads = [fault or bytes for fault in faults]
    reader, oracle = RangeReader(fs, path, len(content), block_bytes), io.BytesIO(content)
    with stamina.set_testing(True, attempts=16):
        for verb, number, whence in steps:
            if verb == "read":
                assert reader.read(number) == oracle.read(number)
            elif verb == "readinto":
                ours, theirs = bytearray(number), bytearray(number)
                assert reader.readinto(ours) == oracle.readinto(theirs) and ours == theirs
            elif whence == 0 and number < 0:
                with pytest.raises(ValueError):
                    reader.seek(number)
            else:
                assert reader.seek(number, whence) == oracle.seek(number, whence)
            assert reader.tell() == oracle.tell()
    FlakyStore.reads = []


def test_a_range_reader_is_a_file_for_parquet_and_tar(flaky: type[FlakyStore]) -> None:
    """Both read through faults, seeking and streaming."""
    fs, path = resolve("flaky://x")
    table = pa.table({"n": list(range(50_000))})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5_000)
    fs.pipe_file(path, sink.getvalue())
    flaky.reads = [ConnectionResetError("cut"), short] * 5
    assert pq.ParquetFile(RangeReader(fs, path, len(sink.getvalue()), 10_000)).read() == table
    members = {f"{i}.jpg": os.urandom(1000 + i) for i in range(40)}
    content = tar_bytes(members)
    fs.pipe_file(path, content)
    for mode in ("r|", "r:"):
        flaky.reads = [ConnectionResetError("cut"), short] * 5
        with tarfile.open(fileobj=RangeReader(fs, path, len(content), 4096), mode=mode) as tar:
            found = {m.name: cast(IO[bytes], tar.extractfile(m)).read() for m in tar}
        assert found == members


def test_an_object_that_got_shorter_is_an_error(flaky: type[FlakyStore]) -> None:
    """Nothing is made up for bytes that are not there, and an empty object asks for nothing."""
    fs, path = resolve("flaky://x")
    fs.pipe_file(path, b"abc")
    flaky.calls = 0
    with pytest.raises(StorageError, match="gave 3 of 5"):
        RangeReader(fs, path, 5).read()
    flaky.calls = 0
    assert RangeReader(fs, path, 0).read() == b"" and flaky.calls == 0
    closed = RangeReader(fs, path, 3)
    closed.close()
    with pytest.raises(ValueError):
        closed.read()


def test_a_web_server_without_ranges_is_read_all_the_same(tmp_path: Path) -> None:
    content = os.urandom(50_000)
    (tmp_path / "x.bin").write_bytes(content)
    with serving(tmp_path) as url:
        fs, path = resolve(f"{url}/x.bin")
        reader = RangeReader(fs, path, len(content), 1000)
        reader.seek(40_000)
        assert reader.read(5_000) == content[40_000:45_000]
        reader.seek(10)
        assert reader.read() == content[10:]
