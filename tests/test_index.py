"""An index: bound to its version, measured against exact search, incremental, resumable, kept and deleted with it."""

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline import index, inverted, stored_index, versions
from pipeline import vectors as vectors_module
from pipeline.errors import StorageError, UsageError
from pipeline.garbage import collect_garbage
from pipeline.index import Built, LowRecall
from pipeline.output import Root
from pipeline.recall import measure
from pipeline.search import Searcher, search
from pipeline.storage import digest
from pipeline.vectors import Vectors

Said = Callable[[str], None]
DIM = 24


def quiet(line: str) -> None:
    pass


def clusters(count: int, seed: int, centres: int = 60) -> np.ndarray:
    """float32 (count, DIM): points about a few centres, of any length."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(0).standard_normal((centres, DIM))
    points = middle[rng.integers(centres, size=count)] + 0.4 * rng.standard_normal((count, DIM))
    return np.float32(points * rng.uniform(0.5, 2, (count, 1)))


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    """Three files of 700, 500 and 300 vectors, one of none."""
    return {"a": clusters(700, 1), "b/c": clusters(500, 2), "d": clusters(300, 3), "none": clusters(0, 4)}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "out"))


def built(root: Root, version: versions.Version, kind: str = "ivf", least: float = 0.9) -> Built:
    return index.build(root, version, kind=kind, least=least, say=quiet)


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


def test_what_is_deleted_is_made_again(root: Root, parts: dict[str, np.ndarray]) -> None:
    """A search names the object and what to do; with just that deleted it looks at all, and `index` mends it."""
    version = planted.commit(root, parts)
    stored = built(root, version).index
    trained, lists, query = Path(root.at(stored.trained)), Path(root.at(stored.data)), parts["a"][0]

    def is_mended(parts_made: int, trained_now: bool) -> None:
        answer = search(root, version, query)
        assert "has no index" in answer.how and answer.hits[0].id == "a/0"
        again = built(root, version)
        assert (again.is_new, again.parts_made, again.trained) == (True, parts_made, trained_now)
        answer = search(root, version, query)
        assert "ivf index of version 1" in answer.how and answer.hits[0].id == "a/0"
        assert built(root, version).is_new is False

    for damage in (lambda: lists.write_bytes(lists.read_bytes()[:-100]), lambda: lists.write_bytes(b"")):
        damage()
        with pytest.raises(StorageError, match=r"\.lists is damaged: delete it and run `index` again"):
            search(root, version, query)
        lists.unlink()
        is_mended(0, False)
    trained.write_bytes(trained.read_bytes()[:50])
    with pytest.raises(
        StorageError, match=rf"is damaged .*: delete the folder {stored.training} and run `index` again"
    ):
        search(root, version, query)
    shutil.rmtree(trained.parent)
    is_mended(4, True)
    lists.write_bytes(lists.read_bytes()[:-100])
    assert built(root, version).is_new  # though nobody deleted it
    assert search(root, version, query).hits[0].id == "a/0"


def test_a_part_of_other_things_is_made_again(
    root: Root, parts: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut, of another training, or of another file with as many rows: the index is that of the vectors now."""
    version = planted.commit(root, parts)
    stored = built(root, version).index
    content, (name,) = root.read(stored.data), root.list_flat("index")
    part = Path(root.at(stored_index.part_name(stored.training, *Vectors(root, version).key(0))))
    whole = part.read_bytes()
    table = pq.read_table(part)
    for wrong in (b"PAR1", {"shard2vec.embeddings_bytes": "1"}, {"shard2vec.training_sha256": "0" * 64}, None):
        part.unlink()
        if isinstance(wrong, bytes):
            part.write_bytes(wrong)
        elif wrong is None:
            pq.write_table(table.slice(1), part)
        else:
            told = {k.decode(): v.decode() for k, v in table.schema.metadata.items()} | wrong
            pq.write_table(table.replace_schema_metadata(told), part)
        root.delete(name)
        assert built(root, version).parts_made == 1
        assert part.read_bytes() == whole and root.read(stored.data) == content
    root.delete(stored.trained)
    monkeypatch.setattr(inverted, "SEED", 2)
    again = built(root, version)  # with lists and parts of the training before beside the new one
    assert again.trained and again.parts_made == 4 and again.index.sha256 != stored.sha256
    assert list(stored_index.read_all(root).values()) == [again.index]
    assert stored_index.sha256_there(root, again.index.data) == again.index.sha256[again.index.data]
    assert search(root, version, parts["b/c"][7]).hits[0].id == "b/c/7"


def test_a_damaged_index_of_another_version_is_none(root: Root, parts: dict[str, np.ndarray]) -> None:
    """It stops no search, no build and no `gc`, which deletes it; one of this version is told, and made again."""
    first = planted.commit(root, parts)
    built(root, first)
    (old,) = root.list_flat("index")
    version = planted.commit(root, {"a": parts["a"]})
    built(root, version, "flat")
    Path(root.at(old)).write_text('{"version": 1}')
    assert "flat index of version 2" in search(root, version, parts["a"][0]).how
    with pytest.raises(StorageError, match=rf"{old} is damaged .*run `index` again"):
        search(root, first, parts["a"][0])
    assert built(root, first).is_new and "ivf index of version 1" in search(root, first, parts["a"][0]).how
    Path(root.at(old)).write_text("{")
    assert old in collect_garbage(root, 1, set)
    assert "flat index of version 2" in search(root, version, parts["a"][0]).how


def test_status_tells_of_a_damaged_index(root: Root, parts: dict[str, np.ndarray]) -> None:
    """And of all else, as if there were none."""
    built(root, planted.commit(root, {"a": parts["a"]}), "flat")
    (name,) = root.list_flat("index")
    Path(root.at(name)).write_text("{")
    done = CliRunner().invoke(app, ["status", root.url, "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["version"], told["index"]) == (0, 1, None)
    assert told["index_damage"].startswith(f"{name} is damaged")
    assert f"no index that can be used: {name} is damaged" in CliRunner().invoke(app, ["status", root.url]).stdout


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


def test_gc_keeps_the_indexes_of_kept_versions(root: Root, parts: dict[str, np.ndarray]) -> None:
    """An index goes with its version; parts that a kept one uses stay, and a search through it still works."""
    first = built(root, planted.commit(root, parts)).index
    changed = {"a": parts["a"], "d": clusters(300, 8)}
    version = planted.commit(root, changed)
    second = built(root, version).index
    deleted = collect_garbage(root, 1, set)
    assert first.data in deleted and any("/parts/b/c-" in name for name in deleted)
    assert stored_index.index_of(root, version) == second
    assert found(root, version, changed["d"][9])[0] == "d/9"
    left = root.list("index")
    assert sum("/parts/" in name for name in left) == 2 and second.trained in left
    assert collect_garbage(root, 1, set) == []


def test_gc_before_the_new_index_keeps_what_it_will_use(root: Root, parts: dict[str, np.ndarray]) -> None:
    """embed, gc, index: the parts of unchanged files are not made again."""
    built(root, planted.commit(root, parts))
    version = planted.commit(root, parts | {"d": clusters(300, 8)})
    collect_garbage(root, 1, set)
    again = built(root, version)
    assert (again.parts_made, again.trained) == (1, False)
    collect_garbage(root, 1, set)
    assert [i.version for i in stored_index.read_all(root).values()] == [2]


def test_files_that_come_back_are_indexed_again(root: Root, parts: dict[str, np.ndarray]) -> None:
    """`gc` took the lists of the version that had them, and left its index for its training: no search uses that."""
    first = built(root, planted.commit(root, parts))
    planted.commit(root, {"a": parts["a"]})
    assert first.index.data in collect_garbage(root, 1, set)
    version = planted.commit(root, parts)
    assert version.files == first.index.files
    assert "version 3 has no index" in search(root, version, parts["d"][0]).how
    again = built(root, version)
    assert again.is_new and not again.trained
    answer = search(root, version, parts["d"][0])
    assert "ivf index of version 3" in answer.how and answer.hits[0].id == "d/0"


def test_a_node_keeps_copies_of_what_is_there(
    tmp_path: Path, parts: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a remote output, in a folder of its own: the next search after `gc` deletes what no index names any more."""
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    roots = [Root(f"memory://{uuid.uuid4().hex}/out") for _ in range(2)]
    kept = []
    for root in roots:
        built(root, planted.commit(root, parts), "flat")
        version = planted.commit(root, parts | {"d": clusters(30, 8)})
        kept.append(built(root, version, "flat").index)
        for number in (1, 2):
            search(root, versions.current(root, number), parts["a"][0])
    folders = [tmp_path / "index" / digest(root.url) for root in roots]
    assert [len(list(folder.iterdir())) for folder in folders] == [3, 3]  # they share the training
    collect_garbage(roots[0], 1, set)
    (folders[0] / kept[0].sha256[kept[0].data]).unlink()
    assert search(roots[0], versions.current(roots[0]), parts["a"][0]).hits[0].id == "a/0"
    assert {path.name for path in folders[0].iterdir()} == set(kept[0].sha256.values())
    assert len(list(folders[1].iterdir())) == 3


def test_gc_leaves_an_unfinished_index_of_a_kept_version(root: Root, parts: dict[str, np.ndarray]) -> None:
    """Somebody may be building it; that of a version which is gone goes."""
    version = planted.commit(root, parts)
    built(root, version)
    for name in [n for n in root.list("index") if n.count("/") == 1]:
        root.delete(name)
    before = root.list("index")
    assert collect_garbage(root, 1, set) == [] and root.list("index") == before
    planted.commit(root, {"z": clusters(50, 1)})
    collect_garbage(root, 1, set)
    assert root.list("index") == {}


@pytest.mark.slow
def test_an_index_lies_in_a_bucket(
    tmp_path: Path, parts: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3: built, found again, fetched once into the cache, and a damaged copy is not believed."""
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path / "cache"))
        root = Root(f"s3://{server.create_bucket('vectors')}/out")
        version = planted.commit(root, parts)
        assert built(root, version).is_new and not built(root, version).is_new
        assert found(root, version, parts["a"][3])[0] == "a/3"
        cache = tmp_path / "cache" / "index" / digest(root.url)
        copies = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
        assert len(copies) == 2
        stored = stored_index.index_of(root, version)
        assert stored is not None and set(copies) == set(stored.sha256.values())
        changed = parts | {"d": clusters(300, 8)}
        second = planted.commit(root, changed)
        assert built(root, second).parts_made == 1
        assert found(root, second, changed["d"][9])[0] == "d/9"
        damaged = root.read(stored.data)[:-1] + b"\0\0"
        root.delete(stored.data)
        root.put_new(stored.data, damaged)
        (cache / stored.sha256[stored.data]).unlink()
        with pytest.raises(StorageError, match=r"is damaged: its SHA-256 is not what its index says"):
            search(root, version, parts["a"][3])
        collect_garbage(root, 1, set)
        assert [i.version for i in stored_index.read_all(root).values()] == [2]
