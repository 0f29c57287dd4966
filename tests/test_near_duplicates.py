"""Near duplicates: every planted one is found, nothing else, and in bounded memory."""

from pathlib import Path

import numpy as np
import planted
import pytest

from pipeline import index, near_duplicates
from pipeline.errors import UsageError
from pipeline.near_duplicates import Duplicates
from pipeline.near_duplicates import near_duplicates as find
from pipeline.output import Root
from pipeline.versions import Version

DIM, PAIRS = 48, 150


def quiet(line: str) -> None:
    pass


def plant() -> tuple[dict[str, np.ndarray], set[tuple[str, ...]]]:
    """3,000 vectors in three files, and the groups among them: pairs over files and lengths, a triple, five equal ones.

    All others are further apart than a cosine of 0.9, the pairs nearer than 0.99.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, DIM)).astype(np.float32)
    ids = [f"{name}/{row}" for name, count in (("a", 1500), ("b/c", 1000), ("d", 500)) for row in range(count)]
    chosen = rng.permutation(3000)[: 2 * PAIRS + 8]
    groups = [(int(a), int(b)) for a, b in chosen[: 2 * PAIRS].reshape(-1, 2)]
    for a, b in groups:
        rows[b] = 2 * (rows[a] + 0.05 * rng.standard_normal(DIM))
    equal, (one, two, three) = chosen[-5:], chosen[-8:-5]
    rows[equal] = rows[equal[0]]
    rows[two], rows[three] = rows[one] + 0.1 * rng.standard_normal((2, DIM))
    groups += [tuple(map(int, equal)), (int(one), int(two), int(three))]
    shards = {"a": rows[:1500], "b/c": rows[1500:2500], "d": rows[2500:]}
    return shards, {tuple(ids[i] for i in sorted(group)) for group in groups}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Version, set[tuple[str, ...]]]:
    shards, groups = plant()
    root = Root(str(tmp_path_factory.mktemp("planted")))
    return root, planted.commit(root, shards), groups


def ids(found: Duplicates) -> set[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for table in found.tables():
        for row in table.to_pylist():
            groups.setdefault(row["group"], []).append(row["id"])
    assert list(groups) == list(range(1, found.count + 1)) and found.images == sum(map(len, groups.values()))
    return set(map(tuple, groups.values()))


def test_every_planted_duplicate_is_found_and_no_other(output: tuple[Root, Version, set[tuple[str, ...]]]) -> None:
    """Without an index, through a flat one and through an ivf one: the same groups, the largest first."""
    root, version, groups = output
    assert ids(find(root, version, above=0.97)) == groups
    index.build(root, version, kind="flat", say=quiet)
    found = find(root, version, above=0.97)
    assert ids(found) == groups and found.how == "every pair was compared"
    for name in [n for n in root.list("index") if n.endswith(".json")]:
        root.delete(name)
    index.build(root, version, kind="ivf", least=0.3, say=quiet)
    found = find(root, version, above=0.97)
    assert ids(found) == groups and "ivf index" in found.how and found.cut == 0
    assert found.sizes()[:3].tolist() == [5, 3, 2]
    assert (found.scores >= 0.97).all() and (found.scores <= 1.000001).all()
    assert (np.diff(found.least[2:]) <= 0).all()  # pairs by their similarity
    largest, second = found.first(2, 4)
    assert tuple(m.id for m in largest) in {group[:4] for group in groups if len(group) == 5}
    assert all(m.score > 0.999999 and m.width == 640 for m in largest)
    assert {m.id for m in second} in [set(group) for group in groups]


def test_few_pairs_at_once_give_the_same_groups(
    output: tuple[Root, Version, set[tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory pairs may take, nothing is lost between two weighings."""
    root, version, groups = output
    index.build(root, version, kind="ivf", least=0.3, say=quiet)
    monkeypatch.setattr(near_duplicates, "PAIR_BYTES", 8 * DIM * 20)
    monkeypatch.setattr(near_duplicates, "QUERIES_AT_ONCE", 97)
    monkeypatch.setattr(near_duplicates, "TOLD_AT_ONCE", 41)
    assert ids(find(root, version, above=0.97)) == groups


def test_a_hundred_equal_images_are_one_group(tmp_path: Path) -> None:
    """More of them than are asked for at first: they are asked for again. Two chains are joined by their middle."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((800, DIM)).astype(np.float32)
    rows[:100] = rows[0]
    rows[150] = rows[149] + 0.25 * rng.standard_normal(DIM)
    rows[151] = 2 * rows[150] - rows[149]  # as far from 150 as that is from 149
    root = Root(str(tmp_path))
    version = planted.commit(root, {"a": rows})
    unit = rows[149:152] / np.linalg.norm(rows[149:152], axis=1, keepdims=True)
    above = float(min(unit[0] @ unit[1], unit[1] @ unit[2])) - 1e-4
    assert unit[0] @ unit[2] < above
    index.build(root, version, kind="ivf", least=0.3, say=quiet)
    found = find(root, version, above=above)
    assert ids(found) == {tuple(f"a/{n}" for n in range(100)), ("a/149", "a/150", "a/151")}
    assert found.cut == 0


def test_zero_vectors_are_no_duplicates(tmp_path: Path) -> None:
    """Two images without a direction have a cosine of 0."""
    rows = np.random.default_rng(1).standard_normal((50, DIM)).astype(np.float32)
    rows[[3, 4]] = 0
    root = Root(str(tmp_path))
    found = find(root, planted.commit(root, {"a": rows}), above=0.95)
    assert (found.count, found.images, found.first(8, 6), list(found.tables())) == (0, 0, [], [])


def test_a_large_version_needs_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which command makes one; similarities that cannot be are refused."""
    monkeypatch.setattr(near_duplicates, "FLAT_BYTES", 1000)
    root = Root(str(tmp_path))
    version = planted.commit(root, {"a": np.ones((10, DIM), np.float32)})
    with pytest.raises(UsageError, match=r"version 1 of .* has no index: run `shard2vec index .*` first"):
        find(root, version)
    for above in (0.0, -1.0, 1.5):
        with pytest.raises(UsageError, match=r"--above .*: must be above 0 and at most 1"):
            find(root, version, above=above)
