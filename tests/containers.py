"""Builders of shards for tests: tars, Parquet files and folders from bytes by name; a folder over HTTP."""

import functools
import gzip
import http.server
import io
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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
