"""Norms, classes, confidence and accuracy of a version: as a plain loop over its rows counts them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import written

from pipeline import distributions as module
from pipeline import versions
from pipeline.backbone import Arrays
from pipeline.config import VectorSet
from pipeline.distributions import distributions
from pipeline.listing import Shard
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.rows import ShardWriter
from pipeline.shards import Sample

NAMES = ("crane", "tench", "crane", "hen", "ox", "bee", "ant", "elk", "yak", "cod")


def shard(root: Root, vectors: VectorSet, name: str, scores: np.ndarray, labels: list[int | None]) -> object:
    """A shard whose rows have these probabilities of the ten classes, (n, 10)."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : vectors.top_k].astype(np.int32)
    values = np.ones((len(scores), vectors.dim), np.float32) * (1 + np.arange(len(scores), dtype=np.float32))[:, None]
    arrays = Arrays(values, np.linalg.norm(values, axis=1), order, np.take_along_axis(scores, order, 1))
    listed = Shard(name=name, format="webdataset", url=name, size=1, etag="0" * 16)
    with ShardWriter(vectors, listed, NAMES, root.scratch()) as writer:
        samples = [Sample(row=i, key=f"k{i}", label=label) for i, label in enumerate(labels)]
        writer.rows(samples, [(8, 8)] * len(samples), arrays)
        return versions.publish(root, vectors.folder, listed, writer)[0]


def test_counts_are_those_of_a_loop(tmp_path: Path) -> None:
    """Over two shards, labels known and not, one of no class of the model, two classes of one name."""
    root, vectors, rng = Root(str(tmp_path)), written.vectors_of(4, top_k=5), np.random.default_rng(1)
    scores = rng.dirichlet(np.full(10, 0.3), 300).astype(np.float32)
    labels: list[int | None] = [int(x) for x in rng.integers(0, 10, 300)]
    labels[::7], labels[3], labels[4] = [None] * 43, 10, -1
    files = [
        shard(root, vectors, name, scores[part], labels[part])
        for name, part in (("a", slice(90)), ("b", slice(90, 300)))
    ]
    found = distributions(root, FileList.of(files), 10)  # type: ignore[arg-type]
    assert found is not None and (found.rows, found.of) == (300, 300)
    first = scores.argmax(axis=1)
    counts = Counter(first.tolist())
    assert [(c.index, c.images) for c in found.classes] == sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    assert found.classes_predicted == len(counts) and found.classes_there == 10
    assert {c.name for c in found.classes if c.index in (0, 2)} == {"crane (0)", "crane (2)"}
    for c in found.classes:
        assert c.confidence == pytest.approx(scores[first == c.index].max(axis=1).mean(), rel=1e-5)
    assert found.confidence is not None and sum(found.confidence.counts) == 300
    assert found.norm is not None and sum(found.norm.counts) == 300
    assert (found.norm.least, found.norm.most) == (2.0, 420.0)
    a = found.accuracy
    known = [i for i, label in enumerate(labels) if label is not None and 0 <= label < 10]
    top5 = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert a is not None and a.labelled == len(known)
    assert a.top1 == pytest.approx(np.mean([first[i] == labels[i] for i in known]))
    assert a.top5 == pytest.approx(np.mean([labels[i] in top5[i] for i in known]))
    wrong = Counter((labels[i], int(first[i])) for i in known if first[i] != labels[i])
    assert [c.images for c in a.confusions] == [n for _, n in wrong.most_common(module.CONFUSIONS)]
    worst = {c.index: c.top1 for c in a.worst}
    assert worst == {
        c: pytest.approx(np.mean([first[i] == c for i in known if labels[i] == c])) for c in {labels[i] for i in known}
    }
    assert list(worst.values()) == sorted(worst.values())
    assert sum(b["images"] for b in a.calibration) == len(known)
    assert sum(map(sum, a.grid)) == sum(
        1 for i in known if NAMES[labels[i]] and {labels[i], int(first[i])} <= set(range(10))
    )


def test_sure_and_right_scores_are_calibrated(tmp_path: Path) -> None:
    """Where 8 of 10 at 0.8 are right there is no error; a class no row has keeps the name that is given for it."""
    root, vectors = Root(str(tmp_path)), written.vectors_of(4, top_k=2)
    scores = np.full((10, 10), 0.2 / 9, np.float32)
    scores[:, 1] = 0.8
    files = [shard(root, vectors, "a", scores, [1] * 8 + [9] * 2)]
    found = distributions(root, FileList.of(files), 10, lambda: NAMES)  # type: ignore[arg-type]
    assert found is not None and found.accuracy is not None
    assert found.accuracy.calibration == [
        {"images": 10, "confidence": pytest.approx(0.8), "accuracy": pytest.approx(0.8)}
    ]
    assert found.accuracy.calibration_error == pytest.approx(0, abs=1e-6)
    assert found.accuracy.top1 == 0.8 and found.accuracy.confusions[0].true == "cod"
    assert found.accuracy.worst[0].name == "tench"  # the two of cod are too few to judge


def test_of_very_many_rows_some_shards_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly over the list; what was looked at is told."""
    root, vectors = Root(str(tmp_path)), written.vectors_of(4, top_k=0, classes=0, outputs=("embedding",))
    shards = {f"s{i}": {f"k{j}": (np.full(4, i + 1.0), 0) for j in range(5)} for i in range(8)}
    written.version(root, vectors, shards)
    files = versions.read_list(root, versions.current(root))
    monkeypatch.setattr(module, "MOST_ROWS", 20)
    found = distributions(root, files, 0)
    assert found is not None and (found.rows, found.of) == (20, 40)
    assert (found.norm.least, found.norm.most) == (4.0, 16.0)  # type: ignore[union-attr]  # shards 1, 3, 5, 7
    assert found.confidence is None and found.classes == [] and found.accuracy is None
    assert distributions(root, FileList.of([]), 0) is None
