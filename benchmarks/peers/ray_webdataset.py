"""Ray Data from the tars: `read_webdataset` → decoding to uint8 in tasks → an actor that normalises and embeds.

The best that is known of that arrangement: raw bytes out of the reader (its own decoder holds 512 decoded photos), and
a quarter of the bytes between the stages. Settings as in `ray_images`.
"""

import io
from pathlib import Path

import numpy as np
import ray
import timm
import torch
from PIL import Image

from benchmarks.peers.embedder import data_config
from benchmarks.peers.job import BATCH, Job
from benchmarks.peers.ray_images import Model, asked_with, infer_and_write


class FromLevels(Model):
    """The actor, of uint8 images."""

    def __init__(self, job: Job, threads: int):
        super().__init__(job, threads)
        config = data_config(job.model)
        self.mean, self.std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = torch.as_tensor(batch["image"]).float().div(255).sub(self.mean).div(self.std)
        return super().__call__({"id": batch["id"], "image": images})


def main() -> None:
    job, threads = asked_with(__doc__)
    transform = timm.data.create_transform(**data_config(job.model), use_prefetcher=True)  # up to the uint8 pixels

    def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        stems = [Path(path).stem for path in batch["path"]]
        images = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch["jpg"]]
        ids = [f"{stem}/{key}" for stem, key in zip(stems, batch["__key__"], strict=True)]
        return {"id": np.array(ids), "image": np.stack(images)}

    dataset = ray.data.read_webdataset(job.shards(), decoder=None, include_paths=True)
    infer_and_write(dataset.map_batches(decode, batch_size=BATCH), FromLevels, job, threads)


if __name__ == "__main__":
    main()
