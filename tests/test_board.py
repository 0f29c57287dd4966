"""The promises of pipeline/board.py: every shard is lent until its receipt is there, whoever dies or falls silent."""

import pytest

from pipeline.board import SILENT_S, Board


def activity(*shards: str) -> dict[str, object]:
    return {"steps": 1, "stage": "read", "shard": "", "under_way": dict.fromkeys(shards, (0, 0))}


def board_of(*shards: str) -> Board:
    board = Board()
    board.add([(name, name.encode()) for name in shards])
    return board


def test_each_shard_is_lent_once_in_order() -> None:
    """Then there is none for now, and none ever again once the driver ends it."""
    board = board_of("a", "b")
    board.add([("b", b"b")])  # handed in twice, lent once
    assert [board.take("x"), board.take("y"), board.take("x")] == [(b"a", 0), (b"b", 0), False]
    assert board.take("x", [("a", b"receipt of a")]) is False
    assert board.read("", 0).receipts == [b"receipt of a"]
    board.end()
    assert board.take("x") is True


def test_receipts_are_kept_until_the_driver_has_them() -> None:
    """An answer that gets lost on its way is given again; so is none twice to a driver that has it."""
    board = board_of("a", "b")
    for shard in "ab":
        board.take("x")
        board.done([(shard, shard.upper().encode())])
    first = board.read("", 0)
    assert first.receipts == board.read(first.epoch, 0).receipts == [b"A", b"B"]
    board.done([("c", b"C")])
    assert board.read(first.epoch, 2).receipts == [b"C"]
    assert board.read(first.epoch, 3).receipts == []


def test_what_a_dead_worker_had_is_lent_again_first() -> None:
    """Its successor in the slot tells that it died; the next one learns how often that was so."""
    board = board_of("a", "b", "c")
    board.start(0, "x")
    board.start(1, "y")
    for slot, who in enumerate(("x", "y")):
        board.say(slot, who, activity())
    assert board.take("x") == (b"a", 0) and board.take("y") == (b"b", 0)
    board.start(0, "x2")
    told = board.read("", 0)
    assert (told.slots, told.ready, told.died, told.false_starts, set(told.said)) == ({0, 1}, 2, 0, 0, {"y"})
    assert board.take("y") == (b"a", 1) and board.take("x2") == (b"c", 0)
    board.start(1, "y2")
    assert {board.take("x2"), board.take("x2")} == {(b"a", 2), (b"b", 1)}


def test_what_a_silent_worker_has_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped machine holds nobody up: when nothing else is left, its shard is lent again, to one at a time."""
    clock = [1000.0]
    monkeypatch.setattr("pipeline.board.time.monotonic", lambda: clock[0])
    board = board_of("a")
    assert board.take("x") == (b"a", 0)
    clock[0] += SILENT_S - 1
    assert board.take("y") is False
    clock[0] += 2
    assert board.take("x2") == (b"a", 1)
    assert board.take("y") is False
    board.done([("a", b"A")])
    board.done([("a", b"A of the one that was silent")])
    assert board.take("y") is False
    assert len(board.read("", 0).receipts) == 2  # the driver knows its shards


def test_a_board_that_was_started_again_learns_what_is_lent() -> None:
    """From what its workers say; the driver hands everything in again, whose receipts it has not."""
    old, new = board_of("a", "b"), Board()
    old.take("x")
    assert new.epoch != old.epoch
    assert new.read(old.epoch, 7).receipts == []
    new.done([("b", b"B")])
    assert new.read(old.epoch, 7).receipts == [b"B"]  # of which the driver has had none
    new.add([("a", b"a"), ("b", b"b")])
    new.say(0, "x", activity("a"))
    assert new.take("y") == (b"b", 0) and new.take("y") is False
    told = new.read("", 0)
    assert (told.slots, told.ready, told.died, told.false_starts) == ({0}, 1, 0, 0)


def test_the_dead_are_counted_by_their_slots() -> None:
    """One that was ready and whose successor is, and one that never got so far; a slot that is new is no death."""
    board = board_of("a")
    for slot, who in ((0, "x"), (1, "y"), (0, "x2"), (2, "z")):
        board.start(slot, who)
        if who != "y":
            board.say(slot, who, activity())
    board.start(1, "y2")
    told = board.read("", 0)
    assert (told.ready, told.died, told.false_starts, set(told.said)) == (3, 1, 1, {"x2", "z"})


def test_what_was_on_a_node_that_went_is_lent_again_at_once() -> None:
    """Its workers' successors may find no room for long."""
    board = board_of("a")
    board.start(0, "x", "node")
    assert board.take("x") == (b"a", 0)
    board.start(1, "y", "other")
    assert board.take("y") is False
    board.lose({"node", "one that nobody was on"})
    board.lose({"node"})
    assert board.take("y") == (b"a", 1)


def test_workers_leave_when_nothing_waits_but_for_the_least() -> None:
    """Once no more shards come; one that is still at its last shard is heard, and a dead one's shard has a taker."""
    board = board_of("a", "b")
    for slot, who in enumerate("xyz"):
        board.start(slot, who)
        board.say(slot, who, activity())
    assert board.take("x") == (b"a", 0) and board.take("y") == (b"b", 0)
    assert board.take("z") is False
    board.let_go(least=1)
    assert [board.take("z"), board.take("x"), board.take("y")] == [True, True, False]
    assert set(board.read("", 0).said) == {"x", "y"}, "x has a shard under way"
    board.start(0, "x2")
    assert board.take("x2") == (b"a", 1) and board.take("x2") is True
    board.done([("a", b"A")])
    board.done([("b", b"B")])
    assert board.take("y") is False
    board.end()
    assert board.take("y") is True
