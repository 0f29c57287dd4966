"""Rollback: an earlier version's files are current again, and what was rolled away does not come back by itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_jobs import call
from written import vectors_of, version

from pipeline import garbage, readers, versions
from pipeline import rollback as rollback_module
from pipeline.errors import StorageError, UsageError
from pipeline.garbage import collect_garbage
from pipeline.output import Root
from pipeline.rollback import held, roll_back
from pipeline.verify import verify
from pipeline.versions import Version, current, numbers

A, B = vectors_of(4), vectors_of(4, decode="fast")
ROWS = {"k": (np.ones(4, np.float32), 1)}


def history(tmp_path: Path) -> tuple[Root, list[Version]]:
    """Set A with one shard, then with two, then set B with two."""
    root = Root(str(tmp_path))
    return root, [
        version(root, A, {"s": ROWS}),
        version(root, A, {"s": ROWS, "t": ROWS}),
        version(root, B, {"s": ROWS, "t": ROWS}),
    ]


def test_a_rollback_is_a_version_with_the_files_of_the_one_before(tmp_path: Path) -> None:
    """Whole, verified, with the earlier one's counts; readers see it at once; what was rolled away is noted."""
    root, (_, second, third) = history(tmp_path)
    back = roll_back(root)
    assert (back.version, back.set, back.files, back.rows, back.shards) == (4, A.name, second.files, 2, 2)
    away = {"version": 3, "set": B.name, "files": third.files}
    assert back.rolled_back == {"to": 2, "away": [away]} and current(root) == back
    assert readers.files(str(tmp_path)) == readers.files(str(tmp_path), version=2)
    assert verify(root, back).clean
    assert roll_back(root, 2) == back and numbers(root) == [1, 2, 3, 4]


def test_said_again_it_goes_one_further_back(tmp_path: Path) -> None:
    """Not to what was just rolled away; and everything newer than the target is away then."""
    root, made = history(tmp_path)
    roll_back(root)
    back = roll_back(root)
    assert (back.version, back.files) == (5, made[0].files)
    assert [one["version"] for one in back.rolled_back["away"]] == [2, 3]
    with pytest.raises(UsageError, match="no version before 1 to roll back to"):
        roll_back(root)
    forward = roll_back(root, 3)
    assert (forward.version, forward.set) == (6, B.name)
    assert [one["files"] for one in forward.rolled_back["away"]] == [made[1].files, made[0].files]


def test_a_set_that_was_rolled_away_is_held_over_any_input_and_a_list_only_itself(tmp_path: Path) -> None:
    """Away from B, B is held with whatever files; within A, the same files are and others are not."""
    root, (first, second, third) = history(tmp_path)
    back = roll_back(root, 2)
    assert "version 4 rolled back to version 2, away from set " + B.name in held(back, B.name, "versions/new.parquet")
    assert "--after-rollback" in held(back, B.name, None) and held(back, B.name, third.files)
    assert (
        held(back, A.name, second.files) == held(back, A.name, "versions/new.parquet") == held(back, A.name, None) == ""
    )
    further = roll_back(root, 1)
    assert held(further, A.name, second.files).startswith(
        "version 5 rolled back to version 1, away from the files of ver"
    )
    assert held(further, A.name, first.files) == held(further, A.name, None) == ""
    assert held(further, B.name, None) and held(third, A.name, second.files) == "" and held(None, A.name, None) == ""


def test_what_is_committed_on_top_ends_the_hold(tmp_path: Path) -> None:
    """Also the very files that were rolled away, by who is not asked."""
    root, (_, _, third) = history(tmp_path)
    roll_back(root)
    again = version(root, B, {"s": ROWS, "t": ROWS})
    assert (again.version, again.files, again.rolled_back) == (5, third.files, {})
    assert held(again, B.name, third.files) == held(again, A.name, None) == ""


def test_a_commit_in_the_same_moment_is_rolled_away_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target was chosen before; what came between is noted, and the rollback is on top."""
    root, (_, second, _) = history(tmp_path)
    put_new = Root.put_new

    def slow(self: Root, name: str, content: bytes) -> bool:
        if name.endswith("00000004.json"):
            monkeypatch.undo()
            version(root, B, {"s": ROWS})
        return put_new(self, name, content)

    monkeypatch.setattr(Root, "put_new", slow)
    back = roll_back(root)
    assert (back.version, back.files) == (5, second.files)
    assert [one["version"] for one in back.rolled_back["away"]] == [3, 4] and numbers(root) == [1, 2, 3, 4, 5]


def test_what_gc_took_cannot_come_back_and_the_rollback_outlives_its_origin(tmp_path: Path) -> None:
    """No version, no file: 2 and a sentence. The version that was rolled to may go, its files stay."""
    root, (_, second, _) = history(tmp_path)
    back = roll_back(root)
    collect_garbage(root, 1, set)
    assert numbers(root) == [4] and verify(root, back).clean
    for to, message in ((2, "has no version 2: it has 4"), (None, "no version before 2")):
        with pytest.raises(UsageError, match=message):
            roll_back(root, to)
    version(root, A, {"s": ROWS})
    name = next(n for n in versions.read_list(root, second).names("rejects") if "/t-" in n)
    root.delete(name)
    with pytest.raises(UsageError, match=f"cannot come back: 1 of its files are gone or altered, among them {name}"):
        roll_back(root)
    with pytest.raises(UsageError, match="no committed version yet"):
        roll_back(Root(str(tmp_path / "none")))


def test_what_gc_deletes_in_the_same_moment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files were all there when it looked, and one is not when the version is: a sentence, no silence."""
    root, (_, second, _) = history(tmp_path)
    name = next(n for n in versions.read_list(root, second).names("embeddings") if "/t-" in n)

    def append(*given: Any) -> Version | None:
        root.delete(name)
        return versions.append(*given)

    monkeypatch.setattr(rollback_module, "append", append)
    with pytest.raises(StorageError, match=f"version 4 of .* lacks 1 files, among them {name}: gc deleted them mean"):
        roll_back(root)


@pytest.mark.parametrize("slices_before", [0, 1])
def test_gc_spares_what_becomes_current_while_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slices_before: int
) -> None:
    """Files of old versions that a run finds done, and commits, when others have gone already; or is about to."""
    root, (_, second, _) = history(tmp_path)
    monkeypatch.setattr(garbage, "SLICE", 1)
    asked: list[None] = []

    def commits_meanwhile() -> set[str]:
        asked.append(None)
        if len(asked) == 2 + slices_before:
            version(root, A, {"s": ROWS, "t": ROWS})
        return set()

    deleted = collect_garbage(root, 1, commits_meanwhile)
    assert len(asked) > 2 and numbers(root) == [3, 4] and current(root).files == second.files
    assert verify(root, current(root)).clean and len(deleted) >= 3  # two versions, and the list of the first
    version(root, B, {"s": ROWS})
    asked.clear()
    sets = [{A.name} if at else set() for at in range(99)]
    deleted = collect_garbage(root, 1, lambda: sets.pop(0))
    assert versions.version_name(4) in deleted and not any(A.name in name for name in deleted)


def test_rollback_from_the_command_line(tmp_path: Path) -> None:
    """One command, one sentence; again it does nothing; the version as JSON."""
    root, (_, second, _) = history(tmp_path)
    code, out, err = call("rollback", tmp_path)
    assert (code, out) == (0, "")
    assert err == f"shard2vec: version 4 of {tmp_path}: the files of version 2, set {A.name}\n"
    code, out, err = call("rollback", tmp_path, "--to", 2, "--json")
    assert code == 0 and "has these files already: nothing done" in err
    assert json.loads(out) == asdict(current(root)) and json.loads(out)["files"] == second.files
    code, _, err = call("rollback", tmp_path, "--to", 9)
    assert (code, err) == (2, f"shard2vec: {tmp_path} has no version 9: it has 1, 2, 3, 4\n")
