"""How many workers the nodes of a cluster get, with how much of a GPU and how many threads each."""

import pytest

from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.layout import UNITS, Layout, Node, lay_out, threads_alone
from pipeline.machine import CPU_WORKER_BYTES

GB = 2**30


def node(cpus: int, gpus: float = 0, memory_gb: float = 512, lendable_gb: float | None = None) -> Node:
    lendable = int((memory_gb * 0.7 if lendable_gb is None else lendable_gb) * GB)
    return Node(id="x", name="x", cpus=cpus, gpus=gpus, memory=int(memory_gb * GB), lendable=lendable)


def asked(**config: object) -> RunConfig:
    return RunConfig(inputs=("x",), output="y", model="z", **config)  # type: ignore[arg-type]


def sized(cpus: int, gpus: int, memory_gb: int = 512, todo: int = 1000, **config: object) -> tuple[object, float, int]:
    """(least, most), GPUs and threads of each, on one node."""
    got = lay_out(asked(**config), "cuda", [node(cpus, gpus, memory_gb)], 1000, todo)
    return got.actors, got.gpus, got.threads


def on_cpus(*nodes: Node, shards: int = 1000, todo: int = 1000, can_grow: bool = False, **config: object) -> Layout:
    return lay_out(asked(**config), "cpu", nodes, shards, todo, can_grow)


def fitting(got: Layout, *cpus: int) -> list[int]:
    """How many workers Ray puts on nodes of so many CPUs at most."""
    return [int(c * UNITS) // round(got.cpus * UNITS) for c in cpus]


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
    cpus: int, gpus: int, workers: int, each: float, threads: int
) -> None:
    """One for five cores of each GPU, four at most; together they fit it, and their threads fit the cores."""
    got, share, decoding = sized(cpus, gpus)
    assert (got, share, decoding) == ((workers, workers), each, threads)
    assert workers * share <= gpus and workers * decoding <= cpus


def test_little_memory_means_fewer_workers() -> None:
    """Each takes gigabytes of the host, beside what it takes of the device."""
    assert sized(64, 1, memory_gb=16)[:2] == ((2, 2), 0.5)
    assert sized(64, 1, memory_gb=4)[:2] == ((1, 1), 1.0)


def test_flags_come_first() -> None:
    """--actors alone shares the GPUs evenly; --gpus-per-actor alone fills them; both are taken as they are."""
    assert sized(16, 1, actors=(4, 4)) == ((4, 4), 0.25, 4)
    assert sized(16, 2, actors=(3, 3)) == ((3, 3), 0.5, 5)
    assert sized(16, 2, actors=(1, 2)) == ((1, 2), 1.0, 8)
    assert sized(16, 2, gpus_per_actor=0.2) == ((10, 10), 0.2, 1)
    assert sized(16, 1, gpus_per_actor=1 / 3) == ((3, 3), 1 / 3, 5)
    assert sized(16, 1, gpus_per_actor=1.0) == ((1, 1), 1.0, 16)
    with pytest.raises(UsageError, match=r"--actors 3 with 0.5 GPUs each: there is 1"):
        sized(16, 1, actors=(3, 3), gpus_per_actor=0.5)


def test_few_shards_take_few_workers_and_no_other_share() -> None:
    """What is left of a run has the share, and so the batch size, of the whole one."""
    assert sized(16, 1, todo=1) == ((1, 1), 0.3333, 5)
    assert on_cpus(node(4), todo=1).threads == on_cpus(node(4)).threads == 1


def test_one_machine_is_planned_alike_before_ray_is_there() -> None:
    """What is compiled for so many threads is what the workers run."""
    for cpus, shards, actors in ((2, 9, None), (4, 1, None), (7, 9, (2, 2)), (2, 9, (4, 4))):
        got = on_cpus(node(cpus), shards=shards, todo=shards, actors=actors)
        assert got.threads == threads_alone(asked(actors=actors), cpus, 512 * GB, shards)


def test_workers_on_cpus_fit_their_nodes_and_leave_a_bit_of_each() -> None:
    """Two CPUs in the whole cluster are enough; unlike nodes get what each can hold; no node's last CPU is taken."""
    assert (on_cpus(node(2)).actors, fitting(on_cpus(node(2)), 2)) == ((2, 2), [2])
    assert (on_cpus(node(1), node(1)).actors, fitting(on_cpus(node(1), node(1)), 1)) == ((2, 2), [1])
    mixed = on_cpus(node(0), node(2), node(8))
    assert (mixed.actors, mixed.threads, fitting(mixed, 2, 8)) == ((10, 10), 1, [2, 8])
    assert on_cpus(node(4), node(4), shards=3, todo=3).threads == 2, "each worker's threads are on one node"
    for got, cpus in ((on_cpus(node(2)), 2), (mixed, 8)):
        assert got.cpus * cpus < cpus
    crowded = on_cpus(node(2), actors=(4, 4))
    assert crowded.actors == (4, 4) and fitting(crowded, 2)[0] >= 4


def test_a_node_of_little_memory_gets_its_own_share() -> None:
    """Where memory binds before cores do, Ray counts it too: eight cores with 8 GB have two workers, not eight."""
    got = on_cpus(node(8, memory_gb=8, lendable_gb=6), node(4))
    assert (got.actors, got.memory) == ((6, 6), CPU_WORKER_BYTES) and 6 * GB // got.memory == 2
    assert got.threads == 1 and fitting(got, 4) == [4], "two and four are six, of one thread each"
    assert on_cpus(node(8, memory_gb=8)).memory == 0, "on one node the count is enough"


def test_a_pool_that_breathes_asks_for_what_it_uses() -> None:
    """So that more workers than fit wait, and their waiting makes the cluster grow; shards bound it."""
    got = on_cpus(node(2), actors=(1, 8))
    assert (got.actors, got.threads, fitting(got, 2)) == ((1, 8), 1, [2])
    grown = on_cpus(node(4), can_grow=True, actors=(6, 8), todo=7)
    assert (grown.actors, fitting(grown, 4)) == ((6, 7), [4])
    with pytest.raises(UsageError, match="no node has a CPU"):
        on_cpus(node(0))


def growing(device: str, *nodes: Node, actors: tuple[int, int] = (1, 16), **config: object) -> Layout:
    return lay_out(asked(actors=actors, **config), device, [node(0), *nodes], 1000, 1000, can_grow=True)


def test_a_cluster_that_grows_uses_all_of_each_node() -> None:
    """`--actors 1:16` on the first of eight GPU nodes: no more workers share its cores than its GPU takes."""
    gpu = node(16, gpus=1, memory_gb=64)
    halves = growing("cuda", gpu, gpus_per_actor=0.5)
    assert (halves.actors, halves.gpus, halves.threads, fitting(halves, 16)) == ((1, 16), 0.5, 8, [2])
    assert growing("cuda", *[gpu] * 8, gpus_per_actor=0.5) == halves, "the same when all are there"
    by_cores = growing("cuda", gpu)
    assert (by_cores.gpus, by_cores.threads, fitting(by_cores, 16)) == (0.3333, 5, [3]), "not all on the one GPU"
    assert growing("cuda", *[gpu] * 16).gpus == growing("cuda", gpu, actors=(1, 1)).gpus == 1.0, "as many as GPUs"
    small = growing("cpu", node(8, memory_gb=8, lendable_gb=6))
    assert (small.threads, fitting(small, 8), 6 * GB // small.memory) == (4, [2], 2)
    fixed = lay_out(asked(actors=(1, 16), gpus_per_actor=0.5), "cuda", [gpu], 1000, 1000)
    assert (fixed.actors, fixed.threads) == ((1, 16), 8), "nor where it cannot"


def test_workers_threads_are_on_the_node_that_has_the_gpu() -> None:
    """Cores beside one GPU are no help to those beside eight others."""
    got = lay_out(asked(gpus_per_actor=1.0), "cuda", [node(64, gpus=1), node(16, gpus=8)], 1000, 1000)
    assert (got.actors, got.threads) == ((9, 9), 2) and fitting(got, 16)[0] >= 8


def test_feeders_come_first_and_by_themselves_where_they_help() -> None:
    """Their CPUs are set aside; left to us, all CPUs feed where nodes without a GPU have most of them."""
    got = on_cpus(node(2), actors=(1, 1), feeders=1)
    assert (got.feeders, got.cpus) == (1, 0.5)
    assert on_cpus(node(2), actors=(1, 1), feeders=2).cpus == 0.0
    assert on_cpus(node(2), node(2)).feeders == 0, "CPUs alone read for themselves"
    with pytest.raises(UsageError, match="--feeders 5: there are 4 CPUs"):
        on_cpus(node(2), node(2), feeders=5)

    def on_gpus(*nodes: Node, **config: object) -> Layout:
        return lay_out(asked(**config), "cuda", nodes, 1000, 1000)

    rich = on_gpus(node(8, gpus=1), node(32))
    assert (rich.actors, rich.feeders, rich.cpus) == ((1, 1), 39, 0.0)
    assert on_gpus(node(8, gpus=1), node(4)).feeders == 0, "too few elsewhere"
    assert on_gpus(node(32, gpus=1), node(64)).feeders == 0, "its own cores are enough"
    assert on_gpus(node(8, gpus=1), node(32), feeders=0).feeders == 0
    assert on_gpus(node(8, gpus=1), node(32), decode="cuda").feeders == 0
    gpu = node(8, gpus=1)
    assert growing("cuda", gpu, node(32), gpus_per_actor=1.0).feeders == 39, "the first worker has them all"
    assert growing("cuda", gpu, feeders=64).feeders == 4, "an autoscaler brings their nodes too"
