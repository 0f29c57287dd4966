"""Of any number of starts one holds the lease; a dead holder's runs out; one that slept through it commits nothing."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from lease_race import hear, processes, race, tell

from pipeline import lease as lease_module
from pipeline.errors import StorageError, UsageError
from pipeline.lease import FOLDER, Claim, Lease, Lost, Taken, holder, latest
from pipeline.output import Root


def until(is_so: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[str]"]]:
    with processes() as started:
        yield started


def test_of_many_starts_at_once_one_wins_and_its_death_frees_the_lease(
    tmp_path: Path, started: list["subprocess.Popen[str]"]
) -> None:
    """Eight processes; the winner is killed outright, and the lease runs out by itself, not before."""
    root = Root(str(tmp_path / "out"))
    winner = race(root.url, started, 8, 5)
    os.kill(winner.pid, signal.SIGKILL)
    winner.wait()
    until = latest(root)[1].until  # type: ignore[union-attr]
    with pytest.raises(Taken, match=f":{winner.pid} since"), Lease(root, 5):
        pass
    time.sleep(max(0.0, until - time.time()) + 0.05)
    assert holder(root) is None
    with Lease(root, 5) as lease:
        lease.check()
        assert latest(root)[0] == 2 and list(root.list(FOLDER)) == [f"{FOLDER}/00000002.json"]


def test_a_holder_that_slept_through_a_takeover_finds_out(
    tmp_path: Path, started: list["subprocess.Popen[str]"]
) -> None:
    """Stopped, as a suspended machine, for longer than its lease: it wakes to `Lost`, and its renewals hurt nobody."""
    root = Root(str(tmp_path))
    zombie = race(root.url, started, 1, 2)
    os.kill(zombie.pid, signal.SIGSTOP)
    time.sleep(max(0.0, latest(root)[1].until - time.time()) + 0.1)  # type: ignore[union-attr]
    with Lease(root, 2) as lease:
        os.kill(zombie.pid, signal.SIGCONT)
        tell(zombie)
        assert hear(zombie).startswith(f"Lost: the lease on {root.url} ran out after 2 s")
        zombie.wait(30)
        lease.check()
    assert latest(root)[0] == 2 and holder(root) is None


def test_a_holder_renews_and_one_who_ends_makes_room_at_once(tmp_path: Path) -> None:
    """Held for longer than a timeout by renewals alone; then free, also after an error."""
    root = Root(str(tmp_path))
    with pytest.raises(ZeroDivisionError), Lease(root, 4) as lease:
        first = latest(root)[1]
        time.sleep(5)
        lease.check()
        assert holder(root).since == first.since  # type: ignore[union-attr]
        raise ZeroDivisionError
    assert holder(root) is None
    with Lease(root, 2) as lease:
        lease.check()


def test_who_was_overtaken_loses_whatever_its_own_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a day ahead takes a live lease over: one of the two may commit, not both."""
    root = Root(str(tmp_path))
    with Lease(root, 60) as first:
        ahead = time.time() + 86400
        monkeypatch.setattr(lease_module.time, "time", lambda: ahead)
        with Lease(root, 60) as second:
            monkeypatch.undo()
            with pytest.raises(Lost, match=f"taken over by .*:{os.getpid()} since"):
                first.check()
            second.check()
        first._write()  # a renewal that was under way
        assert latest(root)[0] == 2
    assert holder(root) is None


def test_a_store_that_was_away_costs_the_lease_only_where_somebody_else_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals fail until both have run out: one holder has it again by itself, the other stays overtaken."""
    alone, shared = Root(str(tmp_path / "alone")), Root(str(tmp_path / "shared"))
    put_new = Root.put_new

    def away(*_: object) -> None:
        raise StorageError("away")

    def others(claim: Claim, **changes: Any) -> bytes:
        return json.dumps(asdict(replace(claim, token="another", **changes))).encode()

    monkeypatch.setattr(lease_module, "RENEWALS", 20)
    with Lease(alone, 2) as kept, Lease(shared, 2) as overtaken:
        with monkeypatch.context() as patch:
            patch.setattr(Root, "overwrite", away)
            patch.setattr(Root, "put_new", away)
            until(lambda: holder(alone) is None and holder(shared) is None)
            with pytest.raises(Lost, match="ran out after 2 s"):
                kept.check()
            claim = latest(shared)[1]
            assert claim is not None
            put_new(shared, f"{FOLDER}/00000002.json", others(claim, until=time.time() + 60))
        until(lambda: latest(alone)[0] >= 2)  # the next number again where this machine stands still for so long
        kept.check()
        for is_released in (False, True):  # who came may have committed, and ended since
            shared.overwrite(f"{FOLDER}/00000002.json", others(claim, released=is_released))
            with pytest.raises(Lost, match="ran out after 2 s"):
                overtaken.check()
    assert latest(shared)[0] == 2 and holder(alone) is None
    assert latest(shared)[1].token == "another"  # type: ignore[union-attr]


def test_whoever_may_not_delete_holds_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A role of a bucket without DeleteObject: the lower leases stay, and the highest counts."""
    root = Root(str(tmp_path))

    def refuse(*_: object) -> None:
        raise PermissionError("no DeleteObject")

    monkeypatch.setattr(Root, "delete", refuse)
    for number in (1, 2):
        with Lease(root, 60) as lease:
            lease.check()
            assert latest(root)[0] == len(root.list(FOLDER)) == number


def test_an_answer_that_was_lost_and_numbers_that_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is whose token the highest number holds, not what the put said."""
    root = Root(str(tmp_path))
    put_new = Root.put_new

    def lost_answer(self: Root, name: str, content: bytes) -> bool:
        put_new(self, name, content)
        return False

    monkeypatch.setattr(Root, "put_new", lost_answer)
    with Lease(root, 60) as lease:
        lease.check()
    monkeypatch.undo()

    def late(self: Root, name: str, content: bytes) -> bool:
        """Between the look and the put two others came and went, and one came and stays."""
        monkeypatch.undo()
        for _ in range(2):
            with Lease(root, 60):
                pass
        stays.__enter__()
        return self.put_new(name, content)

    stays = Lease(Root(root.url), 60)
    monkeypatch.setattr(Root, "put_new", late)
    with pytest.raises(Taken), Lease(root, 60):
        pass
    stays.check()
    stays.__exit__(None, None, None)


def test_rubbish_and_wrong_values(tmp_path: Path) -> None:
    """A lease that cannot be read is nobody's; strangers' objects are passed over; a timeout must be one."""
    root = Root(str(tmp_path))
    root.put_new(f"{FOLDER}/00000007.json", b"{")
    root.put_new(f"{FOLDER}/notes.txt", b"hello")
    assert holder(root) is None
    with Lease(root, 60) as lease:
        lease.check()
        assert f"{FOLDER}/notes.txt" in root.list(FOLDER)
        assert latest(root)[0] == 8 and set(asdict(holder(root))) == {  # type: ignore[call-overload]
            *("token", "host", "pid", "since", "until", "released")
        }
    for timeout_s in (0, 1.9, float("nan")):
        with pytest.raises(UsageError, match="--lease-timeout"):
            Lease(root, timeout_s)
    with pytest.raises(UsageError, match="cannot be written"), Lease(Root("/proc/nobody/out"), 60):
        pass


def test_threads_of_one_process_are_as_strangers(memory: str) -> None:
    """On a store in memory too, where they come one after the other."""
    root = Root(memory)
    with Lease(root, 60):
        found: list[str] = []

        def other() -> None:
            try:
                with Lease(Root(memory), 60):
                    found.append("held")
            except Taken as e:
                found.append(str(e))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(found) == 1 and f":{os.getpid()} since" in found[0]
