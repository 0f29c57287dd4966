"""Drift between sets and versions, against what can be worked out by hand or in a plain loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_jobs import call
from written import shard_files, vectors_of, version

from pipeline import compare as compare_module
from pipeline.compare import ClassMove, Side, compare, drift
from pipeline.errors import StorageError, UsageError
from pipeline.output import Root

RNG = np.random.default_rng(7)
DIM = 16


def rows(vectors: np.ndarray, classes: list[int] | None = None, start: int = 0) -> dict:
    return {f"k{start + i:04d}": (v, classes[i] if classes else i % 10) for i, v in enumerate(vectors)}


def nearest(vectors: np.ndarray, i: int) -> set[int]:
    """By definition, a pair after the other, in float64."""
    cosines = {
        j: float(np.dot(vectors[i].astype(float), v) / math.dist(v, 0 * v)) for j, v in enumerate(vectors) if j != i
    }
    return set(sorted(cosines, key=lambda j: -cosines[j])[:10])


def test_each_measure_is_what_its_definition_gives(tmp_path: Path) -> None:
    """60 ids in two shards, in other orders, with ids that only one side has; neighbours by a plain loop."""
    root = Root(str(tmp_path))
    one = RNG.normal(size=(60, DIM)).astype(np.float32)
    other = (one + RNG.normal(scale=0.7, size=one.shape)).astype(np.float32) * 1.25
    first = [0] * 30 + [1] * 15 + [2] * 15
    second = [0] * 24 + [3] * 6 + [1] * 15 + [2] * 15
    before, after = vectors_of(DIM), vectors_of(DIM, decode="fast")
    a, b = rows(one, first), rows(other, second)
    parts = [dict(list(side.items())[at : at + 30]) for side in (a, b) for at in (0, 30)]
    only_a, only_b = {"gone": (one[0], 9)}, {"new": (other[0], 9)}
    version(root, before, {"s/0": only_a | parts[0], "s/1": parts[1], "s/2": only_a})
    backwards = dict(reversed((parts[2] | only_b).items()))
    version(root, after, {"s/0": backwards, "s/1": parts[3], "s/3": only_b})
    found = compare(root, 1, 2)
    overlap = np.mean([len(nearest(one, i) & nearest(other, i)) / 10 for i in range(60)])
    assert 0.2 < overlap < 0.9 and found.overlap_at_10 == pytest.approx(overlap, abs=1e-9)
    cosines = [np.dot(x, y) / math.dist(x, 0 * x) / math.dist(y, 0 * y) for x, y in zip(one, other, strict=True)]
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    norms = [sum(math.dist(v, 0 * v) for v in side) for side in (one, other)]
    assert found.norm_shift == pytest.approx(norms[1] / norms[0] - 1, abs=1e-5)
    assert (found.top1_agreement, found.class_shift) == (54 / 60, pytest.approx(0.1))
    assert found.moved == [ClassMove(0, "", 0.5, 0.4), ClassMove(3, "", 0.0, 0.1)]
    assert found.overlap_by_chance == 10 / 59
    assert (found.shards, found.ids, found.vectors, found.queries) == (2, 60, 60, 60)
    assert (found.same_weights, found.unmeasured) == (True, {})
    assert compare(root, before.name, after.name).as_dict() | {"a": "", "b": ""} == found.as_dict() | {"a": "", "b": ""}


def test_the_same_vectors_do_not_drift(tmp_path: Path) -> None:
    """Two versions of one set: nothing moved, and zero vectors and twins among them make no noise."""
    root = Root(str(tmp_path))
    vectors = np.concatenate([np.zeros((2, DIM)), np.ones((14, DIM)), RNG.normal(size=(20, DIM))]).astype(np.float32)
    version(root, vectors_of(DIM), {"s": rows(vectors)})
    version(root, vectors_of(DIM), {"s": rows(vectors), "t": rows(vectors)})
    found = compare(root, "1", "2")
    assert (found.overlap_at_10, found.norm_shift, found.top1_agreement, found.class_shift) == (1.0, 0.0, 1.0, 0.0)
    assert found.mean_cosine == pytest.approx(34 / 36, abs=1e-6)  # a zero vector has no direction
    assert found.moved == [] and found.ids == 36


def test_what_cannot_be_measured_is_null_and_says_why(tmp_path: Path) -> None:
    """Another model, metrics alone, no classes, other classes, ten ids."""
    root = Root(str(tmp_path))
    vectors = RNG.normal(size=(12, DIM)).astype(np.float32)
    base = vectors_of(DIM)
    other = {
        "model": vectors_of(8, architecture="test_vit2"),
        "metrics": vectors_of(DIM, outputs=("classes",)),
        "vectors": vectors_of(DIM, outputs=("embedding",), top_k=0),
        "classes": vectors_of(DIM, classes=11),
        "names": vectors_of(DIM, labels_sha256="b" * 64),
    }
    version(root, vectors_of(DIM, labels_sha256="a" * 64), {"s": rows(vectors)})
    for kind in other.values():
        version(root, kind, {"s": rows(vectors[:, : kind.dim])})
    version(root, base, {"s": rows(vectors[:10])})
    why = {
        2: {"mean_cosine": "the models differ"},
        3: {"overlap_at_10": "a set keeps no embeddings", "mean_cosine": "a set keeps no embeddings"},
        4: {"top1_agreement": "a set keeps no classes", "class_shift": "a set keeps no classes"},
        5: dict.fromkeys(("top1_agreement", "class_shift"), "the models have 10 and 11 classes"),
        6: dict.fromkeys(("top1_agreement", "class_shift"), "the classes have other names"),
        7: {"overlap_at_10": "10 ids are in both: ten neighbours need 11"},
    }
    for number, reasons in why.items():
        found = compare(root, 1, number)
        assert found.unmeasured == reasons
        for measure in ("overlap_at_10", "mean_cosine", "norm_shift", "top1_agreement", "class_shift"):
            assert (getattr(found, measure) is None) == (measure in reasons), (number, measure)


def test_a_drawn_sample_is_the_same_one_again_and_near_the_whole(tmp_path: Path, monkeypatch: object) -> None:
    """Of 1,200 ids 300 are drawn, from 3 of 6 shards: by their names, not by chance, and from whichever side."""
    root = Root(str(tmp_path))
    one = RNG.normal(size=(1200, DIM)).astype(np.float32)
    classes = [int(c) for c in RNG.integers(0, 10, 1200)]
    moved = [c if i % 4 else 9 - c for i, c in enumerate(classes)]
    for vectors, first in ((vectors_of(DIM), classes), (vectors_of(DIM, decode="fast"), moved)):
        parts = {f"s{j}": rows(one[j::6], first[j::6], start=1000 * j) for j in range(6)}
        version(root, vectors, parts)
    whole = compare(root, 1, 2)
    assert (whole.shards_read, whole.ids, whole.vectors, whole.top1_agreement) == (6, 1200, 1200, 0.75)
    monkeypatch.setattr(compare_module, "SHARDS", 3)
    monkeypatch.setattr(compare_module, "VECTORS", 300)
    monkeypatch.setattr(compare_module, "QUERIES", 100)
    found = compare(root, 1, 2)
    assert (found.shards, found.shards_read, found.ids, found.vectors, found.queries) == (6, 3, 600, 300, 100)
    assert found == compare(root, 1, 2) and abs(found.top1_agreement - 0.75) < 0.1
    back = compare(root, 2, 1)
    assert (back.top1_agreement, back.class_shift) == (found.top1_agreement, found.class_shift)
    assert found.overlap_at_10 == 1.0


def test_a_gate_looks_at_shards_whose_input_is_the_same(tmp_path: Path) -> None:
    """Other images under the same names are a change of the input, not of the set; a set may hold both states."""
    root = Root(str(tmp_path))
    vectors = RNG.normal(size=(12, DIM)).astype(np.float32)
    now = "1" * 16
    version(root, vectors_of(DIM), {"s": rows(vectors), "t": rows(vectors)})
    fast = vectors_of(DIM, decode="fast")
    version(root, fast, {"s": rows(vectors), "t": rows(vectors, [9] * 12)}, etags={"t": now})
    sides = [compare_module.side(root, n) for n in (1, 2)]
    assert drift(root, *sides, unchanged_only=True).top1_agreement == 1.0
    assert drift(root, *sides, unchanged_only=True).ids == 12
    assert (compare(root, 1, 2).ids, compare(root, 1, 2).top1_agreement) == (24, 13 / 24)
    shard_files(root, fast, "t", rows(vectors))
    for number in (1, 2):
        root.delete(f"versions/{number:08d}.json")
    by_name = compare(root, vectors_of(DIM).name, fast.name)
    assert (by_name.a, by_name.top1_agreement, by_name.ids) == (vectors_of(DIM).name, 1.0, 24)


def test_wrong_names_and_damage_are_told(tmp_path: Path) -> None:
    """What there is instead; nothing in common; a file that is not one."""
    root = Root(str(tmp_path))
    vectors = RNG.normal(size=(12, DIM)).astype(np.float32)
    kind = vectors_of(DIM)
    version(root, kind, {"s": rows(vectors)})
    version(root, kind, {"t": rows(vectors)})
    with pytest.raises(UsageError, match="has no version 9: it has 1, 2"):
        compare(root, 9, 1)
    with pytest.raises(UsageError, match=f"pit: .* no such version \\(1, 2\\) and no such set \\({kind.name}\\)"):
        compare(root, "pit", 1)
    with pytest.raises(UsageError, match="version 1 and version 2 have no id in common"):
        compare(root, 1, 2)
    assert drift(root, *(compare_module.side(root, n) for n in (1, 2))).overlap_at_10 is None
    damaged = Side(name="x", set=kind.name, files=compare_module.side(root, 1).files)
    path = tmp_path / damaged.files["embeddings"][0].as_py()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StorageError, match="cannot be read"):
        compare(root, 1, 1)
    path.unlink()
    with pytest.raises(StorageError, match=r"s-0+\.parquet cannot be read: .*No such file"):
        compare(root, 1, 1)


def test_compare_from_the_command_line(tmp_path: Path) -> None:
    """A table for a person with the classes' names, the same as JSON, 2 for what is not there."""
    root = Root(str(tmp_path))
    names = (*(f"fruit {i}" for i in range(9)), "\x1b[2J")
    vectors = RNG.normal(size=(12, DIM)).astype(np.float32)
    version(root, vectors_of(DIM), {"s": rows(vectors, [1] * 11 + [9])}, labels=names)
    other = vectors_of(DIM, weights_sha256="1" * 64)
    version(root, other, {"s": rows(2 * vectors, [1] * 9 + [2] * 3)}, labels=names)
    code, out, err = call("compare", tmp_path, 1, 2)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["A", "version", "1", "·", "set", vectors_of(DIM).name]
    assert ["norm_shift", "+1.0000", "of", "the", "mean", "norm"] in lines
    assert ["91.67%", "→", "75.00%", "fruit", "1", "(1)"] in lines and "the weights differ" in out
    assert ["8.33%", "→", "0.00%", "\\x1b[2J", "(9)"] in lines and "\x1b" not in out
    told = json.loads(call("compare", tmp_path, "1", other.name, "--json")[1])
    measures = {k: told[k] for k in ("overlap_at_10", "mean_cosine", "norm_shift", "top1_agreement", "class_shift")}
    assert measures == {
        "overlap_at_10": 1.0,
        "mean_cosine": 1.0,
        "norm_shift": 1.0,
        "top1_agreement": 0.75,
        "class_shift": 0.25,
    }
    assert told["moved"][1] == {"index": 1, "name": "fruit 1", "share_a": 11 / 12, "share_b": 0.75}
    assert call("compare", tmp_path, 1, 3)[0] == 2 and call("compare", tmp_path / "none", 1, 2)[0] == 2
