"""Map, neighbours and near-duplicates of a sample: those of a plain loop."""

from pathlib import Path

import numpy as np
import pytest
import written

from pipeline import vector_map as module
from pipeline import versions
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.vector_map import Sampled, duplicates, neighbours, project, sample


def sampled(vectors: np.ndarray) -> Sampled:
    n = len(vectors)
    return Sampled(
        vectors=vectors.astype(np.float32),
        ids=[f"s/k{i}" for i in range(n)],
        shards=["s"] * n,
        labels=[None] * n,
        first=[0] * n,
        names=["a"] * n,
        scores=[0.5] * n,
        of=n,
    )


def test_a_sample_is_even_over_the_shards_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of a small version; of a larger one as many of each shard, with their own vectors."""
    root, vectors = Root(str(tmp_path)), written.vectors_of(4)
    shards = {f"s{i}": {f"k{j}": (np.array([i, j, 1, 2]), j % 10) for j in range(12)} for i in range(6)}
    written.version(root, vectors, shards)
    files = versions.read_list(root, versions.current(root))
    whole = sample(root, files)
    assert whole is not None and len(whole) == whole.of == 72
    assert whole.ids == [f"s{i}/k{j}" for i in range(6) for j in range(12)]
    assert whole.vectors[13].tolist() == [1, 1, 1, 2] and whole.first[13] == 1 and whole.names[13] == "class 1"
    monkeypatch.setattr(module, "SAMPLE_ROWS", 6)
    monkeypatch.setattr(module, "SAMPLE_SHARDS", (3, 3))
    some, again = sample(root, files), sample(root, files)
    assert some is not None and again is not None
    assert some.ids == again.ids == [f"s{i}/k{j}" for i in (1, 3, 5) for j in (3, 9)]
    assert sample(root, FileList.of([])) is None


@pytest.mark.parametrize("shape", [(50, 8), (20, 64)])
def test_the_map_is_the_two_largest_principal_components(shape: tuple[int, int]) -> None:
    """Whether there are more vectors than dimensions or fewer; up to the sign, as numpy's SVD has them."""
    x = np.random.default_rng(2).normal(size=shape) * np.linspace(5, 1, shape[1]) + 3
    found = project(sampled(x))
    u, s, _ = np.linalg.svd(x.astype(np.float32) - x.astype(np.float32).mean(axis=0), full_matrices=False)
    for got, k in ((found.x, 0), (found.y, 1)):
        want = u[:, k] * s[k]
        assert min(np.abs(got - want).max(), np.abs(got + want).max()) < 1e-3 * s[0]
        assert found.explained[k] == pytest.approx(s[k] ** 2 / (s**2).sum(), rel=1e-3)


@pytest.mark.parametrize("vectors", [np.ones((1, 4)), np.ones((3, 1)), np.ones((5, 4)), np.zeros((2, 3))])
def test_vectors_that_do_not_differ_have_a_map_too(vectors: np.ndarray) -> None:
    drawn = project(sampled(vectors))
    assert len(drawn.x) == len(drawn.y) == len(vectors) and np.isfinite([*drawn.x, *drawn.y, *drawn.explained]).all()
    neighbours(sampled(vectors), drawn)
    duplicates(sampled(vectors))


def test_neighbours_are_the_nearest_by_cosine() -> None:
    """Of queries over the whole map, whatever their length."""
    x = np.random.default_rng(3).normal(size=(40, 6)) * np.random.default_rng(4).uniform(1, 9, (40, 1))
    s = sampled(x)
    found = neighbours(s, project(s))
    assert len(found) == module.QUERIES and len({n.query.id for n in found}) == module.QUERIES
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for n in found:
        q = s.ids.index(n.query.id)
        cosines = unit @ unit[q]
        cosines[q] = -2
        assert [t.id for t in n.nearest] == [s.ids[i] for i in np.argsort(-cosines)[: module.NEIGHBOURS]]
        assert n.similarity == pytest.approx(np.sort(cosines)[::-1][: module.NEIGHBOURS], abs=1e-5)


def test_near_duplicates_are_joined_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a chain, whose ends are not near; the largest group first; blocks do not matter."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)

    def at(degrees: float, plane: int) -> np.ndarray:
        vector = np.zeros(8)
        vector[2 * plane : 2 * plane + 2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return vector

    chain = [at(d, 0) for d in (0, 12, 24)]  # neighbours at cos 12° = 0.978, ends at cos 24° = 0.914
    pair, lone = [at(0, 1), 7 * at(1, 1)], [at(0, 2), at(50, 2)]
    found = duplicates(sampled(np.array([chain[0], pair[0], lone[0], chain[2], pair[1], chain[1], lone[1]])))
    assert found is not None and (found.count, found.images, found.among) == (2, 5, 7)
    assert [[t.id for t in group] for group in found.groups] == [["s/k0", "s/k3", "s/k5"], ["s/k1", "s/k4"]]
    assert found.least == pytest.approx([np.cos(np.radians(12)), np.cos(np.radians(1))], abs=1e-5)
    assert sum(found.nearest) == 7 and found.median == pytest.approx(np.cos(np.radians(12)), abs=1e-5)


def test_a_model_that_tells_nothing_apart_is_bounded() -> None:
    """A thousand equal vectors are one group, by few pairs each."""
    found = duplicates(sampled(np.ones((1000, 4))))
    assert found is not None and found.images >= 1000 and found.count <= 1000 // module.CLOSEST_KEPT
