"""The pool of workers: whom it asks for and whom it lets go, without Ray."""

from pipeline.actors import breath


def test_workers_are_asked_for_while_shards_wait() -> None:
    """Beside those that are on their way, up to the most."""
    assert breath(3, [2], 5, (1, 8), False) == (4, ())
    assert breath(3, [2], 50, (1, 8), True) == (5, ())
    assert breath(8, [], 5, (1, 8), True) == (0, ())
    assert breath(4, [1, 2, 3], 3, (1, 8), True) == (0, ())


def test_who_found_no_room_is_let_go_when_nothing_waits() -> None:
    """But for the least number; never one that has started, though a board that was started again forgets it."""
    assert breath(4, [1, 2, 3], 0, (1, 8), True) == (0, [1, 2, 3])
    assert breath(4, [1, 2, 3], 0, (2, 8), True) == (0, [1, 2])
    assert breath(4, [], 0, (1, 8), True) == (0, [])
    assert breath(4, [1, 2, 3], 0, (1, 8), False) == (0, ()), "there are more shards to come"
