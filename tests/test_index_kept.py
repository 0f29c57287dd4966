"""An index that was damaged or cut, and what of it a node and `gc` keep: made again, or kept with its version."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planted
import pyarrow.parquet as pq
import pytest
from planted import built, clusters, four_parts
from s3_server import S3Server
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline import inverted, stored_index, versions
from pipeline.errors import StorageError
from pipeline.garbage import collect_garbage
from pipeline.output import Root
from pipeline.search import search
from pipeline.storage import digest
from pipeline.vectors import Vectors

Said = Callable[[str], None]


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    return four_parts()


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "out"))


def found(root: Root, version: versions.Version, query: np.ndarray, top: int = 10) -> list[str]:
    return [hit.id for hit in search(root, version, query, top=top).hits]


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
