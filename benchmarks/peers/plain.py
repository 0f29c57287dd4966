"""timm in plain loops: one process with all threads, or several with one thread each and their part of the tars.

Settings: threads and processes from the command line; `--decode` other than timm's own takes shard2vec's decoder.
"""

import io
import multiprocessing
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.peers.embedder import Embedder, data_config, transform_of
from benchmarks.peers.job import BATCH, Job, job_flags, job_of, marked, tell


def images(tars: list[str]) -> Iterator[tuple[str, bytes]]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield f"{Path(path).stem}/{member.name.removesuffix('.jpg')}", tar.extractfile(member).read()


def preprocessor(model: str, decode: str) -> Callable[[list[bytes]], torch.Tensor]:
    """Encoded images → float32 (B, 3, H, W), by timm's own transform or by shard2vec's decoder in that mode."""
    if decode == "timm":
        transform = transform_of(model)
        return lambda data: torch.stack([transform(Image.open(io.BytesIO(d)).convert("RGB")) for d in data])

    from pipeline.images import Decoder, Preprocessing

    config = data_config(model)
    decoder = Decoder(Preprocessing.of(config), **({} if decode == "exact" else {"how": decode}))
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))

    def preprocess(data: list[bytes]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([decoder(d).pixels for d in data]))
        return pixels.float().div(255).sub(mean).div(std)

    return preprocess


def loop(job: Job, tars: list[str], threads: int, decode: str, part: int) -> float:
    """Seconds from the first read to the last row written."""
    embedder = Embedder(job, threads)
    preprocess = preprocessor(job.model, decode)
    ids: list[str] = []
    data: list[bytes] = []
    columns: list[dict[str, np.ndarray]] = []
    started = time.time()
    for sample_id, encoded in images(tars):
        ids.append(sample_id)
        data.append(encoded)
        if len(data) == BATCH:
            columns.append(embedder(preprocess(data)))
            data.clear()
    if data:
        columns.append(embedder(preprocess(data)))
    pq.write_table(table(ids, columns), job.output / f"{part}.parquet")
    return time.time() - started


def table(ids: list[str], columns: list[dict[str, np.ndarray]]) -> pa.Table:
    joined: dict[str, Any] = {"id": ids}
    for name in columns[0]:
        values = np.concatenate([c[name] for c in columns])
        joined[name] = pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])
    return pa.table(joined)


def main() -> None:
    parser = job_flags(__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", default="timm")
    asked = parser.parse_args()
    job = job_of(asked)
    parts = [(job, job.shards()[i :: asked.processes], asked.threads, asked.decode, i) for i in range(asked.processes)]
    if asked.processes == 1:
        seconds = [loop(*parts[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
            seconds = pool.starmap(loop, parts, chunksize=1)
    tell(max(seconds), min(marked(job, "first")))


if __name__ == "__main__":
    main()
