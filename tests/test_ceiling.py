"""From what stages cost to the ceiling and the setting: by numbers that are easy to check."""

from dataclasses import replace

import pytest

from pipeline.ceiling import Ceiling, Decoding, Forward, Room, ceiling, chosen, workers_on_gpus
from pipeline.measure import Cost, Difference

CPU, GPU = Room(cores=2, gpus=0, workers=2), Room(cores=16, gpus=1, workers=1)


def cost(ms: float, images_per_s: float | None = None) -> Cost:
    """Of CPU an image; on the clock the same unless said otherwise."""
    return Cost(1000, 1000 / images_per_s if images_per_s else ms, ms)


def decoding(decode: str, ms: float, threads_images_per_s: float = 0.0) -> Decoding:
    together = cost(ms, threads_images_per_s or 2000 / ms)
    return Decoding(decode=decode, one=cost(ms), all=together, difference=Difference(0, 0.0, 1.0))


def forward(ms: float, images_per_s: float | None = None) -> Forward:
    return Forward(
        engine="eager", precision="bf16", batch_size=32, start_s=1.0, cost=cost(ms, images_per_s), cosine=1.0
    )


def top(room: Room, decode: Decoding, compute: Forward, read: Cost = cost(0.1), write: Cost = cost(0.1)) -> Ceiling:
    return ceiling(room, decode, compute, read=read, transfer=cost(0.3), write=write)


def test_on_the_cpu_all_stages_share_the_cores() -> None:
    """2 cores and 10 ms of CPU an image are 200 images/s; the largest cost is what limits."""
    found = top(CPU, decoding("exact", 2.5), forward(7.0))
    assert (found.images_per_s, found.limited_by) == (pytest.approx(200), "forward")
    assert found.alone["decode"] == pytest.approx(800)


def test_a_slow_store_or_disk_has_a_thread_of_each_worker() -> None:
    """Waiting takes no core and limits all the same."""
    slow = cost(0.1, images_per_s=40)
    assert top(CPU, decoding("exact", 2.5), forward(7.0), read=slow).limited_by == "read"
    written = top(CPU, decoding("exact", 2.5), forward(7.0), write=slow)
    assert (written.limited_by, written.images_per_s) == ("write", pytest.approx(80))


def test_on_a_gpu_the_cores_only_feed() -> None:
    """The device limits where the cores can decode more than it takes, else they do."""
    device = forward(1.0, images_per_s=4000)
    fast, slow = decoding("fast", 1.5), decoding("exact", 7.5)
    assert (top(GPU, fast, device).images_per_s, top(GPU, fast, device).limited_by) == (pytest.approx(4000), "forward")
    assert (top(GPU, slow, device).images_per_s, top(GPU, slow, device).limited_by) == (pytest.approx(2000), "decode")


def test_a_gpu_that_decodes_too_has_two_things_to_do() -> None:
    """At 4,000 a second each it is 2,000 together, and the cores have their part of the decoding."""
    there = replace(decoding("cuda", 0.1), there=cost(0.1, images_per_s=4000))
    found = top(GPU, there, forward(1.0, images_per_s=4000))
    assert (found.images_per_s, found.limited_by) == (pytest.approx(2000), "forward")


@pytest.mark.parametrize(
    ("images_per_s", "mode"),
    [({"exact": 100, "fast": 102}, "exact"), ({"exact": 100, "fast": 130, "scaled": 300}, "fast")],
)
def test_exact_stays_unless_a_run_gains_by_another(images_per_s: dict[str, float], mode: str) -> None:
    """3 % and more; what is scaled is never advised."""
    of_mode = {
        m: Ceiling(images_per_s=rate, limited_by="decode", cpu_ms={}, alone={}) for m, rate in images_per_s.items()
    }
    assert chosen([decoding(m, 1.0) for m in of_mode], of_mode).decode == mode


def test_a_gpu_has_the_workers_that_its_decoding_takes() -> None:
    """One process decodes 2,500 a second, whatever its threads: for 6,000 it takes three, for 2,600 one will do."""
    exact = decoding("exact", 2.5, threads_images_per_s=2500)
    assert [workers_on_gpus(GPU, exact, wanted) for wanted in (500, 2600, 6000)] == [1, 1, 3]
    assert workers_on_gpus(Room(cores=64, gpus=4, workers=4), exact, 20_000) == 8
