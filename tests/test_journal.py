"""The journal: what a killed run had made is known without a footer, and never believed against the store."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import made
import pytest

from pipeline import journal as journal_module
from pipeline import versions
from pipeline.errors import StorageError
from pipeline.garbage import collect_garbage
from pipeline.journal import Journal
from pipeline.listing import Shard, list_shards
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root
from pipeline.rows import Counts

VECTORS = made.vector_set()


def embedded(output: Path, shards: Path) -> tuple[Root, list[Shard], list[ShardFiles]]:
    listed = list_shards([str(shards)])
    return Root(str(output)), listed, [r.files for r in made.embed(made.job(output), listed) if r.files]


def journal_of(root: Root, files: list[ShardFiles]) -> Journal:
    journal = Journal(root, VECTORS.name)
    for one in files:
        journal.add(one)
    journal.put()
    return journal


def raising(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


def test_a_resumed_run_reads_no_footer(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the killed run wrote down is what its files say; the parts go when a version names the files.

    Where the store refuses to delete them the commit stands, and they stay for `gc`.
    """
    root, listed, files = embedded(tmp_path, shards)
    by_footer = versions.collect(root, VECTORS.folder, listed, FileList.of([]))
    journal_of(root, files[:2])
    journal_of(root, files[2:])
    monkeypatch.setattr(versions, "read_files", lambda *_: pytest.fail("a footer was read"))
    resumed = Journal(root, VECTORS.name)
    found = versions.collect(root, VECTORS.folder, listed, resumed.read())
    assert list(found) == files and found.identity() == by_footer.identity()
    versions.commit(root, VECTORS.name, found)
    for error in (PermissionError("no DeleteObject"), StorageError("away")):
        with monkeypatch.context() as patch:
            patch.setattr(Root, "delete", raising(error))
            resumed.drop()
    assert sum(name.startswith("versions/part-") for name in root.list("versions")) == 2
    resumed.drop()
    assert sorted(p.name[:6] for p in (tmp_path / "versions").iterdir()) == ["000000", "files-"]


def test_the_journal_is_not_believed_against_the_store(tmp_path: Path, shards: Path) -> None:
    """Another size of any file, a damaged part, another set's part: the footers are read, and are right."""
    root, listed, files = embedded(tmp_path, shards)
    wrong = [
        ShardFiles(f.shard, f.etag, f.names, f.sizes | {kind: 1}, f.counts)
        for f, kind in zip(files, ("embeddings", "rejects", "rejects"), strict=True)
    ]
    journal_of(root, wrong)
    part = next((tmp_path / "versions").iterdir())
    resumed = Journal(root, VECTORS.name)
    assert list(versions.collect(root, VECTORS.folder, listed, resumed.read())) == files
    part.write_bytes(b"PAR1 rubbish")
    assert len(resumed.read()) == 0
    assert list(versions.collect(root, VECTORS.folder, listed, resumed.read())) == files
    assert len(Journal(root, "other@000000000000").read()) == 0


def test_readers_do_not_see_the_parts_and_gc_deletes_them(tmp_path: Path, shards: Path) -> None:
    """They are no version; while a run is alive they stay."""
    root, _, files = embedded(tmp_path, shards)
    journal_of(root, files)
    assert versions.numbers(root) == [] and versions.read_version(root) is None
    versions.commit(root, VECTORS.name, files)
    assert collect_garbage(root, 1, lambda: {VECTORS.name}) == []
    assert [name[:14] for name in collect_garbage(root, 1, set)] == ["versions/part-"]


def test_parts_are_put_as_the_run_goes_and_a_store_that_refuses_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many shards or seconds; what could not be put waits and is in what is read."""
    root, journal = Root(str(tmp_path)), Journal(Root(str(tmp_path)), VECTORS.name)
    files = [ShardFiles(f"s{i}", "e", {"embeddings": f"e{i}"}, {"embeddings": 1}, Counts()) for i in range(5)]
    monkeypatch.setattr(journal_module, "PART_SHARDS", 2)
    put = Root.put_new

    def refuse(*_: object) -> bool:
        raise StorageError("away")

    monkeypatch.setattr(Root, "put_new", refuse)
    for one in files[:3]:
        journal.add(one)
    assert root.list("versions") == {} and list(journal.read()) == files[:3]
    monkeypatch.setattr(Root, "put_new", put)
    journal.add(files[3])
    assert len(root.list("versions")) == 1
    monkeypatch.setattr(journal_module, "PART_S", 0.01)
    time.sleep(0.02)
    journal.add(files[4])
    assert len(root.list("versions")) == 2
    assert sorted(f.shard for f in journal.read()) == [f.shard for f in files]
