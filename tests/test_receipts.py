"""The record of a run's shards: written once, read back, and nothing where it is damaged."""

from dataclasses import replace
from pathlib import Path

import made
import pytest

from pipeline import receipts
from pipeline.output import Root
from pipeline.receipts import Ledger, read_receipts, receipts_name


def test_what_was_added_is_read_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several row groups: counts, seconds by part, workers, and the error of a shard without files."""
    monkeypatch.setattr(receipts, "ROWS_AT_ONCE", 2)
    root, ledger = Root(str(tmp_path)), Ledger()
    for i in range(4):
        ledger.add(replace(made.receipt("w:1:a", i, i + 2, 50, 2, seconds={"forward": 1.5}), shard=f"s{i}"))
    ledger.add(replace(made.receipt("w:2:b", 4, 5, 0), shard="bad", files=None, error="read: " + "x" * 999))
    ledger.put(root, "run-1")
    rows = read_receipts(root, "run-1").to_pylist()
    assert [(r["shard"], r["samples"], r["rows"], r["worker"]) for r in rows] == [
        *((f"s{i}", 52, 50, "w:1:a") for i in range(4)),
        ("bad", 0, 0, "w:2:b"),
    ]
    assert [(r["started"], r["ended"], r["forward_s"], r["read_s"]) for r in rows[:2]] == [
        (0, 2, 1.5, 0),
        (1, 3, 1.5, 0),
    ]
    assert [r["error"] is None for r in rows] == [True] * 4 + [False]
    assert len(rows[4]["error"]) == receipts.ERROR_CHARS and rows[4]["error"].startswith("read: x")


def test_a_run_without_receipts_writes_nothing_and_a_damaged_file_tells_nothing(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    Ledger().put(root, "idle")
    assert root.list("reports") == {} and read_receipts(root, "idle") is None
    root.put_new(receipts_name("cut"), b"PAR1 and no more")
    assert read_receipts(root, "cut") is None
    ledger = Ledger()
    for i in range(500):
        ledger.add(replace(made.receipt("w:1:a", i, i + 2, 50, 2), shard=f"shard-{i:05d}"))
    ledger.put(root, "rotten")
    path = Path(root.at(receipts_name("rotten")))
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)  # its pages, and not its footer
    path.write_bytes(content)
    assert read_receipts(root, "rotten") is None
