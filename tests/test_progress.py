"""What a run shows: counts that are right at the end, lines at their time, a note that others read."""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import made
import pytest

from pipeline import progress
from pipeline.output import Root
from pipeline.progress import Display, Note, State, is_alive, looks, read_notes


def test_counts_go_up_and_end_exact() -> None:
    """Late and repeated ticks of the actors never make more images than there are when all is done."""
    state = State(set="x@1", shards=2)
    state.see({"a": {"under_way": {"s": (40, 1)}}})
    state.finish(replace(made.receipt("a", 0, 1, 50, 2), shard="s"))
    state.see({"a": {"under_way": {"s": (50, 2)}}})  # of a second ago
    assert state.images == 50
    state.see({"a": {"under_way": {"t": (15, 0), "u": (2, 0)}}, "b": {"under_way": {"t": (18, 0)}}})  # one was silent
    assert (state.images, state.rejects) == (70, 2)
    state.finish(replace(made.receipt("a", 1, 2, 30), shard="t"))
    state.settle()
    assert (state.shards_done, state.images, state.rejects) == (2, 80, 2)


def test_durations_are_for_a_person() -> None:
    """Two figures, in the units that a person would say."""
    told = {0: "0 s", 0.31: "0.3 s", 9.96: "10 s", 42: "42 s", 59.6: "1 min 00 s", 303: "5 min 03 s"}
    told |= {3599.6: "1 h 00 min", 94_000: "26 h 06 min", 4_000_000: "1,111 h 06 min"}
    assert {seconds: progress.duration(seconds) for seconds in told} == told


def test_without_a_terminal_there_is_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one at the end: shards, images, images a second, rejects, time to go."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out, state = io.StringIO(), State(set="x@1", shards=4, shards_unchanged=1)
    with Display(state, out) as display:
        for second in range(25):
            clock[0] = 100.0 + second
            state.images = second * 7
            display.show()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("embedding 0/3 shards · 70 images · 7/s · 0 rejected")


def test_a_note_is_renewed_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """status and gc see a live run as alive, whatever it waits for, and an ended one as ended."""
    monkeypatch.setattr(progress, "NOTE_EVERY_S", 0.05)
    note = Note(Root(str(tmp_path)), State(set="x@1", shards=4))
    (first,) = read_notes(Root(str(tmp_path)))
    time.sleep(0.5)
    (later,) = read_notes(Root(str(tmp_path)))
    assert is_alive(later) and later.updated > first.updated
    note.close("committed")
    (last,) = read_notes(Root(str(tmp_path)))
    assert last.state == "committed" and not is_alive(last)


def test_a_run_that_fell_silent_is_dead_and_a_damaged_note_tells_nothing(tmp_path: Path) -> None:
    """A killed run stops renewing; rubbish among the notes is passed over."""
    Note(Root(str(tmp_path)), State(set="x@1", shards=4)).close("running")
    (path,) = (tmp_path / "reports").iterdir()
    old = json.loads(path.read_text()) | {"updated": time.time() - 600}
    path.write_text(json.dumps(old))
    (tmp_path / "reports" / "run-broken.json").write_text("{")
    (note,) = read_notes(Root(str(tmp_path)))
    assert note.state == "running" and not is_alive(note)


def test_who_looks_again_reads_the_newest_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them once; then those that may have come meanwhile."""
    monkeypatch.setattr(progress, "NEWEST", 2)
    root = Root(str(tmp_path))
    for number in range(3):
        Note(root, State(set=f"x@{number}", shards=1, started=1e9 + number)).close("committed")
    seen = looks(root)
    assert [note.set for note in next(seen)] == ["x@0", "x@1", "x@2"]
    Note(root, State(set="x@3", shards=1, started=1e9 + 3)).close("committed")
    assert [note.set for note in next(seen)] == [note.set for note in next(seen)] == ["x@2", "x@3"]
