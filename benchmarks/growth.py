"""The driver's seconds and memory for 10,000, 100,000 and 1,000,000 shards: list, plan, receive, commit, resume.

    python benchmarks/growth.py [--shards 10000,100000,1000000] [--local 10000]

No shard is read or embedded: a store that exists in its listings only (`tests/listed_store.py`) gives names, sizes and
etags as s3fs does, receipts are made up, and what the driver then does is what it does in a run; that no shard and no
file of the output is read is asserted. Each count is a process of its own, and its MB are what it had at its largest
during the step beyond what it had before the first. `--local`: the same over empty files of a temporary folder.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.listing import Shard
    from pipeline.lists import ShardFiles

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

RESUMED = 0.99  # of the shards are done when a run without a version before it is resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="10000,100000,1000000")
    parser.add_argument("--local", default="10000")
    parser.add_argument("--one", choices=("listed", "local"), help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.one:
        measure_local(int(args.local)) if args.one == "local" else measure(int(args.shards))
        return
    counts = [int(n) for n in args.shards.split(",")]
    show("listed as S3 lists", counts, [told("listed", "--shards", n) for n in counts])
    counts = [int(n) for n in args.local.split(",")]
    show("local files", counts, [told("local", "--local", n) for n in counts])


def told(which: str, flag: str, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", which, flag, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(what: str, counts: list[int], told: list[dict[str, Any]]) -> None:
    print(f"\n{what:34}" + "".join(f"{f'{n:,} shards':>34}" for n in counts))
    for step in told[0]:
        cells = [f"{t[step]['s']:8.2f} s ({t[step]['cpu_s']:6.2f} CPU) {t[step]['mb']:6.0f} MB" for t in told]
        print(f"{step:34}" + "".join(f"{cell:>34}" for cell in cells), flush=True)


class Steps:
    """Of each step: seconds, CPU seconds, and the MB by which the process was at its largest beyond its start."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, float]] = {}
        self._start = resident_mb("VmRSS")

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        began, cpu = time.monotonic(), time.process_time()
        yield
        s, cpu_s = time.monotonic() - began, time.process_time() - cpu
        self.told[step] = {"s": s, "cpu_s": cpu_s, "mb": resident_mb("VmHWM") - self._start}


def resident_mb(what: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) / 1024


def measure(count: int) -> None:
    from listed_store import INPUT, OUTPUT, ListedStore, files_of

    def finish(shards: "list[Shard]") -> None:
        ListedStore.done = len(shards)

    ListedStore.empty(count)
    flow(INPUT, OUTPUT, lambda shard: files_of(int(shard.name.rpartition("-")[2])), finish)


def measure_local(count: int) -> None:
    from listed_store import ListedStore, files_of, name_of

    from pipeline.versions import file_name

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        touch(source / name_of(i)[len("in/") :] for i in range(count))

        def made(shard: "Shard") -> "ShardFiles":
            names = {k: file_name(ListedStore.folder, k, shard.name, shard.etag) for k in ("embeddings", "rejects")}
            return replace(files_of(1), shard=shard.name, etag=shard.etag, names=names, sizes=dict.fromkeys(names, 0))

        def finish(shards: "list[Shard]") -> None:
            touch(target / name for shard in shards for name in made(shard).names.values())

        flow(str(source), str(target), made, finish)


def touch(paths: Iterable[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def flow(
    source: str, target: str, made: "Callable[[Shard], ShardFiles]", finish: "Callable[[list[Shard]], None]"
) -> None:
    """A run that is killed when 99 % are done, its resumption, and the same command once more.

    `finish`: lets the output of these shards be there, as `made` says it.
    """
    from listed_store import ListedStore, receipt_of

    from pipeline import readers, versions
    from pipeline.actors import BOARD_SHARDS
    from pipeline.garbage import collect_garbage
    from pipeline.journal import Journal
    from pipeline.listing import list_shards
    from pipeline.lists import FileList
    from pipeline.output import Root
    from pipeline.speed import Sums

    folder, name, root = ListedStore.folder, ListedStore.folder.partition("/")[2], Root(target)
    root.put_new(f"{folder}/set.json", b"{}")

    def plan() -> "tuple[list[Shard], list[Shard], list[str]]":
        shards, before = list_shards([source], exclude=root.url), versions.read_version(root)
        done = versions.done(root, folder)
        todo = [s for s in shards if versions.file_name(folder, "embeddings", s.name, s.etag) not in done]
        return shards, todo, versions.removed(root, before, name, {s.name for s in shards})

    def receive(journal: Journal, shards: "list[Shard]") -> None:
        sums = Sums()
        for shard in shards:
            receipt = pickle.loads(pickle.dumps(receipt_of(shard, made(shard))))
            sums.add(receipt)
            journal.add(receipt.files)
        journal.put()

    def commit(journal: Journal, shards: "list[Shard]") -> versions.Version | None:
        before = versions.read_version(root)
        listed = versions.read_list(root, before) if before else FileList.of([])
        files = versions.collect(root, folder, shards, journal.read() + listed)
        version = versions.commit(root, name, files)
        journal.drop()
        return version

    steps = Steps()
    with steps("list, plan: all to do"):
        shards, todo, _ = plan()
    assert todo == shards
    with steps(f"pickled for the board, {BOARD_SHARDS:,} at once"):
        for at in range(0, len(todo), BOARD_SHARDS):
            pickled = [pickle.dumps(s) for s in todo[at : at + BOARD_SHARDS]]
        del pickled
    early, late = todo[: int(len(todo) * RESUMED)], todo[int(len(todo) * RESUMED) :]
    with steps("receive 99 % of the receipts"):
        receive(Journal(root, name), early)
    finish(early)
    del shards, todo, early, late
    ListedStore.calls.clear()
    with steps("resume: list, plan"):
        shards, todo, _ = plan()
    assert len(todo) == len(shards) - int(len(shards) * RESUMED)
    journal = Journal(root, name)
    receive(journal, todo)
    finish(shards)
    with steps("resume: collect, commit"):
        version = commit(journal, shards)
    assert version is not None and version.shards == len(shards) and not ListedStore.calls["read"]
    with steps("again: list, plan, nothing to do"):
        shards, todo, removed = plan()
    assert not todo and not removed
    with steps("again: collect, already committed"):
        assert commit(Journal(root, name), shards) == version
    with steps("read the version's file names"):
        assert len(readers.files(root.url)) == len(shards)
    with steps("gc, nothing to delete"):
        assert collect_garbage(root, 1, set) == []
    print(json.dumps(steps.told))


if __name__ == "__main__":
    main()
