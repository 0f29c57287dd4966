"""Watches the receipts of a run come in: shows progress, tells of dead workers, and ends what stands still."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import actors, cluster
from pipeline.embed import Receipt
from pipeline.errors import Stalled
from pipeline.progress import Display, State

POLL_S = 0.5
Activity = dict[str, Any]  # what a worker says that it is at: `embed.Activity.said`


class Failed(Exception):
    """Shards could not be embedded or committed; the same command goes on from there."""


def watch(
    pool: "actors.Pool",
    size: tuple[int, int],
    state: State,
    display: Display,
    stall_timeout_s: float,
    say: Callable[[str], None],
    told: Callable[[dict[str, Activity]], None] = lambda said: None,
) -> Iterator[Receipt]:
    """The pool's receipts, while progress is shown; raises `Stalled` when nothing moves, `Failed` when Ray gives up.

    `told` hears what each worker says that it is at, some twice a second.
    """
    workers, moves = _Workers(say), _Moves(stall_timeout_s, size[0])
    while not pool.is_done:
        try:
            news = pool.read()
        except Exception as e:  # whatever Ray raises of a worker ends the run as a failure, with its message
            raise Failed(f"the workers failed: {cluster.cause(e)}") from e
        for receipt in news.receipts:
            state.finish(receipt)
            yield receipt
        state.see(news.said)
        told(news.said)
        workers.see(news)
        display.show()
        moves.see(state.shards_done, news)
        if not pool.is_done:
            time.sleep(POLL_S)
    state.settle()


class _Workers:
    """Tells of those that died; Ray starts each again, for ever if need be, so one that never gets ready ends here."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._died = self._ready = self._forgiven = 0

    def see(self, news: "actors.News") -> None:
        if news.ready > self._ready:
            self._ready, self._forgiven = news.ready, news.false_starts
        lost = news.false_starts - self._forgiven
        if lost >= actors.MAX_FALSE_STARTS:
            raise Failed(f"{lost} workers died before they had loaded the model, as where memory runs out")
        died = news.died - self._died
        if died > 0:
            who = "a worker" if died == 1 else f"{died} workers"
            self._say(f"{who} died and had a successor: what was not published is done again, each image decoded apart")
            self._died = news.died


class _Moves:
    """Raises `Stalled` where shards and workers stand still for the timeout, or too few workers find room in it."""

    def __init__(self, timeout_s: float, least: int):
        self._timeout_s, self._least, self._began = timeout_s, least, time.monotonic()
        self._seen, self._at = (-1, -1), time.monotonic()

    def see(self, shards_done: int, news: "actors.News") -> None:
        now = time.monotonic()
        seen = (shards_done, sum(a["steps"] for a in news.said.values()))
        self._least = 0 if news.started >= self._least else self._least
        if seen != self._seen:
            self._seen, self._at = seen, now
        elif now - self._at > self._timeout_s:
            actors.kill(news.said)
            where = ", ".join(f"{a['stage']} of {a['shard'] or 'the first shard'}" for a in news.said.values())
            raise Stalled(f"no progress for {self._timeout_s:.0f} s in stage {where or 'start of the actors'}")
        if news.started and news.waiting and self._least and now - self._began > self._timeout_s:
            raise Stalled(
                f"only {news.started} of the {self._least} workers that --actors asks for found room in "
                f"{self._timeout_s:.0f} s, in stage start of the actors"
            )
