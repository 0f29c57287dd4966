"""Daft: paths from a glob, their bytes by its downloader, a class with the model as a batch UDF, Parquet.

Settings: one instance a core, each in a process of its own with one thread of torch, batches of 32.
"""

import io
import os
import time
from pathlib import Path
from typing import Any

import daft
import torch
from daft import DataType, Series, col
from PIL import Image

from benchmarks.peers.embedder import Embedder, transform_of
from benchmarks.peers.job import BATCH, TOP, Job, job_flags, job_of, marked, tell


def embed_class(job: Job, dim: int, processes: int) -> Any:
    columns = {
        "embedding": DataType.fixed_size_list(DataType.float32(), dim),
        "topk_index": DataType.fixed_size_list(DataType.int32(), TOP),
        "topk_score": DataType.fixed_size_list(DataType.float32(), TOP),
    }

    @daft.cls(max_concurrency=processes, use_process=processes > 1)
    class Embed:
        def __init__(self) -> None:
            self.embedder = Embedder(job, (os.cpu_count() or 1) // processes)
            self.transform = transform_of(job.model)

        @daft.method.batch(return_dtype=DataType.struct(columns), unnest=True, batch_size=BATCH)
        def embed(self, data: Series) -> list[dict[str, Any]]:
            images = [self.transform(Image.open(io.BytesIO(d)).convert("RGB")) for d in data.to_pylist()]
            found = self.embedder(torch.stack(images))
            return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    return Embed()


def dimension(job: Job) -> int:
    """The embedding's size, which Daft wants to know of its columns beforehand."""
    import timm

    return int(timm.create_model(job.model).head_hidden_size)


@daft.func
def sample_id(path: str) -> str:
    return f"{Path(path).parent.name}/{Path(path).stem}"


def main() -> None:
    parser = job_flags(__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    job = job_of(asked)
    model = embed_class(job, dimension(job), asked.processes)
    frame = daft.from_glob_path(f"{job.files}/*/*.jpg")
    frame = frame.select(sample_id(col("path")).alias("id"), col("path").download().alias("data"))
    frame = frame.select(col("id"), model.embed(col("data")))
    frame.write_parquet(str(job.output))
    tell(time.time() - max(marked(job, "ready")), min(marked(job, "first")))


if __name__ == "__main__":
    main()
