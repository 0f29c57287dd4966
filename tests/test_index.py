"""An index: bound to its version, measured against exact search, incremental, resumable, kept and deleted with it."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from planted import built, clusters, four_parts

from pipeline import index, inverted, stored_index, versions
from pipeline import vectors as vectors_module
from pipeline.errors import UsageError
from pipeline.index import Built, LowRecall
from pipeline.output import Root
from pipeline.recall import measure
from pipeline.search import Searcher, search
from pipeline.vectors import Vectors

Said = Callable[[str], None]


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    return four_parts()


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "out"))


def numpy_top(shards: dict[str, np.ndarray], query: np.ndarray, top: int = 10) -> list[str]:
    """The nearest ids by cosine in a plain loop, in float64."""
    ids = [f"{name}/{row}" for name in sorted(shards) for row in range(len(shards[name]))]
    rows = np.concatenate([shards[name] for name in sorted(shards)]).astype(np.float64)
    cosines = rows @ query.astype(np.float64) / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return [ids[i] for i in np.argsort(-cosines, kind="stable")[:top]]


def found(root: Root, version: versions.Version, query: np.ndarray, top: int = 10) -> list[str]:
    return [hit.id for hit in search(root, version, query, top=top).hits]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_recall_is_what_a_plain_loop_counts(root: Root, parts: dict[str, np.ndarray], kind: str) -> None:
    """The stored recall@10 is that of the true ten of each query, the query left out, and `search` reaches it."""
    version = planted.commit(root, parts)
    stored = built(root, version, kind).index
    assert (stored.vectors, stored.set, stored.files, stored.version) == (1500, version.set, version.files, 1)
    queries, searcher = [f"b/c/{row}" for row in range(0, 500, 10)], Searcher(root, version)
    hits, wanted = 0, 0
    for query in queries:
        vector = parts["b/c"][int(query.rpartition("/")[2])]
        true = [i for i in numpy_top(parts, vector, 11) if i != query][:10]
        near = [hit.id for hit in searcher(vector, without=query).hits]
        assert query not in near and len(near) == 10
        hits, wanted = hits + len(set(true) & set(near)), wanted + 10
    assert hits / wanted == pytest.approx(stored.recall_at_10, abs=0.08)  # other queries, of the same kind
    assert stored.recall_at_10 >= 0.9
    assert stored.recall_at_10 == 1.0 or kind == "ivf"
    shares = [p["recall"] * 10 * stored.queries for p in stored.points]  # as counted: a rounded one may pass a gate
    assert all(abs(share - round(share)) < 0.01 for share in shares)
    assert searcher(parts["d"][0]).is_exact is (kind == "flat")
    sizes = {name: root.list(stored.training)[name] for name in (stored.trained, stored.data)}
    assert stored.bytes == sum(sizes.values())


def test_a_measure_counts_equal_images_as_found(root: Root) -> None:
    """Where a hundred images are the same, any ten of them are the nearest."""
    same = np.tile(clusters(1, 5), (100, 1))
    version = planted.commit(root, {"a": np.concatenate([same, clusters(400, 6)])})
    vectors = Vectors(root, version)
    stored = built(root, version, "flat").index
    opened = stored_index.open_stored(root, stored)
    measured = measure(vectors, opened, np.arange(0, 100, 7))
    assert measured.best.recall == 1.0


def test_below_the_recall_asked_for_nothing_is_published(root: Root) -> None:
    """Points without any structure in few probed lists: refused, and no index appears."""
    noise = np.random.default_rng(7).standard_normal((4000, 96)).astype(np.float32)
    version = planted.commit(root, {"a": noise})
    with pytest.raises(LowRecall, match=r"recall@10 is 0\.\d+ at most, with \d+ lists probed .* asks for 1\.0"):
        built(root, version, least=1.0)
    assert stored_index.index_of(root, version) is None
    assert built(root, version, "flat", least=1.0).index.recall_at_10 == 1.0


def test_a_new_version_costs_the_files_that_changed(root: Root, parts: dict[str, np.ndarray]) -> None:
    """Unchanged files keep their parts; what left the version is found no more, what came is."""
    first = built(root, planted.commit(root, parts))
    assert (first.parts_made, first.trained) == (4, True)
    gone, fresh = parts["d"][0], clusters(300, 8) * 3
    changed = {"a": parts["a"], "b/c": parts["b/c"][::-1], "e": fresh, "none": parts["none"]}
    version = planted.commit(root, changed)
    assert stored_index.index_of(root, version) is None
    second = built(root, version)
    assert (second.parts_made, second.trained) == (2, False)
    assert second.index.training == first.index.training
    assert found(root, version, fresh[7])[0] == "e/7"
    assert found(root, version, parts["b/c"][499])[0] == "b/c/0"
    assert not any(i.startswith("d/") for i in found(root, version, gone, 1000))
    assert built(root, version).is_new is False


def test_an_old_training_is_given_up_when_recall_falls(root: Root) -> None:
    """Vectors beyond the old lists' range are badly coded: a new training reaches what was asked."""
    first = built(root, planted.commit(root, {"a": clusters(2000, 1)}))
    spread = clusters(2600, 9) / 2
    version = planted.commit(root, {"b": spread + np.float32(8)})  # all within a few degrees of one direction
    said: list[str] = []
    second = index.build(root, version, kind="ivf", least=0.97, say=said.append)
    assert second.trained and second.index.training != first.index.training
    assert any("training anew" in line for line in said), said
    assert second.index.recall_at_10 >= 0.97


def test_a_version_that_has_grown_much_is_trained_anew(root: Root) -> None:
    """Ten times the vectors want more lists than the old training has."""
    small, large = clusters(400, 1), clusters(6000, 2)
    first = built(root, planted.commit(root, {"a": small}))
    second = built(root, planted.commit(root, {"a": small, "b": large}))
    assert second.trained and second.index.lists > 2 * first.index.lists


def test_an_index_that_was_cut_short_goes_on_with_its_parts(root: Root, parts: dict[str, np.ndarray]) -> None:
    """Killed after any step: the same command makes only what is missing, and ends with the same lists."""
    version = planted.commit(root, parts)
    whole = built(root, version).index
    content = root.read(whole.data)
    (name,) = [n for n in root.list("index") if n.count("/") == 1]
    root.delete(name)  # killed before the last write
    assert built(root, version).parts_made == 0
    for gone in (name, whole.data, stored_index.part_name(whole.training, *Vectors(root, version).key(1))):
        root.delete(gone)  # killed in the midst of the parts
    again = built(root, version)
    assert again.parts_made == 1 and root.read(again.index.data) == content
    assert again.index.sha256 == whole.sha256


def test_builders_that_race_make_one_index(root: Root, parts: dict[str, np.ndarray]) -> None:
    """All of them end well, with the same lists."""
    version = planted.commit(root, parts)
    results: list[Built] = []
    threads = [threading.Thread(target=lambda: results.append(built(root, version))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len({json.dumps(b.index.sha256) for b in results}) == 1
    assert sum(n.count("/") == 1 for n in root.list("index")) == 1


def test_large_files_are_encoded_and_merged_in_pieces(
    root: Root, parts: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces, the lists are the same to the last byte."""
    version = planted.commit(root, parts)
    stored = built(root, version).index
    content = root.read(stored.data)
    for name in root.list("index"):
        if name != stored.trained:
            root.delete(name)
    monkeypatch.setattr(inverted, "PIECE_BYTES", 1)
    monkeypatch.setattr(inverted, "GROUP_BYTES", 1000)
    monkeypatch.setattr(vectors_module, "BLOCK_ROWS", 64)
    again = built(root, version)
    assert again.parts_made == 4 and root.read(again.index.data) == content
    part = stored_index.part_name(stored.training, *Vectors(root, version).key(0))
    assert pq.read_metadata(root.at(part)).num_row_groups == 11  # of 700 rows


def test_many_small_files_give_a_whole_sample(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many are read as the lists need vectors, however few files are read of others."""
    monkeypatch.setattr(index, "SAMPLED_FILES", 1)
    rows = clusters(640, 1)
    version = planted.commit(root, {f"s{n}": rows[5 * n : 5 * n + 5] for n in range(7)} | {"t": rows[40:]})
    assert built(root, version, least=0.5).index.lists == 16  # all but one file have 5 vectors
    assert index.lists_for(10**12, "ivf", 1024) * index.LEAST_SAMPLE_PER_LIST * 4096 <= index.SAMPLE_BYTES


def test_zero_vectors_are_near_to_nothing(root: Root) -> None:
    """They are indexed, found by nobody before a real neighbour, and are no queries."""
    rows = clusters(300, 1)
    rows[5] = 0
    version = planted.commit(root, {"a": rows})
    built(root, version, "flat")
    hits = search(root, version, rows[7], top=300).hits
    assert next(hit.score for hit in hits if hit.id == "a/5") == 0
    with pytest.raises(UsageError, match="is zero: it has no direction"):
        search(root, version, rows[5])


def test_float16_vectors_are_indexed(root: Root) -> None:
    """A set of --vector-type float16 gives the same neighbours as its values in float32."""
    rows = clusters(300, 1)
    version = planted.commit(root, {"a": rows}, vector_type="float16")
    built(root, version, "flat")
    assert found(root, version, rows[3]) == numpy_top({"a": rows.astype(np.float16)}, rows[3])


def test_what_has_no_vectors_is_refused(root: Root, tmp_path: Path, parts: dict[str, np.ndarray]) -> None:
    """Metrics alone, no rows, unknown kinds and recalls end before any work."""
    version = planted.commit(root, {"a": parts["none"]})
    with pytest.raises(UsageError, match=r"version 1 of .* has no rows"):
        built(root, version)
    other = Root(str(tmp_path / "metrics"))
    version = planted.commit(other, {"a": parts["a"]}, outputs=("classes",))
    with pytest.raises(UsageError, match="has no vectors: it was embedded with --only-metrics"):
        built(other, version)
    for wrong in ({"kind": "hnsw"}, {"least": 0.0}, {"least": 1.1}):
        with pytest.raises(UsageError, match=r"--kind hnsw: choose|--recall"):
            built(other, version, **wrong)


def test_without_faiss_the_extra_is_named(
    root: Root, parts: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`index` and a search through an index need it; an exact search does not."""
    version = planted.commit(root, parts)
    built(root, version)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    for call in (lambda: built(root, version, "flat"), lambda: search(root, version, parts["a"][0])):
        with pytest.raises(UsageError, match=r"needs faiss.*pip install 'shard2vec\[index\]'"):
            call()
    assert search(root, version, parts["a"][0], exact=True).hits[0].id == "a/0"


def test_memory_does_not_grow_with_the_vectors(root: Root) -> None:
    """The lists of a merge are written as parts come: no more than a few are held."""
    rng = np.random.default_rng(0)
    trained = inverted.train(np.eye(64, dtype=np.float32), "ivf", 4)
    sizes, held, most = np.full(4, 5000, np.int64), [0], [0]

    def one(at: int) -> tuple[int, inverted.Codes]:
        held[0] += 1
        most[0] = max(most[0], held[0])
        lists = np.repeat(np.arange(4, dtype=np.int32), 50)
        return at << 32, inverted.Codes(
            lists, np.arange(200, dtype=np.int32), rng.integers(0, 255, (200, 64), np.uint8)
        )

    def group() -> Iterator[tuple[int, inverted.Codes]]:
        for at in range(100):
            yield one(at)

    path = Path(root.scratch()) / "merged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverted, "GROUP_BYTES", 200 * 64 * 5)
        patch.setattr(
            inverted, "_joined", lambda parts, join=inverted._joined: (held.__setitem__(0, 0), join(parts))[1]
        )
        inverted.merge(trained, group(), sizes, path)
    assert most[0] == 5
    assert inverted.open_lists(trained, path).ntotal == 20_000
