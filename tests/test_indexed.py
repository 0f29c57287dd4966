"""Neighbours and near-duplicates of a report: of the whole version where it has an index, else of the sample."""

from pathlib import Path

import numpy as np
import planted
import pytest

from pipeline import stored_index, vector_map
from pipeline.index import build
from pipeline.indexed import Whole, of_version
from pipeline.output import Root
from pipeline.vector_map import NEAR, NEIGHBOURS, duplicates, neighbours, project, sample
from pipeline.versions import read_list


def whole(root: Root, version: object) -> Whole:
    files = read_list(root, version)  # type: ignore[arg-type]
    sampled = sample(root, files)
    assert sampled is not None
    found = neighbours(sampled, project(sampled))
    return of_version(root, version, sampled, found, duplicates(sampled))  # type: ignore[arg-type]


def test_an_index_finds_what_the_sample_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the nearest of all rows, and pairs of which the sample has one or none."""
    monkeypatch.setattr(vector_map, "SAMPLE_ROWS", 16)
    monkeypatch.setattr(vector_map, "SAMPLE_SHARDS", (1, 2))
    root, rng = Root(str(tmp_path)), np.random.default_rng(5)
    rows = rng.normal(size=(120, 8)).astype(np.float32)
    rows[100:110] = rows[:10] * 3 + 0.001  # copies, of another length
    version = planted.commit(root, {"a": rows[:60], "b": rows[60:]})
    before = whole(root, version)
    assert before.how == "Sought in the sample of 16 rows." and before.duplicates is not None
    assert before.duplicates.among == 16
    build(root, version, say=lambda line: None)
    found = whole(root, version)
    assert found.how.startswith("Sought in all 120 rows through the flat index, recall@10 1.000")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    ids = [f"{'a' if i < 60 else 'b'}/{i % 60}" for i in range(120)]
    assert [n.query for n in found.neighbours] == [n.query for n in before.neighbours]
    for n in found.neighbours:
        cosines = unit @ unit[ids.index(n.query.id)]
        cosines[ids.index(n.query.id)] = -2
        assert [t.id for t in n.nearest] == [ids[i] for i in np.argsort(-cosines)[:NEIGHBOURS]]
        assert all(tile.name.startswith("class ") for tile in n.nearest)
    pairs = {frozenset((ids[i], ids[j])) for i in range(120) for j in range(i) if unit[i] @ unit[j] >= NEAR}
    assert found.duplicates is not None
    assert (found.duplicates.among, found.duplicates.nearest_among, found.duplicates.cut) == (120, 16, 0)
    assert found.duplicates.sizes == [2] * 8 and found.duplicates.least == sorted(found.duplicates.least, reverse=True)
    assert found.duplicates.count == len(pairs) == 10 and found.duplicates.images == 20
    assert {frozenset(tile.id for tile in group) for group in found.duplicates.groups} <= pairs
    assert min(found.duplicates.least) >= NEAR

    asked = []
    monkeypatch.setattr(stored_index, "index_of", lambda *a, of=stored_index.index_of: asked.append(a) or of(*a))
    assert whole(root, version).neighbours == found.neighbours
    assert len(asked) == 2  # for all the neighbours once, and for the duplicates

    (name,) = root.list_flat("index")
    Path(root.at(name)).write_text("{}")
    without = whole(root, version)
    assert without.how.startswith(f"Sought in the sample of 16 rows: the index cannot be used ({name} is damaged")
    assert (without.neighbours, without.duplicates) == (before.neighbours, before.duplicates)
