"""The second plan: samples that are read and decoded in other processes become the very same rows."""

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import made
import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
from containers import write_tar
from pictures import jpeg

from pipeline import feeders
from pipeline.actors import ray
from pipeline.embed import Embedder, Receipt
from pipeline.feed import MAX_DEATHS, Fed, LocalFeed
from pipeline.feeders import GONE, Chunk, RemoteFeed, Turn, _chunk, _Source, _unpacked
from pipeline.flow import Flow
from pipeline.images import Decoded
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


def test_a_feeder_that_dies_has_a_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards go on where they were: no row is lost, none twice, and the bits are the same.

    So it is with a chunk that cannot be had any more, as when a node dies with what it had made.
    """
    for name in "ab":
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{i:03d}.jpg": jpeg(48, 40, seed=i % 9) for i in range(150)})
    listed = list_shards([str(tmp_path / "in")])
    feed = RemoteFeed(made.vector_set(), 1, deaths=lambda shard: 0)
    get, lost = ray.get, list[Exception]()

    def lose_one(reference: Any) -> Any:
        found = get(reference)
        if isinstance(found, Chunk) and found.ended is not None and not lost:
            lost.append(ray.exceptions.ObjectReconstructionFailedError(reference.hex()))
            raise lost[0]
        return found

    def killed_midway(
        shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]:
        for n, fed in enumerate(feed(shards, flow, at)):
            if n == 40:
                ray.kill(feed._feeders[0])
            yield fed

    monkeypatch.setattr(feeders.ray, "get", lose_one)
    receipts = embed_remotely(tmp_path / "a", listed, killed_midway)
    assert [r.error for r in receipts] == [None, None] and len(lost) == 1
    want = made.embed(made.job(tmp_path / "b"), listed)
    assert tables(receipts, tmp_path / "a") == tables(want, tmp_path / "b")


def test_all_ways_to_lose_a_feeder_are_known() -> None:
    """It died, Ray ended it for its memory, its node died, or what it had made is gone: errors without a common base
    but that of all of Ray's."""
    e = ray.exceptions
    known = (e.ActorDiedError, e.ActorUnavailableError, e.OutOfMemoryError, e.NodeDiedError, e.OwnerDiedError)
    assert all(issubclass(error, GONE) for error in (*known, e.ObjectLostError, e.ObjectReconstructionFailedError))
    assert not any(issubclass(error, GONE) for error in (e.RayTaskError, e.RaySystemError, e.GetTimeoutError))


def test_pixels_outlive_their_chunk(shards: Path) -> None:
    """Each image has memory of its own: one that waits for its batch keeps no chunk in Ray's store."""
    listed = list_shards([str(shards)])[:1]
    fed = list(LocalFeed(made.vector_set(), 1, 4)(listed, Flow(), lambda stage, shard: None))
    chunk = _chunk(fed)
    chunk.pixels.flags.writeable = False  # as Ray gives them
    again = list(_unpacked(listed[0], chunk))
    pixels = [one.what.result.pixels for one in again if one.sample and isinstance(one.what.result, Decoded)]
    assert len(pixels) == len(chunk.pixels) > 1 and all(p.flags.owndata for p in pixels)
    for before, after in zip(fed, again, strict=True):
        assert before[:2] == after[:2]
        if before.sample and isinstance(before.what.result, Decoded):
            assert np.array_equal(before.what.result.pixels, after.what.result.pixels)
            assert before.what.result[1:] == after.what.result[1:]


def test_a_shard_under_way_is_not_taken_again(shards: Path) -> None:
    """A board that was started again lends a worker what it has already: its rows would come twice."""
    a, b, c = list_shards([str(shards)])
    source = _Source([a, a, b, None, a, c], deaths=lambda shard: 0)
    assert [turn and turn.shard for turn in (source.take() for _ in range(4))] == [a, None, b, None]
    source.again(Turn(a, seen=3, deaths=1))  # its feeder died: that is the same shard, and goes on
    assert source.take() == Turn(a, seen=3, deaths=1)
    source.end(a)
    assert source.take() == Turn(a)  # another run may have to do it
    assert source.take() == Turn(c) and source.take() is None and not source.is_finished
    for shard in (a, b, c):
        source.end(shard)
    assert source.is_finished


def test_a_shard_that_kills_its_feeders_fails_and_says_so(shards: Path, tmp_path: Path) -> None:
    """After as many deaths as a worker's own shard may have."""
    listed = list_shards([str(shards)])[:1]
    feed = RemoteFeed(made.vector_set(), 1, deaths=lambda shard: MAX_DEATHS)
    (receipt,) = embed_remotely(tmp_path, listed, feed)
    assert receipt.files is None and "8 of the processes that read and decode died" in (receipt.error or "")
