"""Ray Data as its page on batch inference with images has it: `read_images`, a float32 transform a row, an actor.

Settings: Ray counts one CPU more than there are, one for the actor and the rest for decoding (better than counting
them truly, measured), and the model's `--threads` as given. Reading waits for the actor (a setting of Ray Data), and
the workers have imported torch before it, so that the steady rate has neither imports nor a head start in it.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from benchmarks.peers.embedder import Embedder, transform_of
from benchmarks.peers.job import BATCH, Job, job_flags, job_of, marked, tell


class Model:
    """The actor: preprocessed float32 images, or uint8 ones with their mean and standard deviation."""

    def __init__(self, job: Job, threads: int):
        self.embedder = Embedder(job, threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"], **self.embedder(torch.as_tensor(batch["image"]))}


def start(cpus: int) -> None:
    """Ray with so many CPUs, its workers up and their imports done."""
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, configure_logging=False)
    context = ray.data.DataContext.get_current()
    context.wait_for_min_actors_s = 300
    context.enable_progress_bars = False
    ray.get([warm.remote() for _ in range(cpus)])


@ray.remote(num_cpus=1)
def warm() -> None:
    transform_of("resnet18")
    time.sleep(1)  # so that each worker gets one


def infer_and_write(dataset: ray.data.Dataset, model: type, job: Job, threads: int) -> None:
    """The end of both scripts: one actor, Parquet, and what it came to."""
    vectors = dataset.map_batches(
        model,
        fn_constructor_args=(job, threads),
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=BATCH,
    )
    vectors.write_parquet(str(job.output))
    ended = time.time()
    tell(ended - max(marked(job, "ready")), min(marked(job, "first")))


def asked_with(description: str | None) -> tuple[Job, int]:
    """The job and the model's threads; Ray is started."""
    parser = job_flags(description)
    cores = os.cpu_count() or 1
    parser.add_argument("--cpus", type=int, default=cores + 1)
    parser.add_argument("--threads", type=int, default=cores)
    asked = parser.parse_args()
    start(asked.cpus)
    return job_of(asked), asked.threads


def main() -> None:
    job, threads = asked_with(__doc__)
    transform = transform_of(job.model)

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        path = Path(row["path"])
        image = transform(Image.fromarray(row["image"]))
        return {"id": f"{path.parent.name}/{path.stem}", "image": image.numpy()}

    dataset = ray.data.read_images(str(job.files), mode="RGB", include_paths=True)
    infer_and_write(dataset.map(preprocess), Model, job, threads)


if __name__ == "__main__":
    main()
