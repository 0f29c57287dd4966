"""A lease on an output: of the scheduled jobs that start there, one works and the others hear who does.

Leases are numbered objects, `reports/lease/00000001.json` and so on, each put create-only by who takes it: so one of
any number of starts wins, on any store that refuses a second object (`Root.put_new` names those that do not). The
highest number counts. Its holder alone overwrites it, in a thread, to say until when it holds; who finds that time
past takes the next number, and deletes the lower ones. No store's compare-and-swap is needed.

A holder whose store was away for too long is one of those: it takes the next number itself where nobody else has.

What a lease guards against is work done twice. It is not what keeps versions right: those are numbered and create-only
themselves. A holder asks `check` before it commits, and a commit that was read, checked and then slept through a
takeover finds its version's number taken by the new holder's, or else is the version that this one builds on.

Clocks: `until` is by the holder's clock, and whoever looks compares it with its own. The holder stops believing a
quarter of the timeout before (30 s of 120), so two machines that differ by less never believe both. Where they differ
by more, a live lease may be taken over: its holder finds the higher number and ends, and one run's work was for
nothing; or a dead one is honoured for so much longer.
"""

import json
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from pipeline.errors import StorageError, UsageError
from pipeline.output import Root

FOLDER = "reports/lease"  # no gc looks there
TIMEOUT_S = 120.0  # after its holder's death; one that lives may be without its store for 90
MIN_TIMEOUT_S = 2.0
RENEWALS = 6  # in each timeout
SLACK = 0.25  # of the timeout: what clocks may differ by


class Lost(Exception):
    """The lease ran out, or somebody else has it: what was about to be committed must not be."""


class Taken(Exception):
    """Somebody else holds the lease; the message says who, since and until when."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a lease's object says. Times are seconds since 1970 by the holder's clock."""

    token: str  # of the holder's own
    host: str
    pid: int
    since: float
    until: float
    released: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.pid} since {_clock(self.since)}, until {_clock(self.until)} unless it is renewed"


class Lease:
    """A context: within, this process is the only holder. Entering raises `Taken`, or `UsageError` without access."""

    def __init__(self, root: Root, timeout_s: float = TIMEOUT_S):
        if not timeout_s >= MIN_TIMEOUT_S:
            raise UsageError(f"--lease-timeout {timeout_s}: must be {MIN_TIMEOUT_S:.0f} or more")
        self._root, self._timeout_s = root, timeout_s
        self._closed = threading.Event()
        self._changing = threading.Lock()  # the object's content

    def __enter__(self) -> "Lease":
        number, held = latest(self._root)
        if held is not None and _holds(held):
            raise Taken(str(held))
        self._number = number + 1
        now = time.time()
        self._claim = Claim(
            token=uuid.uuid4().hex, host=platform.node(), pid=os.getpid(), since=now, until=now + self._timeout_s
        )
        self._believed = _Deadline(self._timeout_s)
        try:
            self._root.put_new(_name(self._number), _content(self._claim))
        except (OSError, StorageError) as e:
            raise UsageError(f"output {self._root.url} cannot be written: {e}") from e
        # Not what the put said: the answer to one that succeeded may be lost, a number below the highest may be free
        # again, and stores without create-only let two.
        other = self._look()
        if other is not None:
            raise Taken(str(other))
        self._clear_lower()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._write(released=True)  # also where it ran out: the next one may start at once

    def check(self) -> None:
        """Raises `Lost` where the lease has run out or somebody else has taken it. Call it before a commit."""
        if self._believed.is_past:
            self._take_again()
        if self._believed.is_past:
            raise Lost(f"the lease on {self._root.url} ran out after {self._timeout_s:.0f} s without a renewal")
        other = self._look()
        if other is not None:
            raise Lost(f"the lease on {self._root.url} was taken over by {other}")

    def _look(self) -> Claim | str | None:
        """None where ours is the lease that counts, else the other one."""
        number, held = latest(self._root)
        if held is None:
            return f"lease {number}, which cannot be read"
        return None if held.token == self._claim.token else held

    def _clear_lower(self) -> None:
        """Whoever may not delete leaves them: each costs a listing entry."""
        with suppress(OSError, StorageError):
            for name in self._root.list(FOLDER):
                if 0 < _number(name) < self._number:
                    self._root.delete(name)

    def _renew(self) -> None:
        while not self._closed.wait(self._timeout_s / RENEWALS):
            if self._believed.is_past:
                self._take_again()
            else:
                self._write()

    def _write(self, released: bool = False) -> None:
        """Nobody else writes this object. What fails is tried again with the next renewal, or runs out."""
        with self._changing, suppress(OSError, StorageError):
            if self._closed.is_set() and not released:
                return
            believed = _Deadline(self._timeout_s)
            self._root.overwrite(_name(self._number), _content(self._claimed(released)))
            self._believed = believed

    def _take_again(self) -> None:
        """Of a lease that ran out, as where the store was away: by the next number, if nobody has come since.

        Overwriting it would not do: somebody else may have found it past, and be about to put that number.
        """
        with self._changing, suppress(OSError, StorageError):
            number, held = latest(self._root)
            if self._closed.is_set() or held is None or held.token != self._claim.token:
                return
            believed = _Deadline(self._timeout_s)
            self._root.put_new(_name(number + 1), _content(self._claimed()))
            if self._look() is None:
                self._number, self._believed = number + 1, believed
                self._clear_lower()

    def _claimed(self, released: bool = False) -> Claim:
        """What the object is to say from now on."""
        now = time.time()
        return replace(self._claim, until=now if released else now + self._timeout_s, released=released)


class _Deadline:
    """When a holder stops believing: by the wall clock that others read, and by one that nobody can set."""

    def __init__(self, timeout_s: float):
        seconds = timeout_s * (1 - SLACK)
        self._wall, self._steady = time.time() + seconds, time.monotonic() + seconds

    @property
    def is_past(self) -> bool:
        return time.time() >= self._wall or time.monotonic() >= self._steady


def latest(root: Root) -> tuple[int, Claim | None]:
    """The highest number, 0 where there is none, and what it says; None where that cannot be read as a lease."""
    number = max(map(_number, root.list(FOLDER)), default=0)
    if not number:
        return 0, None
    try:
        return number, Claim(**json.loads(root.read(_name(number))))
    except (ValueError, TypeError):
        return number, None
    except FileNotFoundError:  # somebody clears up by hand
        return number, None


def holder(root: Root) -> Claim | None:
    """Who holds the lease now; None where it is free."""
    claim = latest(root)[1]
    return claim if claim is not None and _holds(claim) else None


def _holds(claim: Claim) -> bool:
    return not claim.released and time.time() < claim.until


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _number(name: str) -> int:
    """0 of a stranger's object."""
    number = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
    return int(number) if number.isdecimal() else 0


def _content(claim: Claim) -> bytes:
    return json.dumps(asdict(claim), indent=1).encode()


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
