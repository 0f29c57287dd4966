"""Versions: readers see whole, numbered lists of one set, or nothing."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import made
import oracle
import pyarrow.parquet as pq
import pytest
from containers import write_tar
from pictures import jpeg

from pipeline import readers, versions
from pipeline.errors import StorageError, UsageError
from pipeline.garbage import collect_garbage
from pipeline.listing import Shard, list_shards
from pipeline.lists import FileList, ShardFiles
from pipeline.output import Root

FOLDER = made.vector_set().folder
SET = made.vector_set().name
NONE = FileList.of([])


def embedded(output: Path, shards: Path) -> tuple[Root, list[Shard], list[ShardFiles]]:
    listed = list_shards([str(shards)])
    return Root(str(output)), listed, [r.files for r in made.embed(made.job(output), listed)]


def test_a_version_is_a_numbered_list_of_whole_files(tmp_path: Path, shards: Path) -> None:
    """It counts what it lists, and its list names every file of every shard."""
    root, listed, files = embedded(tmp_path, shards)
    version = versions.commit(root, SET, files)
    assert (version.version, version.set, version.shards) == (1, SET, 3)
    assert (version.samples, version.rows, version.rejects) == (24, 21, oracle.REJECTS)
    assert versions.current(root) == version
    assert list(versions.read_list(root, version)) == files == list(versions.collect(root, FOLDER, listed, NONE))
    paths = readers.files(str(tmp_path))
    assert sum(pq.read_metadata(p).num_rows for p in paths) == 21
    assert sum(pq.read_metadata(p).num_rows for p in readers.files(str(tmp_path), kind="rejects")) == 3
    dataset = readers.open_dataset(str(tmp_path))
    assert dataset.count_rows() == 21 and dataset.schema.field("embedding").type.list_size == 64


def test_the_same_files_are_the_same_version(tmp_path: Path, shards: Path) -> None:
    """Committing what is current already changes nothing."""
    root, _, files = embedded(tmp_path, shards)
    assert versions.commit(root, SET, files) == versions.commit(root, SET, files)
    assert versions.numbers(root) == [1]


def test_a_deleted_shard_leaves_the_next_version_and_is_named(tmp_path: Path, shards: Path) -> None:
    """The next version lists what is left and says what was removed; the old one stays readable."""
    root, _, files = embedded(tmp_path, shards)
    versions.commit(root, SET, files)
    second = versions.commit(root, SET, files[1:])
    assert (second.version, second.removed) == (2, ["a/one"])
    assert len(readers.files(str(tmp_path))) == 2
    assert len(readers.files(str(tmp_path), version=1)) == 3


def test_another_set_replaces_nothing_it_is_a_version_of_its_own(tmp_path: Path, shards: Path) -> None:
    """A version lists files of one set only; the first set's version can still be asked for."""
    root, _, files = embedded(tmp_path, shards)
    versions.commit(root, SET, files)
    unit = replace(made.job(tmp_path), vectors=made.vector_set(normalized=True))
    others = [r.files for r in made.embed(unit, shards)]
    second = versions.commit(root, unit.vectors.name, others)
    assert (second.version, second.set, second.removed) == (2, unit.vectors.name, [])
    assert all(unit.vectors.name in f for f in readers.files(str(tmp_path)))
    assert all(SET in f for f in readers.files(str(tmp_path), version=1))


def test_racing_commits_each_get_their_own_number(tmp_path: Path, shards: Path) -> None:
    """Two drivers that commit at once never overwrite one another's version."""
    root, _, files = embedded(tmp_path, shards)
    parts = [files, files[:2], files[1:], files[:1], files[2:]]
    threads = [threading.Thread(target=versions.commit, args=(Root(str(tmp_path)), SET, part)) for part in parts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    numbers = versions.numbers(root)
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 5
    listed = {tuple(f.shard for f in versions.read_list(root, versions.current(root, n))) for n in numbers}
    assert listed == {tuple(f.shard for f in part) for part in parts}


def test_a_version_that_stays_is_not_replaced_even_after_a_lost_race(tmp_path: Path, shards: Path) -> None:
    """Whether the version before stays is asked for the one that is there, not for the one that was looked at first."""
    root, _, files = embedded(tmp_path, shards)
    other = "other@000000000000"

    def stays(before: versions.Version) -> bool:
        return before.set == other

    def meanwhile(before: versions.Version) -> bool:
        if before.version == 1:
            versions.commit(root, other, files[:2])
        return stays(before)

    versions.commit(root, SET, files[:1])
    assert versions.commit(root, SET, files, meanwhile) is None
    assert versions.current(root).set == other and versions.numbers(root) == [1, 2]


def test_an_unfinished_shard_keeps_the_version_from_being_made(tmp_path: Path, shards: Path) -> None:
    """Without every file of the listing there is no version, and the message names a shard."""
    root, listed, files = embedded(tmp_path, shards)
    (tmp_path / files[1].embeddings).unlink()
    with pytest.raises(StorageError, match="1 of 3 shards have no output yet, among them a/two"):
        versions.collect(root, FOLDER, listed, NONE)


def test_counts_that_do_not_add_up_keep_the_version_from_being_made(tmp_path: Path, shards: Path) -> None:
    """samples = rows + rejects is checked for every shard, and lost rejects are noticed."""
    root, listed, files = embedded(tmp_path, shards)
    wrong = replace(files[0], counts=replace(files[0].counts, samples=99))
    with pytest.raises(StorageError, match="99 samples"):
        versions.collect(root, FOLDER, listed, FileList.of([wrong]))
    (tmp_path / files[2].rejects).unlink()
    with pytest.raises(StorageError, match=r"rejects/.* is gone: delete"):
        versions.collect(root, FOLDER, listed, FileList.of(files))


@pytest.mark.parametrize("name", ["notes.txt", "embeddings/part-0.parquet"])
def test_an_output_that_belongs_to_something_else_is_refused(name: str, tmp_path: Path) -> None:
    """Other people's folders are not written to, and the message names what is there."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds other things .{name.split('/')[0]}."):
        versions.open_output(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        versions.open_output(str(tmp_path / "file"))


def test_reading_before_the_first_commit_says_so(tmp_path: Path, shards: Path) -> None:
    """Neither a missing output nor an unfinished one is an empty result."""
    with pytest.raises(UsageError, match="holds no output of ours"):
        readers.files(str(tmp_path / "absent"))
    embedded(tmp_path, shards)
    with pytest.raises(UsageError, match="no committed version yet"):
        readers.files(str(tmp_path))


def test_an_unknown_version_or_kind_is_refused(tmp_path: Path, shards: Path) -> None:
    """The versions and kinds that there are stand in the message."""
    root, _, files = embedded(tmp_path, shards)
    versions.commit(root, SET, files)
    with pytest.raises(UsageError, match="has no version 7: it has 1"):
        readers.files(str(tmp_path), version=7)
    with pytest.raises(UsageError, match="choose one of embeddings, rejects"):
        readers.files(str(tmp_path), kind="vectors")


def test_an_altered_set_is_noticed(tmp_path: Path) -> None:
    """set.json is written once; another description under the same name ends the run."""
    root = Root(str(tmp_path))
    versions.create_set(root, FOLDER, {"model": "a"})
    versions.create_set(root, FOLDER, {"model": "a"})
    with pytest.raises(UsageError, match="another set"):
        versions.create_set(root, FOLDER, {"model": "b"})


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """No permission (here: /proc takes no folders, even from root) is told before any work."""
    with pytest.raises(UsageError, match="cannot be written"):
        versions.create_set(Root("/proc/shard2vec-output"), FOLDER, {})


def three_versions(tmp_path: Path) -> tuple[Root, list[str]]:
    """Versions 1, 2, 3 of a folder whose shard b changes twice, and an unfinished shard of no version."""
    names = []
    for i in range(3):
        write_tar(tmp_path / "in" / "a.tar", {"a.jpg": jpeg()}) if i == 0 else None
        write_tar(tmp_path / "in" / "b.tar", {"b.jpg": jpeg(60 + i, 60 + i, seed=i)})
        root, _, files = embedded(tmp_path / "out", tmp_path / "in")
        versions.commit(root, SET, files)
        names += [files[1].embeddings]
    write_tar(tmp_path / "more" / "c.tar", {"c.jpg": jpeg()})
    made.embed(made.job(tmp_path / "out"), tmp_path / "more")
    return root, names


def test_gc_deletes_what_no_kept_version_names(tmp_path: Path) -> None:
    """Old versions, their files and unfinished shards go; what a kept version names stays."""
    root, names = three_versions(tmp_path)
    deleted = collect_garbage(root, 2, set)
    assert versions.numbers(root) == [2, 3]
    assert names[0] in deleted and names[1] not in deleted
    assert any("/c-" in name for name in deleted)
    for number in (2, 3):
        assert readers.open_dataset(str(tmp_path / "out"), version=number).count_rows() == 2
    assert collect_garbage(root, 2, set) == []


def test_gc_leaves_the_work_of_a_living_run_alone(tmp_path: Path) -> None:
    """Nothing of a set that a run is writing goes: it may count on any file there, old ones that came back too."""
    root, _ = three_versions(tmp_path)
    assert collect_garbage(root, 1, lambda: {SET}) == ["versions/00000001.json", "versions/00000002.json"]
    assert len(collect_garbage(root, 1, set)) > 4


def test_gc_does_not_touch_what_appears_while_it_looks(tmp_path: Path) -> None:
    """A version that is committed after gc began keeps its list and its files, whatever gc knew of it."""
    root, _ = three_versions(tmp_path)
    write_tar(tmp_path / "in" / "b.tar", {"b.jpg": jpeg(77, 77, seed=9)})

    def commits_meanwhile() -> set[str]:
        _, _, files = embedded(tmp_path / "out", tmp_path / "in")
        versions.commit(root, SET, files)
        return set()

    collect_garbage(root, 1, commits_meanwhile)
    assert versions.current(root).version == 4
    assert readers.open_dataset(str(tmp_path / "out")).count_rows() == 2


def test_a_version_is_plain_json(tmp_path: Path, shards: Path) -> None:
    """Anyone can read it without us."""
    root, _, files = embedded(tmp_path, shards)
    versions.commit(root, SET, files)
    read = json.loads((tmp_path / "versions" / "00000001.json").read_text())
    assert pq.read_table(tmp_path / read["files"])["embeddings"].to_pylist() == [f.embeddings for f in files]


def test_a_damaged_file_under_a_finished_shards_name_is_told(tmp_path: Path, shards: Path) -> None:
    """It is neither taken for done nor overwritten: the message says what to delete."""
    root, listed, files = embedded(tmp_path, shards)
    (tmp_path / files[0].embeddings).write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(StorageError, match=r"is damaged or no file of ours .* delete it and run again"):
        versions.collect(root, FOLDER, listed, NONE)
    (receipt, *_) = made.embed(made.job(tmp_path), listed[:1])
    assert receipt.files is None and "delete it and run again" in receipt.error


def test_a_repaired_shard_gets_a_new_record(tmp_path: Path, shards: Path) -> None:
    """A file that was deleted and made again is listed as it is now, not as it was."""
    root, _, files = embedded(tmp_path, shards)
    first = versions.commit(root, SET, files)
    wrong = [replace(files[0], sizes=files[0].sizes | {"embeddings": 1}), *files[1:]]
    assert versions.commit(root, SET, wrong).version == first.version + 1
    again = versions.collect(root, FOLDER, list_shards([str(shards)]), FileList.of(wrong))
    assert list(again) == files  # a record whose size is not the file's is not believed


def test_rejects_that_are_gone_say_what_to_do(tmp_path: Path, shards: Path) -> None:
    """The message names the file to delete so that the shard is embedded again; and that works."""
    root, listed, files = embedded(tmp_path, shards)
    (tmp_path / files[0].rejects).unlink()
    with pytest.raises(StorageError, match="is gone: delete sets/"):
        versions.collect(root, FOLDER, listed, NONE)
    (tmp_path / files[0].embeddings).unlink()
    assert [r.files for r in made.embed(made.job(tmp_path), listed)] == files


def test_a_damaged_version_is_told_as_such(tmp_path: Path, shards: Path) -> None:
    """A list or a JSON that cannot be read is a store's failure with its name, no traceback."""
    root, _, files = embedded(tmp_path, shards)
    version = versions.commit(root, SET, files)
    (tmp_path / version.files).write_bytes(b"rubbish")
    with pytest.raises(StorageError, match="list of version 1, is damaged"):
        versions.read_list(root, version)
    (tmp_path / "versions" / "00000001.json").write_text("{}")
    with pytest.raises(StorageError, match=r"00000001\.json is damaged"):
        versions.current(root)
