"""Hugging Face datasets: its webdataset loader, a batched `map` with the model, `to_parquet`.

Settings: one process a core for loading and mapping, each with one thread of torch. Loading writes the tars' bytes into
Arrow files first; that is its way of reading, so it counts.
"""

import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch

from benchmarks.peers.embedder import Embedder, transform_of
from benchmarks.peers.job import BATCH, Job, job_flags, job_of, marked, tell


@cache
def embedder_of(job: Job, threads: int) -> Embedder:
    return Embedder(job, threads)


def embed(batch: dict[str, list[Any]], job: Job, threads: int) -> dict[str, Any]:
    transform = transform_of(job.model)
    images = torch.stack([transform(image.convert("RGB")) for image in batch["jpg"]])
    stems = [Path(url).stem for url in batch["__url__"]]
    ids = [f"{stem}/{key}" for stem, key in zip(stems, batch["__key__"], strict=True)]
    return {"id": ids, **embedder_of(job, threads)(images)}


def main() -> None:
    parser = job_flags(__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    job = job_of(asked)
    threads = (os.cpu_count() or 1) // asked.processes
    datasets.disable_progress_bars()
    embedder_of(job, threads)  # the processes are forked and inherit it
    started = time.time()
    images = datasets.load_dataset(
        "webdataset",
        data_files={"train": job.shards()},
        split="train",
        cache_dir=str(job.output / ".cache"),
        num_proc=asked.processes,
    )
    vectors = images.map(
        embed,
        batched=True,
        batch_size=BATCH,
        num_proc=asked.processes,
        fn_kwargs={"job": job, "threads": threads},
        remove_columns=images.column_names,
    )
    vectors.to_parquet(str(job.output / "embeddings.parquet"))
    tell(time.time() - started, min(marked(job, "first")))


if __name__ == "__main__":
    main()
