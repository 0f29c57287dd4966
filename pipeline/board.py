"""What is to do, and who does it: the driver hands shards in and takes receipts out, workers the other way round.

A plain class that runs as a Ray actor on the driver's node. Workers take one shard after the other, so a fast one takes
more and none waits between two.
"""

import secrets
import time
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

SILENT_S = 60.0  # of a worker that speaks every second: what it has under way is lent again


class Told(NamedTuple):
    """What the board says to the driver."""

    epoch: str  # another one: the board was started again and has forgotten everything
    receipts: list[bytes]
    waiting: int  # shards that nobody has yet
    started: int  # workers
    ready: int  # … of them with the model loaded
    said: dict[str, dict[str, Any]]  # by worker that is not known to be dead: `Activity.said`


class Board:
    """The shards to embed, who has which under way, and what each worker is at.

    A worker is a process: one that was started again is another, in the same slot. A shard whose worker has died, or
    has been silent for too long, is lent again; embedding it twice costs time and changes nothing.
    """

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self._waiting: deque[str] = deque()
        self._shards: dict[str, bytes] = {}  # pickled, of those waiting or lent
        self._lent: dict[str, set[str]] = {}  # shard → workers
        self._deaths: dict[str, int] = {}  # of workers that had the shard under way
        self._slots: dict[int, str] = {}  # each held by one worker after the other
        self._started: set[str] = set()
        self._said: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, float] = {}
        self._dead: set[str] = set()
        self._receipts: list[bytes] = []
        self._taken_in = 0  # receipts that the driver has
        self._is_over = False

    # the driver

    def add(self, shards: list[tuple[str, bytes]]) -> None:
        for name, shard in shards:
            if name not in self._shards:
                self._shards[name] = shard
                self._waiting.append(name)

    def read(self, epoch: str, taken_in: int) -> Told:
        """`taken_in`: how many receipts the driver has had of the board of that epoch."""
        taken_in = taken_in if epoch == self.epoch else 0
        self._receipts = self._receipts[max(0, taken_in - self._taken_in) :]
        self._taken_in = max(self._taken_in, taken_in)
        alive = {who: activity for who, activity in self._said.items() if who not in self._dead}
        return Told(self.epoch, list(self._receipts), len(self._waiting), len(self._started), len(self._said), alive)

    def end(self) -> None:
        self._is_over = True

    # the workers

    def start(self, slot: int, who: str) -> None:
        self._bury(self._slots.get(slot, who), unless=who)
        self._slots[slot] = who
        self._started.add(who)

    def say(self, who: str, activity: dict[str, Any]) -> None:
        self._said[who] = activity
        self._heard[who] = time.monotonic()
        for shard in activity["under_way"]:  # a board that was started again learns what was lent
            if shard in self._shards and who not in self._dead:
                self._lend(shard, who)

    def take(self, who: str) -> tuple[bytes, int] | bool:
        """A shard and how many workers died over it; False: none for now; True: none ever again."""
        self._heard[who] = time.monotonic()
        shard = self._waiting[0] if self._waiting else self._forsaken(who)
        if shard is None:
            return self._is_over
        self._lend(shard, who)
        return self._shards[shard], self._deaths.get(shard, 0)

    def done(self, shard: str, receipt: bytes) -> None:
        self._receipts.append(receipt)  # a second one of the same shard too: the driver knows what it has
        self._unqueue(shard)
        for known in (self._shards, self._lent, self._deaths):
            known.pop(shard, None)

    def _lend(self, shard: str, who: str) -> None:
        self._unqueue(shard)
        self._lent.setdefault(shard, set()).add(who)

    def _unqueue(self, shard: str) -> None:
        if self._waiting and self._waiting[0] == shard:
            self._waiting.popleft()
        elif shard in self._shards and shard not in self._lent:
            with suppress(ValueError):
                self._waiting.remove(shard)

    def _forsaken(self, who: str) -> str | None:
        """A shard that only silent workers have, and not this one."""
        silent_since = time.monotonic() - SILENT_S
        for shard, workers in self._lent.items():
            if who not in workers and all(self._heard.get(w, 0.0) < silent_since for w in workers):
                self._deaths[shard] = self._deaths.get(shard, 0) + 1
                return shard
        return None

    def _bury(self, who: str, unless: str) -> None:
        if who == unless:
            return
        self._dead.add(who)
        for shard, workers in self._lent.items():
            if who in workers:
                workers.discard(who)
                self._deaths[shard] = self._deaths.get(shard, 0) + 1
        for shard in [s for s, workers in self._lent.items() if not workers]:
            del self._lent[shard]
            self._waiting.appendleft(shard)
