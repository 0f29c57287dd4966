"""The pool of workers: whom it asks for and whom it lets go; how a worker asks the board."""

import pickle
import time
from collections import deque

import pytest

from pipeline import actors
from pipeline.actors import EmbedShards, breath, ray
from pipeline.board import Board
from pipeline.embed import Receipt, worker_name
from pipeline.listing import Shard


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


def receipt_of(shard: str) -> Receipt:
    return Receipt(
        shard=shard, files=None, error="none", embedded=False, bytes_read=0, seconds={}, started=0, ended=0, worker="x"
    )


@pytest.mark.usefixtures("ray_session")
def test_what_a_slow_board_has_lent_is_not_lent_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes late is waited for, so each shard comes once; and every receipt arrives."""

    class SlowBoard(Board):
        """It answers the first two questions late, as on a machine that has other work."""

        def __init__(self) -> None:
            super().__init__()
            self._questions = 0

        def take(self, who: str, receipts: object = ()) -> tuple[bytes, int] | bool:
            lent = super().take(who, receipts)  # type: ignore[arg-type]
            self._questions += 1
            time.sleep(1.0 if self._questions <= 2 else 0)
            return lent

    monkeypatch.setattr(actors, "BOARD_TIMEOUT_S", 0.2)
    board = ray.remote(num_cpus=0)(SlowBoard).remote()
    names = ["a", "b", "c"]
    shards = [Shard(name=n, format="webdataset", url="", size=0, etag="0" * 16) for n in names]
    ray.get(board.add.remote([(shard.name, pickle.dumps(shard)) for shard in shards]))
    ray.get(board.let_go.remote(0))
    ray.get(board.start.remote(0, worker_name()))
    worker = EmbedShards.__new__(EmbedShards)
    worker._board, worker._name, worker._deaths = board, worker_name(), {}
    worker._receipts, worker._is_idle, worker._handed_in = deque(), False, None
    came = []
    for shard in worker._shards():
        came.append(shard.name if shard else None)
        if shard:
            worker._done(receipt_of(shard.name))
    assert [name for name in came if name] == names and None in came
    told = ray.get(board.read.remote("", 0))
    assert [pickle.loads(r).shard for r in told.receipts] == names
    ray.kill(board)
