"""Shards for tests: built from bytes by name, read to the last sample; a folder over HTTP, a store with faults."""

import functools
import gzip
import http.server
import io
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.columns import UNNAMED, Columns
from pipeline.listing import Shard
from pipeline.shards import Sample, read_keys, read_samples

Fault = Callable[[bytes], bytes]


def tar_bytes(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A plain tar of the members in order; a list of pairs where one name comes twice."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """A tar at `path`, gzipped where the name ends with `gz`."""
    content = tar_bytes(members)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.name.endswith("gz") else content)
    return path


def write_parquet(path: Path, images: Sequence[bytes | None], row_group_rows: int = 100, **columns: Any) -> Path:
    """A Parquet file with the binary column `image` and any others; pages of few rows, with checksums."""
    table = pa.table({"image": pa.array(images, pa.binary()), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table, path, row_group_size=row_group_rows, use_dictionary=False, data_page_size=4096, write_page_checksum=True,
        write_batch_size=8,
    )  # fmt: skip
    return path


def write_folder(path: Path, images: Mapping[str, bytes]) -> Path:
    """A folder of files by their paths below it."""
    for name, content in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def shard_of(path: Path, form: str, columns: Columns = UNNAMED) -> Shard:
    return Shard(
        name="s", format=form, url=str(path), size=path.stat().st_size, etag="0" * 16, columns=columns
    )  # fmt: skip


def samples_of(path: Path, form: str = "webdataset", columns: Columns = UNNAMED) -> list[Sample]:
    """All samples, after the promises that hold for each shard: rows count up, ids are unique, `read_keys` agrees."""
    shard = shard_of(path, form, columns)
    samples = list(read_samples(shard))
    assert [s.row for s in samples] == list(range(len(samples)))
    assert len({s.id_key for s in samples}) == len(samples)
    assert list(read_keys(shard)) == [s.id_key for s in samples]
    assert all(not s.image for s in samples if s.reject and s.reject.reason != "duplicate_key")
    return samples


def told(samples: list[Sample]) -> list[tuple[str, bytes | str]]:
    """Key and image, or the reason why there is none."""
    return [(s.key, s.reject.reason if s.reject else s.image) for s in samples]


def tar_of(tmp_path: Path, content: bytes) -> list[tuple[str, bytes | str]]:
    (tmp_path / "x.tar").write_bytes(content)
    return told(samples_of(tmp_path / "x.tar"))


class growth:
    """Measures by how many bytes this process grows at its largest, page for page, whoever takes them."""

    def __enter__(self) -> "growth":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = _resident("VmHWM") - self._before


def _resident(what: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) * 1024


class serving:
    """An HTTP server of a folder on a free port; gives its URL."""

    def __init__(self, folder: Path):
        handler = functools.partial(Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class FlakyStore(MemoryFileSystem):
    """fsspec's memory behind faults: `reads` and `writes` hold, for the next calls, an error or a way to spoil bytes.

    It counts as a bucket, so its own `mode="create"` is used; a write's fault strikes after the object was put where
    `is_answer_lost`. `closed` names folders that cannot be listed, found by fsspec's generic walk.
    """

    protocol = ("flaky", "gs")
    find = fsspec.AbstractFileSystem.find
    reads: ClassVar[list[Exception | Fault]] = []
    writes: ClassVar[list[Exception]] = []
    is_answer_lost = False
    closed: ClassVar[set[str]] = set()
    calls = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("flaky://")))

    def unstrip_protocol(self, name: str) -> str:
        return f"flaky://{name}"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if self._strip_protocol(path) in self.closed:
            raise PermissionError(path)
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        FlakyStore.calls += 1
        fault = self.reads.pop(0) if self.reads else None
        if isinstance(fault, Exception):
            raise fault
        data = bytes(super().cat_file(path, start=start, end=end))
        return fault(data) if fault else data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        FlakyStore.calls += 1
        fault = self.writes.pop(0) if self.writes else None
        if fault is None or self.is_answer_lost:
            super().pipe_file(path, value, mode=mode)
        if fault is not None:
            raise fault


def clear_memory() -> None:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
