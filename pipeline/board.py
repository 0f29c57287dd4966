"""What is to do, and who does it: the driver hands shards in and takes receipts out, workers the other way round.

A plain class that runs as a Ray actor on the driver's node. Workers take one shard after the other, so a fast one takes
more and none waits between two.
"""

import secrets
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

SILENT_S = 60.0  # of a worker that speaks every second: what it has under way is lent again


class Told(NamedTuple):
    """What the board says to the driver."""

    epoch: str  # another one: the board was started again and has forgotten everything
    receipts: list[bytes]
    waiting: int  # shards that nobody has yet
    slots: set[int]  # that a worker has started in
    ready: int  # workers that had the model loaded
    died: int  # … of them those that have a successor which is ready too
    false_starts: int  # workers that had a successor before they were ready
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
        self._left: set[int] = set()  # slots whose worker had nothing more to do
        self._least, self._is_all_here = 0, False
        self._started: dict[str, int] = {}  # worker → its slot
        self._nodes: dict[str, str] = {}  # … and its node
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

    def lose(self, nodes: set[str]) -> None:
        """These are no more: whoever was there is dead, though a successor may find room only later."""
        for who, node in self._nodes.items():
            if node in nodes and who not in self._dead:
                self._bury(who)

    def let_go(self, least: int) -> None:
        """There are no more shards to come: whoever finds none waiting may leave, but for so many workers."""
        self._least, self._is_all_here = least, True

    def read(self, epoch: str, taken_in: int) -> Told:
        """`taken_in`: how many receipts the driver has had of the board of that epoch."""
        taken_in = taken_in if epoch == self.epoch else 0
        self._receipts = self._receipts[max(0, taken_in - self._taken_in) :]
        self._taken_in = max(self._taken_in, taken_in)
        started, at_work = self._started, {who for workers in self._lent.values() for who in workers}
        return Told(
            epoch=self.epoch,
            receipts=list(self._receipts),
            waiting=len(self._waiting),
            slots=set(self._slots),
            ready=len(self._said),
            died=len(self._said) - len({started[who] for who in self._said}),
            false_starts=sum(who not in self._said and self._slots[slot] != who for who, slot in started.items()),
            said={
                who: activity
                for who, activity in self._said.items()
                if who not in self._dead and (started[who] not in self._left or who in at_work)
            },
        )

    def end(self) -> None:
        self._is_over = True

    # the workers

    def start(self, slot: int, who: str, node: str = "") -> None:
        if self._slots.get(slot, who) != who:
            self._bury(self._slots[slot])
        self._slots[slot], self._nodes[who] = who, node
        self._started[who] = slot
        self._left.discard(slot)

    def say(self, slot: int, who: str, activity: dict[str, Any]) -> None:
        if who not in self._started:  # a board that was started again learns who is where
            self._started[who] = slot
            self._slots.setdefault(slot, who)
        self._said[who] = activity
        self._heard[who] = time.monotonic()
        for shard in activity["under_way"]:  # a board that was started again learns what was lent
            if shard in self._shards and who not in self._dead:
                self._lend(shard, who)

    def take(self, who: str, receipts: Sequence[tuple[str, bytes]] = ()) -> tuple[bytes, int] | bool:
        """A shard and how many workers died over it; False: none for now; True: none ever again.

        `receipts`: as of `done`.
        """
        self.done(receipts)
        self._heard[who] = time.monotonic()
        shard = self._waiting[0] if self._waiting else self._forsaken(who)
        if shard is None:
            return self._is_over or self._may_leave(who)
        self._lend(shard, who)
        return self._shards[shard], self._deaths.get(shard, 0)

    def _may_leave(self, who: str) -> bool:
        slot = self._started.get(who)
        if not self._is_all_here or slot is None or len(self._slots) - len(self._left | {slot}) < self._least:
            return False
        self._left.add(slot)
        return True

    def done(self, receipts: Sequence[tuple[str, bytes]]) -> None:
        """Each with the name of its shard."""
        for shard, receipt in receipts:
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

    def _bury(self, who: str) -> None:
        self._dead.add(who)
        for shard, workers in self._lent.items():
            if who in workers:
                workers.discard(who)
                self._deaths[shard] = self._deaths.get(shard, 0) + 1
        for shard in [s for s, workers in self._lent.items() if not workers]:
            del self._lent[shard]
            self._waiting.appendleft(shard)
