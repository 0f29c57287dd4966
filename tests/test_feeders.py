"""The second plan: samples that are read and decoded in other processes become the very same rows."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import made
import oracle
import pyarrow.parquet as pq
import pytest
from containers import write_tar
from pictures import jpeg

from pipeline.actors import ray
from pipeline.embed import Embedder, Receipt
from pipeline.feed import MAX_DEATHS, Fed
from pipeline.feeders import RemoteFeed
from pipeline.flow import Flow
from pipeline.listing import Shard, list_shards

pytestmark = pytest.mark.usefixtures("ray_session")


def tables(receipts: list[Receipt], output: Path) -> dict[str, object]:
    """Every column of every row and reject, by file."""
    names = [name for r in receipts if r.files for name in r.files.names.values()]
    return {name: pq.read_table(output / name).to_pylist() for name in names}


def embed_remotely(output: Path, listed: list[Shard], feed: Callable[..., object]) -> list[Receipt]:
    return made.receipts(Embedder(made.job(output), made.embedder(made.job(output)).backbone, feed), listed)  # type: ignore[arg-type]


def test_rows_and_rejects_are_those_of_an_actor_that_reads_by_itself(shards: Path, tmp_path: Path) -> None:
    """To the bit, with several shards under way; a shard that cannot be read fails alone, as it does there."""
    listed = list_shards([str(shards)])
    want = tables(made.embed(made.job(tmp_path / "a"), listed), tmp_path / "a")
    gone = write_tar(tmp_path / "in" / "gone.tar", {"a.jpg": jpeg()})
    both = [*listed, *list_shards([str(gone)])]
    gone.unlink()
    feed = RemoteFeed(made.vector_set(), 1, deaths=lambda shard: 0)
    *receipts, failed = embed_remotely(tmp_path / "b", both, feed)
    assert tables(receipts, tmp_path / "b") == want and len(want) == 6
    assert failed.files is None and "gone.tar" in (failed.error or "")
    assert sum(r.files.counts.samples for r in receipts if r.files) == oracle.SAMPLES
    assert all(r.seconds["read"] > 0 and r.seconds["decode"] > 0 and r.bytes_read for r in receipts)


def test_a_feeder_that_dies_has_a_successor(tmp_path: Path) -> None:
    """Its shards go on where they were: no row is lost, none twice, and the bits are the same."""
    for name in "ab":
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{i:03d}.jpg": jpeg(48, 40, seed=i % 9) for i in range(150)})
    listed = list_shards([str(tmp_path / "in")])
    feed = RemoteFeed(made.vector_set(), 1, deaths=lambda shard: 0)

    def killed_midway(
        shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]:
        for n, fed in enumerate(feed(shards, flow, at)):
            if n in (40, 120):
                ray.kill(feed._feeders[0])
            yield fed

    receipts = embed_remotely(tmp_path / "a", listed, killed_midway)
    assert [r.error for r in receipts] == [None, None]
    want = made.embed(made.job(tmp_path / "b"), listed)
    assert tables(receipts, tmp_path / "a") == tables(want, tmp_path / "b")


def test_a_shard_that_kills_its_feeders_fails_and_says_so(shards: Path, tmp_path: Path) -> None:
    """After as many deaths as a worker's own shard may have."""
    listed = list_shards([str(shards)])[:1]
    feed = RemoteFeed(made.vector_set(), 1, deaths=lambda shard: MAX_DEATHS)
    (receipt,) = embed_remotely(tmp_path, listed, feed)
    assert receipt.files is None and "8 of the processes that read and decode died" in (receipt.error or "")
