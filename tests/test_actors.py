"""How many workers a machine gets, with how much of a GPU and how many threads each."""

import pytest

from pipeline import actors
from pipeline.config import RunConfig
from pipeline.errors import UsageError

GB = 2**30


def sized(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, memory_gb: int = 512, todo: int = 1000, **config: object
) -> tuple[tuple[int, int], float, int]:
    resources = {"CPU": float(cpus), "GPU": float(gpus), "memory": float(memory_gb * GB)}
    monkeypatch.setattr(actors.ray, "cluster_resources", lambda: resources)
    asked = RunConfig(inputs=("x",), output="y", model="z", **config)  # type: ignore[arg-type]
    return actors.size(asked, "cuda", 1000, todo)


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "each", "threads"),
    [
        (16, 1, 3, 0.3333, 5),
        (4, 1, 1, 1.0, 4),
        (8, 1, 1, 1.0, 8),
        (10, 1, 2, 0.5, 5),
        (64, 1, 4, 0.25, 16),
        (128, 8, 24, 0.3333, 5),
        (16, 8, 8, 1.0, 2),
        (1, 1, 1, 1.0, 1),
    ],
)
def test_a_gpu_has_as_many_workers_as_its_cores_feed(
    cpus: int, gpus: int, workers: int, each: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for five cores of each GPU, four at most; together they fit it, and their threads fit the cores."""
    got, share, decoding = sized(monkeypatch, cpus, gpus)
    assert (got, share, decoding) == ((workers, workers), each, threads)
    assert workers * share <= gpus and workers * decoding <= cpus


def test_little_memory_means_fewer_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes gigabytes of the host, beside what it takes of the device."""
    assert sized(monkeypatch, 64, 1, memory_gb=16)[:2] == ((2, 2), 0.5)
    assert sized(monkeypatch, 64, 1, memory_gb=4)[:2] == ((1, 1), 1.0)


def test_flags_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """--actors alone shares the GPUs evenly; --gpus-per-actor alone fills them; both are taken as they are."""
    assert sized(monkeypatch, 16, 1, actors=(4, 4)) == ((4, 4), 0.25, 4)
    assert sized(monkeypatch, 16, 2, actors=(3, 3)) == ((3, 3), 0.5, 5)
    assert sized(monkeypatch, 16, 2, actors=(1, 2)) == ((1, 2), 1.0, 8)
    assert sized(monkeypatch, 16, 2, gpus_per_actor=0.2) == ((10, 10), 0.2, 1)
    assert sized(monkeypatch, 16, 1, gpus_per_actor=1 / 3) == ((3, 3), 1 / 3, 5)
    assert sized(monkeypatch, 16, 1, gpus_per_actor=1.0) == ((1, 1), 1.0, 16)
    with pytest.raises(UsageError, match=r"--actors 3 with 0.5 GPUs each: this machine has 1"):
        sized(monkeypatch, 16, 1, actors=(3, 3), gpus_per_actor=0.5)


def test_few_shards_take_few_workers_and_no_other_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a run has the share, and so the batch size, of the whole one."""
    assert sized(monkeypatch, 16, 1, todo=1) == ((1, 1), 0.3333, 5)


@pytest.mark.parametrize(
    ("shards", "actors_", "threads"), [(1000, None, 1), (3, None, 4), (1, None, 12), (9, (2, 3), 4)]
)
def test_an_engine_is_proven_with_the_workers_threads(
    shards: int, actors_: tuple[int, int] | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cores that this process may use, of a container too, before there is a Ray to ask: as Ray has them."""
    monkeypatch.setattr(actors.machine, "cores", lambda: 12)
    monkeypatch.setattr(actors, "memory_bytes", lambda: 512 * GB)
    monkeypatch.setattr(actors, "_nodes", lambda: 1)
    monkeypatch.setattr(actors.ray, "cluster_resources", lambda: {"CPU": 12.0})
    asked = RunConfig(inputs=("x",), output="y", model="z", actors=actors_)
    assert actors.likely_threads(asked, shards) == actors.size(asked, "cpu", shards, shards)[2] == threads
