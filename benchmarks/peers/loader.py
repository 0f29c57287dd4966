"""torch's DataLoader over webdataset: its workers read, decode and transform, this process runs the model.

Settings: as many workers as cores, batches made by the workers (webdataset's advice), and the model's `--threads` as
given.
"""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import webdataset as wds

from benchmarks.peers.embedder import Embedder, transform_of
from benchmarks.peers.job import BATCH, job_flags, job_of, marked, tell
from benchmarks.peers.plain import table


def main() -> None:
    parser = job_flags(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    job = job_of(asked)
    embedder, transform = Embedder(job, asked.threads), transform_of(job.model)

    def sample(raw: dict[str, Any]) -> tuple[str, Any]:
        return f"{Path(raw['__url__']).stem}/{raw['__key__']}", transform(raw["jpg"])

    started = time.time()
    dataset = wds.WebDataset(job.shards(), shardshuffle=False).decode("pil").map(sample).batched(BATCH)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=os.cpu_count() or 1)
    ids, columns = [], []
    for names, images in loader:
        ids += names
        columns.append(embedder(images))
    pq.write_table(table(ids, columns), job.output / "embeddings.parquet")
    tell(time.time() - started, min(marked(job, "first")))


if __name__ == "__main__":
    main()
