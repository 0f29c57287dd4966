"""The promises of pipeline/output.py, on local disks and fsspec's own stores."""

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from containers import FlakyStore

from pipeline.errors import StorageError
from pipeline.output import Root

REPOSITORY = Path(__file__).resolve().parent.parent


# put_new


@pytest.mark.parametrize("as_file", [False, True])
def test_of_sixteen_threads_one_creates(tmp_path: Path, as_file: bool) -> None:
    """One of 16 threads gets True; its content, and all of it, is there; nothing else is left."""
    root = Root(str(tmp_path / "out"))
    barrier = threading.Barrier(16)

    def put(i: int) -> bool:
        content: bytes | Path = bytes([i]) * 300_000
        if as_file:
            path = Path(root.scratch()) / f"mine-{i}"
            path.write_bytes(bytes([i]) * 300_000)
            content = path
        barrier.wait()
        try:
            return root.put_new("sets/a/x.parquet", content)
        finally:
            if isinstance(content, Path):
                content.unlink()

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(put, range(16)))
    assert won.count(True) == 1
    assert root.read("sets/a/x.parquet") == bytes([won.index(True)]) * 300_000
    assert os.listdir(root.scratch()) == []


RACE = """
import os, sys, time
from pipeline.output import Root
root, start = Root(sys.argv[1]), time.time() + 0.5
children = []
for i in range(16):
    child = os.fork()
    if child == 0:
        time.sleep(start - time.time())
        os._exit(10 + root.put_new("versions/1.json", bytes([i]) * 300_000))
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_of_sixteen_processes_one_creates(tmp_path: Path) -> None:
    """One of 16 processes gets True; its content, and all of it, is there."""
    codes = run(RACE, str(tmp_path / "out")).stdout.split()
    assert sorted(codes) == ["10"] * 15 + ["11"]
    content = (tmp_path / "out" / "versions" / "1.json").read_bytes()
    assert content == bytes([codes.index("11")]) * 300_000


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=60)


def test_other_stores_are_looked_at_first(memory: str) -> None:
    """Where the store has no create-only put, the second writer still gets False, and the name is never half filled."""
    root = Root(memory)
    assert root.put_new("a/x", b"one") and not root.put_new("a/x", b"two")
    local = Path(root.scratch()) / "file-of-test-storage"
    local.write_bytes(b"three")
    assert root.put_new("a/y", local) and not root.put_new("a/y", local)
    local.unlink()
    assert {name: root.read(name) for name in root.list("a")} == {"a/x": b"one", "a/y": b"three"}


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    """While one writer creates, replaces and deletes, whatever a reader finds is whole."""
    root = Root(str(tmp_path))
    is_over = threading.Event()

    def write() -> None:
        for i in range(150):
            root.put_new("a/x", bytes([i]) * 500_000)
            root.overwrite("a/note", bytes([i]) * 500_000)
            root.delete("a/x")
        is_over.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not is_over.is_set():
        for name, size in root.list("a").items():
            assert size == 500_000
            try:
                content = root.read(name)
            except FileNotFoundError:
                continue
            assert content == content[:1] * 500_000
            seen += 1
    writer.join()
    assert seen > 10


STALLED = """
import os, sys, time
from pipeline.output import Root
def stall(handle):
    print("writing", flush=True)
    time.sleep(60)
root = Root(sys.argv[1])
root.scratch()
os.makedirs(sys.argv[1] + "/sets")
os.fsync = stall
root.put_new("sets/x", bytes(10_000_000))
"""


def test_a_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    """kill -9 between the bytes and the name: nothing under the name, and the scratch is cleared when it is old."""
    with subprocess.Popen([sys.executable, "-c", STALLED, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE) as p:
        assert p.stdout is not None and p.stdout.readline() == b"writing\n"
        p.send_signal(signal.SIGKILL)
    root = Root(str(tmp_path))
    assert root.list("sets") == {} and len(os.listdir(root.scratch())) == 1
    root.clear_scratch(older_than_s=3600)
    assert len(os.listdir(root.scratch())) == 1
    root.clear_scratch(older_than_s=-1)
    assert os.listdir(root.scratch()) == []
    assert root.put_new("sets/x", b"whole") and root.read("sets/x") == b"whole"


def test_a_put_whose_answer_was_lost_is_there_once(flaky: type[FlakyStore]) -> None:
    """The retry finds the object: False, as if another had written the same content."""
    root = Root("flaky://out")
    flaky.writes, flaky.is_answer_lost = [ConnectionResetError("lost")], True
    assert not root.put_new("x", b"content")
    assert root.read("x") == b"content"


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as f:
            f.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    root = Root(str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=f"could not write {tmp_path}/x: .*No space left"):
        root.put_new("x", b"content" * 100)
    assert root.list("") == {}


def test_a_file_in_place_of_a_folder_is_an_error_not_a_lost_race(tmp_path: Path) -> None:
    (tmp_path / "sets").write_bytes(b"")
    with pytest.raises(OSError):
        Root(str(tmp_path)).put_new("sets/x", b"content")


# Root


def test_a_root_may_be_written_in_many_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, with `~`, as `file://`, with `/` at its end: the same place, absolute from then on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = ("out", "./out", "out/", "~/out", f"file://{tmp_path}/out", f"{tmp_path}/out/")
    assert {Root(way).url for way in ways} == {f"{tmp_path}/out"}
    Root("out").put_new("a/x", b"abc")
    assert Root("~/out").list("a") == {"a/x": 3} and Root(".").top() == ["out"]
    assert Root("/").at("x") == "/x" and "etc" in Root("/").top()


@pytest.mark.parametrize("store", ["local", "memory"])
def test_the_top_and_the_lists_of_a_root(tmp_path: Path, memory: str, store: str) -> None:
    """Empty where nothing is; a file is no root; what another instance put or deleted is seen at once."""
    url = str(tmp_path / "out") if store == "local" else memory
    root = Root(url)
    assert root.top() == [] and root.list("sets") == {} and root.list("") == {}
    Root(url).put_new("out/out", b"1")
    Root(url).put_new("sets/a/x", b"12")
    assert set(root.top()) - {".tmp"} == {"out", "sets"}
    assert root.list("sets") == {"sets/a/x": 2} and root.list("out") == {"out/out": 1}
    with root.open("sets/a/x") as f:
        assert f.read() == b"12" and f.seek(0, 2) == 2
    Root(url).delete("sets/a/x")
    assert root.list("sets") == {}
    for read in (root.read, root.open):
        with pytest.raises(FileNotFoundError):
            read("sets/a/x")
    with pytest.raises(NotADirectoryError):
        Root(f"{url}/out/out").top()
