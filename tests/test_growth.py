"""What planning, resuming and committing cost: as many calls to the store for many shards as for few, little memory."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import pytest
from listed_store import INPUT, OUTPUT, ListedStore, files_of

from pipeline import versions
from pipeline.journal import Journal
from pipeline.listing import Shard, list_shards
from pipeline.lists import FileList
from pipeline.output import Root

FOLDER, SET = ListedStore.folder, ListedStore.folder.partition("/")[2]


@pytest.fixture(autouse=True)
def store() -> Iterator[None]:
    ListedStore.empty(0)
    yield
    ListedStore.empty(0)


def plan(root: Root) -> tuple[list[Shard], list[Shard]]:
    shards, done = list_shards([INPUT], exclude=root.url), versions.done(root, FOLDER)
    return shards, [s for s in shards if versions.file_name(FOLDER, "embeddings", s.name, s.etag) not in done]


def receive(journal: Journal, shards: list[Shard]) -> None:
    for shard in shards:
        journal.add(files_of(int(shard.name.rpartition("-")[2])))


def finish(root: Root, journal: Journal, shards: list[Shard]) -> versions.Version | None:
    before = versions.read_version(root)
    listed = versions.read_list(root, before) if before else FileList.of([])
    version = versions.commit(root, SET, versions.collect(root, FOLDER, shards, journal.read() + listed))
    journal.drop()
    return version


def calls_of(count: int) -> Counter[str]:
    """The store's calls of a run that is killed when 99 % are done, of the next one, and of one that finds nothing."""
    ListedStore.empty(count)
    root = Root(OUTPUT)
    killed = Journal(root, SET)
    receive(killed, plan(root)[0][: count * 99 // 100])
    killed.put()
    ListedStore.done = count * 99 // 100
    shards, todo = plan(root)
    assert len(todo) == count - count * 99 // 100
    resumed = Journal(root, SET)
    receive(resumed, todo)
    ListedStore.done = count
    version = finish(root, resumed, shards)
    assert version is not None and (version.version, version.samples) == (1, 1000 * count)
    assert plan(root)[1] == [] and finish(root, Journal(root, SET), shards) == version
    return Counter(ListedStore.calls)


def test_calls_do_not_grow_with_the_shards() -> None:
    """Planning, resuming and committing cost listings, a list and a journal; no shard and no footer is read."""
    few, many = calls_of(200), calls_of(2000)
    assert few == many and not many["read"] and many["delete"] == 1
    assert not any("part-" in name for name in ListedStore.objects)


def test_a_million_shards_would_be_a_few_gigabytes() -> None:
    """What the driver holds of each shard, its receipt and its files, in Python and in Arrow, is bounded."""
    count = 4000
    ListedStore.empty(count)
    root, journal = Root(OUTPUT), Journal(Root(OUTPUT), SET)
    tracemalloc.start()
    try:
        shards, todo = plan(root)
        receive(journal, todo)
        ListedStore.done = count
        version = finish(root, journal, shards)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert version is not None and version.shards == count
    assert kept < 800 * count  # the listing
    assert most < 1500 * count + 12 * 2**20  # with what S3's client gives, and a batch of rows as objects
    assert versions.read_list(root, version).table.nbytes < 500 * count
