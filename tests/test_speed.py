"""What a run says of its speed is true: each case is built, by slow parts in a real embedder or by receipts by hand."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_tar
from pictures import jpeg

from pipeline import embed as embed_module
from pipeline import feed as feed_module
from pipeline.columns import Columns
from pipeline.embed import STAGES, Embedder
from pipeline.listing import list_shards
from pipeline.rows import ShardWriter
from pipeline.speed import Means, Speed, Sums

ONE = Means(cores=8, threads=2)  # more cores than the embedder has threads, so that they are never the limit here


def told(*receipts: object, means: Means = ONE) -> Speed:
    sums = Sums()
    for receipt in receipts:
        sums.add(receipt)  # type: ignore[arg-type]
    return sums.speed(means)


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: object, **kwargs: object) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return slow


def each_slowed(samples: Callable[..., Iterator[Any]], seconds: float) -> Callable[..., Iterator[Any]]:
    def slow(*args: object) -> Iterator[Any]:
        for sample in samples(*args):
            time.sleep(seconds)
            yield sample

    return slow


def slow_store(embedder: Embedder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(feed_module, "read_samples", each_slowed(feed_module.read_samples, 0.02))


def slow_decoder(embedder: Embedder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedder._feed, "_decoder", slowed(embedder._feed._decoder, 0.04))


def slow_device(embedder: Embedder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embedder.backbone, "_forward", slowed(embedder.backbone._forward, 0.08))


def slow_writer(embedder: Embedder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardWriter, "rows", slowed(ShardWriter.rows, 0.08))


def slow_publishing(embedder: Embedder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(embed_module, "publish", slowed(embed_module.publish, 0.8))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of one forward pass wait for each other, the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 20 small images; one run before, so that what is slow once is over."""
    folder = tmp_path_factory.mktemp("speed")
    for name in "xy":
        write_tar(folder / "in" / f"{name}.tar", {f"{i}.jpg": jpeg(40, 40, seed=i) for i in range(20)})
    made.embed(made.job(folder / "warm"), folder / "in")
    return folder / "in"


SLOW = {
    "read": slow_store,
    "decode": slow_decoder,
    "forward": slow_device,
    "write": slow_writer,
    "write, at a shard's end": slow_publishing,
}


@pytest.mark.parametrize("case", SLOW)
def test_the_slow_part_is_named(case: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store, decoder, device or writer is what limits; the ceiling is what it would give without a pause."""
    embedder = made.embedder(made.job(tmp_path))
    SLOW[case](embedder, monkeypatch)
    speed = told(*made.receipts(embedder, list_shards([str(tars)])))
    stage = case.partition(",")[0]
    assert speed.limited_by == stage, speed.sentence
    assert speed.of_ceiling >= speed.stage_busy[stage] == max(speed.stage_busy.values()) > 0.7
    assert speed.ceiling_images_per_s == pytest.approx(speed.images_per_s / speed.of_ceiling)
    assert speed.ceiling_images_per_s <= 50.5  # each of them gives an image in 20 ms
    assert f"limited by {stage}" in speed.sentence


def test_images_that_come_late_from_urls_are_the_stores_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the decoding threads that wait for them, and they are not to blame."""
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpeg(40, 40))
    pq.write_table(pa.table({"url": [str(tmp_path / "a.jpg")] * 80}), tmp_path / "in" / "x.parquet")
    monkeypatch.setattr(feed_module, "fetch", slowed(feed_module.fetch, 0.15))
    listed = list_shards([str(tmp_path / "in")], columns=Columns(allow_urls=(str(tmp_path),)))
    speed = told(*made.receipts(made.embedder(made.job(tmp_path / "out")), listed))
    assert speed.limited_by == "read" and "decoders" in speed.sentence, speed.sentence


@pytest.mark.parametrize(("limit", "side", "model"), [("decode", 900, "test_vit"), ("forward", 40, "pit_ti_224")])
def test_work_on_the_cpu_is_told_apart(limit: str, side: int, model: str, tmp_path: Path) -> None:
    """Large images and a tiny model are decode-bound, tiny images and a larger model are not."""
    image = jpeg(side, side)
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": image for i in range(24)})
    speed = told(*made.embed(made.job(tmp_path / "out", model=model), tmp_path / "in"), means=Means(cores=2, threads=2))
    assert max(speed.cpu_seconds, key=lambda stage: speed.cpu_seconds[stage]) == limit, speed
    assert speed.limited_by in (limit, "waiting"), speed.sentence  # where others take the cores
    assert sum(speed.cpu_seconds.values()) > 0.05


def test_few_images_are_limited_by_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch goes through one stage after the other: none of them is called the limit."""
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": jpeg(40, 40, seed=i) for i in range(4)})
    embedder = made.embedder(made.job(tmp_path / "out"))
    for slow in (slow_store, slow_decoder, slow_device, slow_writer):
        slow(embedder, monkeypatch)
    speed = told(*made.receipts(embedder, list_shards([str(tmp_path / "in")])))
    assert speed.limited_by == "waiting" and "too few images" in speed.sentence
    assert 0 < speed.of_ceiling < 0.8 and speed.ceiling_images_per_s > speed.images_per_s


def test_nothing_to_do() -> None:
    """A run that found everything done has no speed and no limit."""
    found = made.receipt("a", 0, 1, 50, embedded=False, seconds={"read": 1.0})
    for speed in (told(), told(found)):
        assert (speed.limited_by, speed.images_per_s, speed.ceiling_images_per_s) == ("nothing to do", 0.0, None)
        assert speed.as_dict()["stage_busy"] == dict.fromkeys(STAGES, 0.0)


def test_the_steady_rate_is_of_a_workers_second_times_workers() -> None:
    """One that started later or had fewer shards does not look slow; one that died and its successor are one."""
    two = told(made.receipt("a", 0, 10, 100), made.receipt("a", 9, 20, 100), made.receipt("b", 15, 25, 100))
    assert two.images_per_s == pytest.approx(2 * 300 / (20 + 10))
    after = told(made.receipt("a", 0, 10, 100), made.receipt("b", 10, 20, 100))
    assert after.images_per_s == pytest.approx(10)


def test_cores_that_are_all_taken_come_before_threads_that_wait_for_them() -> None:
    """Two workers on two cores: each thread looks busy, and it is the forward pass that takes the cores."""
    seconds = {"read": 1.0, "decode": 9.9, "forward": 9.5, "write": 0.5}
    cpu = {"read": 0.1, "decode": 1.4, "forward": 8.0, "write": 0.1, "process": 9.8}
    both = [made.receipt(worker, 0, 10, 400, seconds=seconds, cpu_s=cpu) for worker in "ab"]
    speed = told(*both, means=Means(cores=2, threads=1))
    assert (speed.limited_by, speed.images_per_s) == ("forward", 80)
    assert speed.of_ceiling == speed.cores_busy == pytest.approx(0.98)
    assert speed.ceiling_images_per_s == pytest.approx(80 / 0.98)  # 2 cores / 24.5 ms of CPU an image
    assert speed.stage_busy["decode"] == pytest.approx(0.99)
    assert "cores 98% busy with forward 84%, decode 14%" in speed.sentence


def test_threads_of_the_forward_pass_count() -> None:
    """Its own thread knows only its share; the rest of the process's CPU seconds is its threads'."""
    cpu = {"decode": 4.0, "forward": 3.0, "process": 19.5}
    of_two = made.receipt("a", 0, 10, 100, seconds={"decode": 6.0, "forward": 8.0}, cpu_s=cpu)
    speed = told(of_two, means=Means(cores=2, threads=2))
    assert speed.cpu_seconds["forward"] == pytest.approx(15.5) and speed.limited_by == "forward"
    most = told(of_two, means=Means(cores=2, threads=1)).cpu_seconds["forward"]
    assert most == pytest.approx(8.0)  # a thread for 8 s: what is beyond is of another library's threads


def test_feeders_read_and_decode_with_cores_of_their_own() -> None:
    """Their threads have their seconds; the cores have it all the same."""
    cpu = {"read": 1.0, "decode": 30.0, "forward": 3.0, "process": 4.0}
    fed = made.receipt("a", 0, 10, 100, seconds={"read": 4.0, "decode": 38.0, "forward": 3.0}, cpu_s=cpu)
    speed = told(fed, means=Means(cores=8, threads=8, streams=4))
    assert (speed.limited_by, speed.of_ceiling) == ("decode", pytest.approx(0.95))
    assert speed.stage_busy["read"] == pytest.approx(0.1)
    assert speed.cpu_seconds["forward"] == pytest.approx(4.0) and speed.cores_busy == pytest.approx(35 / 80)


CUDA = Means(cores=16, threads=4, gpus=0.25)


@pytest.mark.parametrize(
    ("seconds", "cpu", "limit", "of_ceiling"),
    [
        ({"forward": 2.4, "launch": 9.5, "decode": 20.0}, {"decode": 18.0, "launch": 2.0}, "forward", 0.96),
        ({"forward": 1.0, "launch": 2.0, "decode": 39.0}, {"decode": 36.0, "launch": 2.0}, "decode", 0.95),
        ({"forward": 1.0, "launch": 9.0, "decode": 9.0}, {"decode": 9.0, "launch": 9.0}, "forward", 0.9),
        ({"forward": 1.0, "launch": 1.0, "decode": 9.0, "read": 9.7}, {"decode": 9.0}, "read", 0.97),
        ({"forward": 1.0, "launch": 1.0, "transfer": 8.1}, {"transfer": 8.0}, "transfer", 0.91),
        ({"forward": 1.5, "launch": 4.0, "decode": 20.0}, {"decode": 20.0}, "waiting", 0.6),
    ],
)
def test_four_actors_share_a_gpu(
    seconds: dict[str, float], cpu: dict[str, float], limit: str, of_ceiling: float
) -> None:
    """The device has its seconds once, the threads have theirs each; the CPU that waiting for it burns is no work."""
    spun = {"forward": 9.0, "process": 40.0}
    speed = told(*(made.receipt(w, 0, 10, 1000, seconds=seconds, cpu_s=cpu | spun) for w in "abcd"), means=CUDA)
    assert (speed.limited_by, speed.of_ceiling) == (limit, pytest.approx(of_ceiling))
    assert speed.images_per_s == pytest.approx(400)
    assert speed.device_busy == pytest.approx(4 * seconds["forward"] / 10)


def test_two_gpus_have_twice_the_seconds() -> None:
    """Eight actors with a quarter each: half of both devices is used."""
    eight = [made.receipt(w, 0, 10, 1000, seconds={"forward": 1.25}) for w in "abcdefgh"]
    assert told(*eight, means=CUDA).device_busy == pytest.approx(0.5)


def test_a_failed_shard_took_its_time_too() -> None:
    """Its seconds count as work, its images do not; what another run was faster with counts as neither."""
    failed = made.receipt("a", 10, 20, 0, files=None, error="write: full", embedded=False, seconds={"write": 10.0})
    theirs = made.receipt("a", 90, 90, 70, embedded=False)
    speed = told(made.receipt("a", 0, 10, 100, seconds={"write": 9.0}), failed, theirs)
    assert (speed.limited_by, speed.images_per_s, speed.of_ceiling) == ("write", 5.0, pytest.approx(0.95))
