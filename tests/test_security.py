"""Hostile names stay in the output's folder, hostile files are data, and nobody's secrets are shown."""

import io
import pickle
import tarfile
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import serving, write_folder, write_tar
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from pictures import jpeg
from test_jobs import call, embed_args
from test_weights_hostile import Evil

from jobs import job_file
from pipeline import versions
from pipeline.errors import UsageError
from pipeline.listing import list_shards
from pipeline.output import Root

SECRET = "TopSecret0123"

# Files


def test_a_job_file_is_data(tmp_path: Path) -> None:
    """A tag that would make an object in Python's full YAML makes none here."""
    marker = tmp_path / "executed"
    for text in (
        f"!!python/object/apply:os.system ['touch {marker}']",
        f"input: !!python/object/apply:os.system ['touch {marker}']",
        "model: !!python/name:os.system",
    ):
        (tmp_path / "job.yaml").write_text(text)
        try:
            argv = job_file.expand(["embed", "--config", str(tmp_path / "job.yaml")])
        except UsageError as e:
            assert "\n" not in str(e)
        else:
            assert all(isinstance(arg, str) for arg in argv)
    assert not marker.exists()


def test_a_parquet_files_metadata_is_data(tmp_path: Path) -> None:
    """Arrow's schema, extension types and pandas' metadata in a file build nothing: no pickle is read."""
    evil = Evil(tmp_path / "executed")
    content = pickle.dumps(evil)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": content,
    }
    pandas = {b"pandas": content, b"huggingface": content}
    schema = pa.schema(
        [pa.field("image", pa.binary(), metadata=metadata), pa.field("key", pa.string())], metadata=pandas
    )
    image = jpeg(20, 20)
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [image], "key": ["k"]}, schema=schema), tmp_path / "in" / "x.parquet")
    (receipt,) = made.embed(made.job(tmp_path / "out"), tmp_path / "in")
    assert receipt.error is None and receipt.files and receipt.files.counts.rows == 1
    assert not evil.marker.exists()


# Names


def everything_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


HOSTILE_KEYS = [
    "/abs/a", "../../up/b", "..", "a/../../c", "C:\\dir\\d", "\\\\host\\share\\e", "new\nline/f", "d.o\nt/g",
    "$(touch h)", "x" * 4000, "deep/" * 800 + "i", "nul\0j", "~root/k", "%2e%2e%2fl", "a\u202em", "file:///n",
]  # fmt: skip


def hostile_tar(path: Path) -> None:
    """Every name as pax writes it, which keeps line breaks and NULs."""
    image = jpeg(20, 20)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key in HOSTILE_KEYS:
            info = tarfile.TarInfo("x")
            info.size, info.pax_headers = len(image), {"path": f"{key}.jpg"}
            tar.addfile(info, io.BytesIO(image))
    path.write_bytes(sink.getvalue())


def test_member_names_never_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tars and of Parquet's key column: ids keep the key's text, files are named by shard alone."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    folder = tmp_path / "a" / "b" / "in"
    folder.mkdir(parents=True)
    hostile_tar(folder / "x.tar")
    pq.write_table(pa.table({"image": [jpeg(20, 20)] * len(HOSTILE_KEYS), "key": HOSTILE_KEYS}), folder / "y.parquet")
    before = everything_below(tmp_path)
    job = made.job(tmp_path / "out")
    shards = list_shards([str(folder / "x.tar"), str(folder / "y.parquet")])
    receipts = made.embed(job, shards)
    assert [r.error for r in receipts] == [None, None]
    ids = [id for r in receipts if r.files for id in column(tmp_path / "out" / r.files.embeddings, "id")]
    # webdataset takes a name without anything before its first dot for no sample.
    skipped = {".."}
    assert ids == [f"x/{k}" for k in HOSTILE_KEYS if k not in skipped] + [f"y/{k}" for k in HOSTILE_KEYS]
    written = everything_below(tmp_path) - before
    names = {f"{s.name}-{s.etag}.parquet" for s in shards}
    at = f"out/{job.vectors.folder}"
    assert written == {f"{at}/{kind}/{name}" for kind in ("embeddings", "rejects") for name in names}


def column(path: Path, name: str) -> list[Any]:
    return list(pq.read_table(path)[name].to_pylist())


ODD_FILES = [
    "-rf", "$(touch h)", "a%2f..%2fb", "a..", "c\\..\\d", "~", "q?x=1#y", "{e}", "*", "line\nbreak",
    "ü", " ", "'\"", "\u2028",
]  # fmt: skip


def test_shard_files_of_odd_names_stay_in_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of a kind for each, below the set's folder; `files` prints each on one line."""
    for name in ODD_FILES:
        write_tar(tmp_path / "in" / f"{name}.tar", {"a.jpg": jpeg(20, 20)})
    before = everything_below(tmp_path)
    shards = list_shards([str(tmp_path / "in")])
    assert len(shards) == len(ODD_FILES) and "line\\nbreak" in {s.name for s in shards}
    receipts = made.embed(made.job(tmp_path / "out"), shards)
    files = [r.files for r in receipts if r.files]
    versions.commit(Root(str(tmp_path / "out")), made.vector_set().name, files)
    folder = f"out/{made.vector_set().folder}/embeddings"
    assert all(p.startswith(("out/versions/", "out/sets/")) for p in everything_below(tmp_path) - before)
    listed = call("files", tmp_path / "out")[1].splitlines()
    assert sorted(listed) == sorted(str(tmp_path / folder / f"{s.name}-{s.etag}.parquet") for s in shards)
    assert all(Path(path).is_file() for path in listed)


def test_names_that_fit_no_file_are_told_before_any_work(tmp_path: Path) -> None:
    """A file's name of 255 bytes, the disk's own limit, has no room for the etag."""
    write_tar(tmp_path / "in" / f"{'x' * 213}.tar", {"a.jpg": jpeg(20, 20)})
    (receipt,) = made.embed(made.job(tmp_path / "out"), tmp_path / "in")
    assert receipt.error is None
    write_tar(tmp_path / "in" / f"{'ü' * 107}.tar", {"a.jpg": jpeg(20, 20)})
    code, _, err = call(*embed_args(tmp_path / "in", tmp_path / "out2"))
    assert code == 2 and "its name is too long" in err and "214 bytes" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out2").exists()


class Bucket(MemoryFileSystem):
    """A store whose keys are just text."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("bucket://").strip("/")

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "type": "file", "size": 1}


def test_a_key_is_no_way_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """`..` in an object's key is refused before any work: the output's file would lie elsewhere."""
    monkeypatch.setitem(_registry, "bucket", Bucket)
    with pytest.raises(UsageError, match=r"its name d/\.\./\.\./\.\./\.\./up would not be unique"):
        list_shards(["bucket://b/in/a.tar", "bucket://b/in/d/../../../../up.tar"])


# Secrets


def secretive(url: str) -> list[str]:
    """The same address with a secret in each place that one may be in."""
    host = url.removeprefix("http://")
    return [
        f"{url}?X-Amz-Signature={SECRET}&a=b",
        f"{url}?sv=2024&sig={SECRET}#{SECRET}",
        f"http://user:{SECRET}@{host}",
        f"http://user%40corp:{SECRET}%40@{host}?a={SECRET}",
    ]


def test_a_signed_input_leaves_no_trace(shards: Path, tmp_path: Path) -> None:
    """Embedded, committed, dry-run, verified: no secret in any byte of the output or of what is said."""
    with serving(shards / "a") as url:
        for i, signed in enumerate(secretive(f"{url}/two.tar")[1:3]):
            out = tmp_path / f"out{i}"
            (shard,) = list_shards([signed])
            (receipt,) = made.embed(made.job(out), [shard])
            assert receipt.files and SECRET not in repr(receipt)
            versions.commit(Root(str(out)), made.vector_set().name, [receipt.files])
            assert [p for p in out.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []
            said = [call("embed", "--dry-run", "--json", *embed_args(signed, tmp_path / "dry")[1:])]  # type: ignore[arg-type]
            said += [call("verify", out, "--input", signed, "--json"), call("status", out), call("files", out)]
            assert [code for code, *_ in said] == [0, 0, 0, 0], said
            assert SECRET not in str(said)
            assert shard.source is not None
            stale = replace(shard, source=replace(shard.source, etag="0" * 16))
            (failed,) = made.embed(made.job(tmp_path / f"stale{i}"), [stale])
            assert "/two.tar changed while it was read" in str(failed.error) and SECRET not in str(failed.error)


def test_errors_show_no_secret(shards: Path, tmp_path: Path) -> None:
    """Wherever a URL is given, and whatever is wrong with it."""
    (tmp_path / "list.txt").write_text(f"https://user:{SECRET}@[bad/x.tar\n")
    write_folder(tmp_path / "web", {"labels.txt": b"cat\ndog\n", "x.pth": b"no weights", "job.yaml": b"- a"})
    ok = {"--input": str(shards), "--output": str(tmp_path / "out"), "--model": "test_vit", "--weights": "random:0"}
    with serving(tmp_path / "web") as url:
        wrong = [("--input", bad) for bad in (*secretive(f"{url}/none.tar"), *secretive(f"{url}/none-*.tar"))]
        wrong += [("--input", bad.replace("http://", "HTTP://")) for bad in secretive(f"{url}/none.tar")]
        wrong += [("--weights", bad) for name in ("none.pth", "x.pth", "x.txt") for bad in secretive(f"{url}/{name}")]
        wrong += [("--labels", bad) for bad in secretive(f"{url}/none.txt")[::3]]
        wrong += [("--labels", secretive(f"{url}/labels.txt")[3])]
        wrong += [("--config", bad) for name in ("none.yaml", "job.yaml") for bad in secretive(f"{url}/{name}")]
        wrong += [("--output", bad) for bad in secretive(f"{url}/out")]
        wrong += [
            ("--input", f"@{tmp_path}/list.txt"),
            ("--input", f"s3://AKIA:{SECRET}@bucket/x.tar"),
            ("--output", f"s3://AKIA:{SECRET}@bucket/out"),
            ("--input", f"az://container/x.tar?sv=1&sig={SECRET}"),
            ("--input", f"nothing://user:{SECRET}@host/x.tar?sig={SECRET}"),
            ("--input", f"zip://x.tar::https://host/x.zip?sig={SECRET}"),
            ("--allow-url", f"https://host/?sig={SECRET}"),
            ("--allow-url", f"https://user:{SECRET}@host/"),
        ]
        for flag, value in wrong:
            flags = [part for pair in (ok | {flag: value}).items() for part in pair]
            with redirect_stderr(io.StringIO()) as err:
                try:
                    argv = job_file.expand(["embed", *flags, "--json"])
                except UsageError as e:
                    code, said = 2, str(e)
                else:
                    code, *streams = call(*argv)
                    said = "".join(streams)
            assert code == 2, (flag, value, said)
            assert SECRET not in said + err.getvalue(), (flag, value, said)
            assert "Traceback" not in said


def test_a_job_file_that_cannot_be_read_is_not_quoted(tmp_path: Path) -> None:
    """YAML's own messages show the line, which may hold a signed URL."""
    for text in (f"input: [https://h/x.tar?sig={SECRET}\nmodel: {{", f"a: b: https://u:{SECRET}@h", f"\t{SECRET}"):
        (tmp_path / "job.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"job\.yaml cannot be read: .*line \d") as e:
            job_file.expand(["embed", "--config", str(tmp_path / "job.yaml")])
        assert SECRET not in str(e.value)


def test_addresses_of_a_column_are_redacted_in_the_output(tmp_path: Path) -> None:
    """The reject says which host and path, never the signature."""
    urls = secretive("http://127.0.0.1:1/a.jpg")
    urls += [f"s3://k:{SECRET}@b/a", f"data:image/png;base64,{SECRET}", f"ftp://u:{SECRET}@h/a?x", f"https://[{SECRET}"]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"url": urls}), tmp_path / "in" / "x.parquet")
    (receipt,) = made.embed(made.job(tmp_path / "out"), tmp_path / "in")
    assert receipt.files and receipt.files.counts.rejects == {"fetch_failed": len(urls)}
    messages = column(tmp_path / "out" / receipt.files.rejects, "message")
    assert SECRET not in str(messages) and all("127.0.0.1:1/a.jpg: a private address" in m for m in messages[:4])
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []
