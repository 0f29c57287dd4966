"""Watches the receipts of a run come in: shows progress, tells of dead workers, and ends what stands still."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import actors
from pipeline.embed import Receipt
from pipeline.progress import Display, State

POLL_S = 0.5
Activity = dict[str, Any]  # what a worker says that it is at: `embed.Activity.said`


class Stalled(Exception):
    """No image and no shard was finished for the stall timeout; the message names the stage."""


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
    workers, moves = _Workers(size, say), _Moves(stall_timeout_s)
    while not pool.is_done:
        try:
            news = pool.read()
        except Exception as e:  # whatever Ray raises of a worker ends the run as a failure, with its message
            raise Failed(f"the workers failed: {actors.cause(e)}") from e
        for receipt in news.receipts:
            state.finish(receipt)
            yield receipt
        state.see(news.said)
        told(news.said)
        workers.see(news.started, news.ready)
        display.show()
        moves.see(state.shards_done, news.said)
        if not news.receipts:
            time.sleep(POLL_S)
    state.settle()


class _Workers:
    """Tells of those that died; Ray starts each again, for ever if need be, so one that never gets ready ends here."""

    def __init__(self, pool: tuple[int, int], say: Callable[[str], None]):
        self._most, self._say = pool[1], say
        self._known = pool[1] if pool[0] == pool[1] else sys.maxsize  # a pool that breathes starts workers too
        self._ready = self._forgiven = 0

    def see(self, started: int, ready: int) -> None:
        lost = started - ready - self._most
        if ready > self._ready:
            self._ready, self._forgiven = ready, max(0, lost)
        lost -= self._forgiven
        if lost >= actors.MAX_FALSE_STARTS:
            raise Failed(f"{lost} workers died before they had loaded the model, as where memory runs out")
        died = ready - self._known  # each started under a name of its own
        if died > 0:
            who = "a worker" if died == 1 else f"{died} workers"
            self._say(f"{who} died and had a successor: what was not published is done again, each image decoded apart")
            self._known = ready


class _Moves:
    """Raises `Stalled` where shards and workers stand still for the timeout."""

    def __init__(self, timeout_s: float):
        self._timeout_s, self._seen, self._at = timeout_s, (-1, -1), time.monotonic()

    def see(self, shards_done: int, said: dict[str, Activity]) -> None:
        seen = (shards_done, sum(a["steps"] for a in said.values()))
        if seen != self._seen:
            self._seen, self._at = seen, time.monotonic()
        elif time.monotonic() - self._at > self._timeout_s:
            actors.kill(said)
            where = ", ".join(f"{a['stage']} of {a['shard'] or 'the first shard'}" for a in said.values())
            raise Stalled(f"no progress for {self._timeout_s:.0f} s in stage {where or 'start of the actors'}")
