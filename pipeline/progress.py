"""What a run shows while it works: a progress line, and a note beside the output that says how it ended."""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.embed import Receipt
from pipeline.errors import StorageError
from pipeline.flow import ordered
from pipeline.output import Root

LINE_EVERY_S = 10.0  # without a terminal
NOTE_EVERY_S = 10.0
ALIVE_S = 120.0  # a run whose note is older than this is taken for dead
UNFINISHED_S = 7 * 86400.0  # days of a GPU's work may lie in a set that waits for somebody to come back on Monday
NOTES_AT_ONCE = 32
NEWEST = 100  # notes; of a schedule by the hour a year makes nine thousand
STATES = ("running", "committed", "failed", "refused", "stalled", "interrupted", "died")  # as `outcome` gives them


@dataclass
class State:
    """A run as its observers see it."""

    set: str
    shards: int
    state: str = "running"  # of `STATES`, but `died`
    shards_unchanged: int = 0
    shards_done: int = 0  # by this run
    images: int = 0  # rows by this run, of shards under way too
    rejects: int = 0
    images_per_s: float = 0.0
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    name: str = ""  # of its note, and of what lies beside it below `reports/`
    machine: dict[str, Any] = field(default_factory=dict)  # the driver's: `machine.facts`
    packages: dict[str, str] = field(default_factory=dict)  # their versions
    message: str = ""  # how it ended, for a person
    result: dict[str, Any] = field(default_factory=dict)  # the object of `--json`, once the run has ended

    def __post_init__(self) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.started))
        self.name = self.name or f"run-{stamp}-{uuid.uuid4().hex[:8]}"
        self._rows = self._rejected = 0  # of finished shards
        self._finished: set[str] = set()

    def see(self, said: dict[str, dict[str, Any]]) -> None:
        """What is under way, as each worker says it, on top of what is finished; a second old, so it only goes up."""
        under_way: dict[str, tuple[int, int]] = {}
        for activity in said.values():  # two workers may have one shard, where one of them was silent
            under_way |= {s: max(n, under_way.get(s, (0, 0))) for s, n in activity["under_way"].items()}
        counts = [n for shard, n in under_way.items() if shard not in self._finished]
        self.images = max(self.images, self._rows + sum(images for images, _ in counts))
        self.rejects = max(self.rejects, self._rejected + sum(rejects for _, rejects in counts))

    def finish(self, receipt: Receipt) -> None:
        """One shard more, with its exact counts."""
        self.shards_done += 1
        self._finished.add(receipt.shard)
        if receipt.files and receipt.embedded:
            self._rows += receipt.files.counts.rows
            self._rejected += receipt.files.counts.rejected

    def settle(self) -> None:
        """Nothing is under way any more: the counts are those of the finished shards."""
        self.images, self.rejects = self._rows, self._rejected

    @property
    def eta_s(self) -> float | None:
        """Seconds to go by the shards done so far; None before the first."""
        todo = self.shards - self.shards_unchanged
        if not self.shards_done:
            return None
        return (time.time() - self.started) / self.shards_done * (todo - self.shards_done)


class Display:
    """One live line on a terminal, a plain line every ten seconds elsewhere; everything on stderr."""

    def __init__(self, state: State, stream: TextIO | None = None):
        self._state, self._stream = state, stream or sys.stderr
        self._last_line = time.monotonic()
        self._images_at: list[tuple[float, int]] = []
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("shards · {task.fields[text]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            total = state.shards - state.shards_unchanged
            self._task = self._bar.add_task("embedding", total=total, text="starting")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show(last=True)
        if self._bar:
            self._bar.stop()

    def show(self, last: bool = False) -> None:
        """Call it often; it draws when it is time."""
        state, now = self._state, time.monotonic()
        self._images_at = [*self._images_at, (now, state.images + state.rejects)][-60:]
        (t0, n0), (t1, n1) = self._images_at[0], self._images_at[-1]
        state.images_per_s = (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
        if self._bar:
            self._bar.update(self._task, completed=state.shards_done, text=self._text())
        elif last or now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            total = state.shards - state.shards_unchanged
            print(f"embedding {state.shards_done}/{total} shards · {self._text()}", file=self._stream, flush=True)

    def _text(self) -> str:
        state = self._state
        eta = "" if state.eta_s is None else f" · {duration(state.eta_s)} to go"
        return f"{state.images:,} images · {state.images_per_s:,.0f}/s · {state.rejects:,} rejected{eta}"


def duration(seconds: float) -> str:
    """For a person: `4.2 s`, `42 s`, `5 min 03 s`, `26 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 or not seconds else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class Note:
    """The run's state as a small JSON below `reports/`, renewed every ten seconds until it is closed.

    `status` and `gc` go by it, so a thread of its own renews it, whatever the run waits for.
    """

    def __init__(self, root: Root, state: State):
        self._root, self._state, self._closed = root, state, threading.Event()
        self._name = f"reports/{state.name}.json"
        self._write()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._closed.wait(NOTE_EVERY_S):
            self._write()

    def _write(self) -> None:
        self._state.updated = time.time()
        with suppress(OSError, StorageError):  # a note that cannot be written must not end a run that can go on
            self._root.overwrite(self._name, json.dumps(asdict(self._state), indent=1).encode())

    def close(self, state: str) -> None:
        self._closed.set()
        self._thread.join()
        self._state.state = state
        self._write()


def read_notes(root: Root, newest: int = 0) -> list[State]:
    """The runs that left a note, oldest first; one that cannot be read tells nothing and is passed over.

    `newest`: so many of them at most; 0: all.
    """
    names = sorted(n for n in root.list("reports") if n.startswith("reports/run-") and n.endswith(".json"))

    def read(name: str) -> State | None:
        with suppress(ValueError, TypeError, FileNotFoundError):
            return State(**json.loads(root.read(name)))
        return None

    return [note for note in ordered(read, names[-newest:], NOTES_AT_ONCE) if note]


def looks(root: Root) -> Iterator[list[State]]:
    """The notes of all runs, and each further time the newest: who asks again and again waits for no old ones."""
    yield read_notes(root)
    while True:
        yield read_notes(root, newest=NEWEST)


def sets_in_use(notes: Iterable[State]) -> set[str]:
    """Sets that a run writes now, or that one began in the last week and has not finished: it may go on from there.

    `notes`: oldest first.
    """
    notes = list(notes)
    unfinished: set[str] = set()
    for note in notes:
        if note.state == "committed":
            unfinished.discard(note.set)
        elif time.time() - note.updated < UNFINISHED_S:
            unfinished.add(note.set)
    return unfinished | {note.set for note in notes if is_alive(note)}


def is_alive(state: State) -> bool:
    return state.state == "running" and time.time() - state.updated < ALIVE_S


def outcome(state: State) -> str:
    """How the run stands: one of `STATES`."""
    return "died" if state.state == "running" and not is_alive(state) else state.state
