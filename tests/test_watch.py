"""The promises of pipeline/watch.py, without Ray: what a run is told when its workers die or stand still."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline import actors
from pipeline.embed import STAGES, Receipt
from pipeline.progress import Display, State
from pipeline.watch import Failed, Stalled, watch


def receipt(shard: str) -> Receipt:
    seconds = dict.fromkeys(STAGES, 0.0)
    return Receipt(
        shard=shard,
        files=None,
        error="read: gone",
        embedded=False,
        bytes_read=0,
        seconds=seconds,
        started=0.0,
        ended=1.0,
        worker="w",
    )


def activity(steps: int, shard: str = "x", stage: str = "forward") -> dict[str, Any]:
    return {"steps": steps, "stage": stage, "shard": shard, "under_way": {shard: (steps, 0)}}


Told = actors.News  # without receipts


def told(started: int, ready: int, said: dict[str, Any], **more: int) -> Told:
    return actors.News([], started=started, ready=ready, said=said, **more)


class Pool:
    """Receipts that come by themselves, and one word of the board after the other."""

    def __init__(self, boards: Iterator[Told], receipts: Iterator[Receipt]):
        self.is_done, self._boards, self._arrived = False, boards, queue.Queue[Any]()
        threading.Thread(target=self._drain, args=(receipts,), daemon=True).start()

    def _drain(self, receipts: Iterator[Receipt]) -> None:
        try:
            for receipt in receipts:
                self._arrived.put(receipt)
            self._arrived.put(None)
        except ValueError as e:
            self._arrived.put(e)

    def read(self) -> actors.News:
        try:
            item = self._arrived.get(timeout=0.01)
        except queue.Empty:
            return next(self._boards)
        if isinstance(item, Exception):
            raise item
        self.is_done = item is None
        return replace(next(self._boards), receipts=[item] if item else [])


def watched(
    boards: Iterator[Told],
    receipts: Iterator[Receipt],
    patch: pytest.MonkeyPatch,
    size: tuple[int, int] = (1, 1),
    stall_timeout_s: float = 60,
) -> tuple[list[Receipt], list[str]]:
    """What comes out, and what was said, where the board reads so, one after the other."""
    patch.setattr("pipeline.watch.POLL_S", 0.01)
    said = list[str]()
    state, pool = State(set="s", shards=9), Pool(boards, receipts)
    with Display(state) as display:
        return list(watch(pool, size, state, display, stall_timeout_s, said.append)), said  # type: ignore[arg-type]


def slowly(*items: Receipt | Exception, wait_s: float = 0.1) -> Iterator[Receipt]:
    for item in items:
        time.sleep(wait_s)
        if isinstance(item, Exception):
            raise item
        yield item


def test_receipts_pass_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, whatever the board says meanwhile."""
    boards = itertools.repeat(told(1, 1, {"elsewhere:1:a": activity(1)}))
    got, said = watched(boards, slowly(receipt("a"), receipt("b"), wait_s=0.02), monkeypatch)
    assert [r.shard for r in got] == ["a", "b"] and said == []


def test_a_worker_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its stage and shard; before any worker is up it is their start."""
    boards = itertools.repeat(told(1, 1, {"elsewhere:1:a": activity(7, "s3", "decode")}))
    with pytest.raises(Stalled, match="no progress for 0 s in stage decode of s3"):
        watched(boards, slowly(receipt("a"), wait_s=5), monkeypatch, stall_timeout_s=0.2)
    with pytest.raises(Stalled, match="in stage start of the actors"):
        watched(itertools.repeat(told(0, 0, {})), slowly(receipt("a"), wait_s=5), monkeypatch, stall_timeout_s=0.2)


def test_steps_alone_are_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may take as long as it needs while its images move."""
    boards = (told(1, 1, {"elsewhere:1:a": activity(n // 5)}) for n in itertools.count())
    got, _ = watched(boards, slowly(receipt("a"), wait_s=0.6), monkeypatch, stall_timeout_s=0.2)
    assert len(got) == 1


def test_dead_workers_are_told_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have successors; workers that a pool takes on when it grows are none."""
    news = [told(2, 2 + died, {"elsewhere:1:a": activity(died)}, died=died) for died in (0, 1, 1, 3)]
    _, said = watched(itertools.chain(news, itertools.repeat(news[-1])), slowly(receipt("a")), monkeypatch)
    assert [s.partition(" died")[0] for s in said] == ["a worker", "2 workers"]
    news = [told(n, n, {"elsewhere:1:a": activity(n)}) for n in (1, 2, 4)]
    grown = itertools.chain(news, itertools.repeat(news[-1]))
    assert watched(grown, slowly(receipt("a")), monkeypatch, size=(1, 4))[1] == []


def test_workers_that_never_get_ready_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few of them, whatever the stall timeout; each time that one gets ready the count begins anew."""
    boards = (told(2, 0, {}, false_starts=n) for n in itertools.count())
    with pytest.raises(Failed, match="4 workers died before they had loaded the model"):
        watched(boards, slowly(receipt("a"), wait_s=5), monkeypatch, size=(2, 2))
    got, _ = watched(itertools.repeat(told(2, 0, {}, false_starts=3)), slowly(receipt("a")), monkeypatch, size=(2, 2))
    assert len(got) == 1
    boards = (told(2, 1 + n // 2, {}, false_starts=n) for n in itertools.count())
    assert len(watched(boards, slowly(receipt("a")), monkeypatch, size=(2, 2))[0]) == 1


def test_the_least_number_of_workers_must_find_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the stall timeout while shards wait, whoever moves; once all have been there, or none waits, never."""

    def moving(started: int, waiting: int) -> Iterator[Told]:
        return (told(started, 1, {"elsewhere:1:a": activity(n)}, waiting=waiting) for n in itertools.count())

    with pytest.raises(
        Stalled, match="only 1 of the 2 workers that --actors asks for found room in 0 s, in stage start"
    ):
        watched(moving(1, 3), slowly(receipt("a"), wait_s=5), monkeypatch, size=(2, 4), stall_timeout_s=0.2)
    for boards in (moving(1, 0), moving(2, 3), itertools.chain([told(2, 2, {}, waiting=3)], moving(1, 3))):
        got, _ = watched(boards, slowly(receipt("a"), wait_s=0.5), monkeypatch, size=(2, 4), stall_timeout_s=0.2)
        assert len(got) == 1


def test_what_ray_raises_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the receipts that came before it."""
    with pytest.raises(Failed, match="the workers failed: ValueError: no such column"):
        watched(itertools.repeat(told(0, 0, {})), slowly(receipt("a"), ValueError("no such column")), monkeypatch)
