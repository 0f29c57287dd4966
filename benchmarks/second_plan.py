"""The second plan, `--feeders`, on a model of the machine that it is for: few cores beside a fast device.

    python benchmarks/second_plan.py --photos DIR [--rounds 5] [--device-images-per-s 2000] [--nodes 3]

The device is modelled by a sleep, the actor is pinned to one core. `alone`: the actor reads and decodes by itself;
`fed`: so many feeders do, anywhere on this machine. Speeds are steady, in images/s, medians of rounds in turns.

First the inner pipeline alone; then `embed` on a local cluster, whose one node with a device lends the actor its one
core, and whose other nodes, a CPU each, have none. At last both plans embed there with a real model, and their rows are
compared bit by bit.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
os.environ["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"

import made  # noqa: E402
import torch  # noqa: E402
from containers import write_tar  # noqa: E402

from pipeline import actors, cluster, head  # noqa: E402
from pipeline.actors import EmbedShards, ray  # noqa: E402
from pipeline.backbone import Vectors  # noqa: E402
from pipeline.config import RunConfig, VectorSet  # noqa: E402
from pipeline.embed import Embedder, Feed, Job  # noqa: E402
from pipeline.feed import LocalFeed  # noqa: E402
from pipeline.feeders import RemoteFeed  # noqa: E402
from pipeline.listing import Shard, list_shards  # noqa: E402
from pipeline.shards import read_samples  # noqa: E402

BATCH = 64


class SleepingDevice:
    """In the place of a `Backbone`: takes its time, and the host's threads are free meanwhile."""

    def __init__(self, vectors: VectorSet, images_per_s: float):
        self.preprocessing, self._dim = vectors.preprocessing, vectors.dim
        self.batch_size, self.device, self._images_per_s = BATCH, torch.device("cpu"), images_per_s

    def __call__(self, images: torch.Tensor) -> Vectors:
        time.sleep(len(images) / self._images_per_s)
        return Vectors(torch.ones(len(images), self._dim), torch.ones(len(images)), None, None)


def none_died(shard: str) -> int:
    return 0


def pin() -> None:
    """All threads of this process, and those to come, to one core."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {0})


class PinnedActor:
    """The embedding process with one core."""

    def __init__(self, model: str, decode: str, images_per_s: float, feeders: int):
        vectors = made.vector_set(model, outputs=("embedding",), top_k=0, decode=decode)
        self._job = {"model": model, "outputs": ("embedding",), "top_k": 0, "decode": decode}
        self._device = SleepingDevice(vectors, images_per_s)
        self._feed: Feed = LocalFeed(vectors, 1, BATCH, none_died)
        if feeders:
            self._feed = RemoteFeed(vectors, feeders, none_died)
        pin()

    def images_per_s(self, shards: list[Shard]) -> float:
        with tempfile.TemporaryDirectory() as output:
            embedder = Embedder(made.job(output, **self._job), self._device, self._feed)  # type: ignore[arg-type]
            receipts: list[Any] = []
            embedder(shards, receipts.append)
        samples = sum(r.files.counts.samples for r in receipts)
        return float(samples / (max(r.ended for r in receipts) - min(r.started for r in receipts)))


def machine_model(asked: argparse.Namespace, shards: list[Shard]) -> None:
    cores = os.cpu_count() or 1
    plans = {"alone": 0} | {f"fed by {n}": n for n in sorted({max(1, cores - 1), cores})}
    speeds: dict[str, list[float]] = {plan: [] for plan in plans}
    # All plans' feeders are there at once, and those whose turn it is not do nothing: so a CPU for each of them.
    ray.init(address="local", num_cpus=sum(plans.values()) + 1, include_dashboard=False, log_to_driver=False)
    with cluster.local_ray():
        remote = ray.remote(num_cpus=0)(PinnedActor)
        pool = {p: remote.remote(asked.model, asked.decode, asked.device_images_per_s, n) for p, n in plans.items()}
        for n in range(asked.rounds + 1):
            for plan, actor in pool.items():
                speed = ray.get(actor.images_per_s.remote(shards * 2))
                if n:  # the first one warms up
                    speeds[plan].append(speed)
    ray.shutdown()
    print(f"device {asked.device_images_per_s:.0f} images/s, one core beside it, {asked.decode} decode:")
    show(speeds)


def show(speeds: dict[str, list[float]]) -> None:
    for plan, values in speeds.items():
        ratios = [a / b for a, b in zip(values, speeds["alone"], strict=True)]
        shown = f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        print(f"    {plan}: {shown} images/s, {statistics.median(ratios):.2f} of alone", flush=True)


def worker_of(images_per_s: float) -> type[EmbedShards]:
    """A run's own worker, with one core beside a device that sleeps."""

    class Pinned(EmbedShards):
        def __init__(self, job: Job, *others: Any):
            actors.backbone_of = lambda job: SleepingDevice(job.vectors, images_per_s)  # type: ignore[assignment]
            super().__init__(job, *others)
            pin()

    return Pinned


@contextlib.contextmanager
def local_cluster(nodes: int) -> Iterator[None]:
    """So many nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": head.OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_a_cluster(asked: argparse.Namespace, scratch: Path) -> None:
    """Both plans over `--nodes` nodes: with the sleeping device their speeds, with a model their rows."""
    images = [s.image for shard in list_shards([str(asked.photos)]) for s in read_samples(shard) if not s.reject]
    for i in range(asked.shards):
        write_tar(scratch / "many" / f"{i:05d}.tar", {f"{j}.jpg": image for j, image in enumerate(images[:50])})
    write_tar(scratch / "few" / "x.tar", {f"{j}.jpg": image for j, image in enumerate(images)})
    plans = {"alone": 0, f"fed by {asked.nodes - 1}": asked.nodes - 1}
    real, actors.EmbedShards = actors.EmbedShards, worker_of(asked.device_images_per_s)  # type: ignore[misc]
    speeds: dict[str, list[float]] = {plan: [] for plan in plans}
    for n in range(asked.rounds):
        for plan, feeders in plans.items():
            speeds[plan].append(run(asked, scratch / "many", scratch / f"{n}-{plan}", feeders, outputs=("embedding",)))
    print(f"{asked.nodes} nodes, {asked.shards} shards of 50 photos, `embed`:")
    show(speeds)
    actors.EmbedShards = real  # type: ignore[misc]
    for plan, feeders in plans.items():
        run(asked, scratch / "few", scratch / plan, feeders)
    first, second = (rows(scratch / plan) for plan in plans)
    same = "equal to the bit" if first == second else "DIFFERENT"
    print(f"    {len(first)} rows of {asked.model} in both plans: {same}")


def run(asked: argparse.Namespace, photos: Path, output: Path, feeders: int, **changes: Any) -> float:
    """Steady images/s."""
    from pipeline.run import embed

    config = RunConfig(
        inputs=(str(photos),),
        output=str(output),
        model=asked.model,
        weights="random:0",
        precision="fp32",
        decode=asked.decode,
        actors=(1, 1),
        feeders=feeders,
        **changes,
    )
    result = embed(config, lambda line: None)
    assert result.exit_code == 0, result.message
    return float(result.json["images_per_s"])


def rows(output: Path) -> list[dict[str, Any]]:
    from pipeline import open_dataset

    return sorted(open_dataset(str(output)).to_table().to_pylist(), key=lambda row: row["id"])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--photos", type=Path, required=True, help="a folder of WebDataset tars")
    flags.add_argument("--model", default="test_vit", help="whose input size counts, and which runs on the cluster")
    flags.add_argument("--decode", default="exact")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--device-images-per-s", type=float, default=5000.0)
    flags.add_argument("--nodes", type=int, default=3)
    flags.add_argument("--shards", type=int, default=60, help="of 50 photos, on the cluster")
    asked = flags.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.node()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {asked.model}")
    machine_model(asked, list_shards([str(asked.photos)]))
    with tempfile.TemporaryDirectory() as scratch, local_cluster(asked.nodes):
        on_a_cluster(asked, Path(scratch))


if __name__ == "__main__":
    main()
