"""What a run shows and says: counts that are right at the end, the stage that limited it, a note that others read."""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import progress
from pipeline.embed import STAGES, Receipt
from pipeline.lists import ShardFiles
from pipeline.output import Root
from pipeline.progress import Display, Note, Speed, State, Sums, is_alive, read_notes
from pipeline.rows import Counts


def receipt(worker: str, start: float, end: float, rows: int, rejects: int = 0, **seconds: float) -> Receipt:
    counts = Counts(rows + rejects, rows, {"corrupt": rejects} if rejects else {})
    files = ShardFiles("s", "e", {"embeddings": "a.parquet"}, {"embeddings": 1}, counts)
    stages = dict.fromkeys(STAGES, 0.0) | seconds
    return Receipt(
        shard="s",
        files=files,
        error=None,
        embedded=True,
        bytes_read=1,
        seconds=stages,
        started=start,
        ended=end,
        worker=worker,
    )


def speed(receipts: list[Receipt], decode_threads: int) -> Speed:
    sums = Sums()
    for one in receipts:
        sums.add(one)
    return sums.speed(decode_threads)


def test_the_steady_rate_is_the_sum_of_the_workers_own() -> None:
    """A worker that started later or had fewer shards does not make the others look slow."""
    told = speed([receipt("a", 0, 10, 100), receipt("a", 9, 20, 100), receipt("b", 15, 25, 300)], decode_threads=1)
    assert told.images_per_s == pytest.approx(200 / 20 + 300 / 10)


def test_the_busiest_stage_limits() -> None:
    """Each stage's seconds count against the threads that it had."""
    one = receipt("a", 0, 10, 100, decode=15.0, forward=9.0, read=1.0)
    assert speed([one], decode_threads=2).limited_by == "forward"
    assert speed([one], decode_threads=1).limited_by == "decode"
    assert speed([], decode_threads=1).limited_by == "nothing to do"


def test_counts_go_up_and_end_exact() -> None:
    """Late and repeated ticks of the actors never make more images than there are when all is done."""
    state = State(set="x@1", shards=2)
    state.see({"a": {"under_way": {"s": (40, 1)}}})
    state.finish(replace(receipt("a", 0, 1, 50, 2), shard="s"))
    state.see({"a": {"under_way": {"s": (50, 2)}}})  # of a second ago
    assert state.images == 50
    state.see({"a": {"under_way": {"t": (15, 0), "u": (2, 0)}}, "b": {"under_way": {"t": (18, 0)}}})  # one was silent
    assert (state.images, state.rejects) == (70, 2)
    state.finish(replace(receipt("a", 1, 2, 30), shard="t"))
    state.settle()
    assert (state.shards_done, state.images, state.rejects) == (2, 80, 2)


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
