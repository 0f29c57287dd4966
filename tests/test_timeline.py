"""Speed over time out of receipts: nothing is lost between bins, slow shards are named."""

from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pytest

from pipeline import timeline as module
from pipeline.embed import Receipt
from pipeline.output import Root
from pipeline.receipts import RECEIPTS, Ledger, read_receipts
from pipeline.timeline import timeline


def table(tmp_path: Path, receipts: list[Receipt]) -> pa.Table:
    ledger = Ledger()
    for receipt in receipts:
        ledger.add(receipt)
    ledger.put(Root(str(tmp_path)), "r")
    return read_receipts(Root(str(tmp_path)), "r")


def test_images_are_spread_over_their_shards_seconds(tmp_path: Path) -> None:
    """Two shards of two workers, one twice as long; the second half of the time has the longer one alone."""
    parts = {"read": 1.0, "fetch": 1.0, "forward": 4.0}
    found = timeline(
        table(
            tmp_path,
            [
                replace(made.receipt("h:1:a", 100, 110, 40, seconds=parts), shard="long"),
                replace(made.receipt("g:1:b", 100, 105, 40, seconds=parts), shard="short"),
                replace(made.receipt("g:1:b", 105, 105, 0), shard="theirs", embedded=False),
            ],
        )
    )
    assert found is not None and (found.shards, found.workers, found.hosts, found.seconds) == (2, 2, 2, 10)
    assert found.edges == [0, 10] and found.images_per_s == [8.0]
    assert found.at_work == {"read": [0.4], "decode": [0.0], "transfer": [0.0], "forward": [0.8], "write": [0.0]}
    assert [(s.shard, s.seconds, s.images_per_s) for s in found.slowest] == [("long", 10, 4), ("short", 5, 8)]
    assert found.slowest[0].times_median == pytest.approx(0.25 / 0.1875)
    assert found.slowest[0].stage_seconds["read"] == 2.0


def test_the_curve_holds_every_image_whatever_the_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its integral is the number of images, over chunks too, and no more than BINS are drawn."""
    monkeypatch.setattr(module, "AT_ONCE", 7)
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 90, 200)
    receipts = [made.receipt(f"h:{i % 3}:a", s, s + rng.uniform(0, 10), 10 + i) for i, s in enumerate(starts)]
    found = timeline(table(tmp_path, receipts))
    assert found is not None and len(found.images_per_s) == module.BINS
    assert np.dot(found.images_per_s, np.diff(found.edges)) == pytest.approx(sum(10 + i for i in range(200)))
    assert len(found.slowest) == module.SLOWEST
    assert [s.seconds for s in found.slowest] == sorted((s.seconds for s in found.slowest), reverse=True)


def test_a_run_where_all_failed_has_its_errors_and_no_curve(tmp_path: Path) -> None:
    failed = replace(made.receipt("h:1:a", 1, 2, 0), shard="s", files=None, error="read: gone", embedded=False)
    found = timeline(table(tmp_path, [failed]))
    assert found is not None and found.failed == [{"shard": "s", "error": "read: gone"}]
    assert found.images_per_s == [] and found.slowest == []
    assert timeline(RECEIPTS.empty_table()) is None
