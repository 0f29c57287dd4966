"""The promises of pipeline/storage.py, on local disks and fsspec's own stores."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stamina
from containers import FlakyStore, clear_memory, serving

from pipeline.errors import StorageError, UsageError
from pipeline.output import Root
from pipeline.storage import Entry, digest, is_unchanged, list_files, open_input, read_bytes, redact

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def memory() -> Iterator[str]:
    clear_memory()
    yield "memory://store"
    clear_memory()


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


# Listing


def names(url: object) -> list[str]:
    return [e.url for e in list_files(str(url))]


@pytest.mark.parametrize(
    "name", ["sp ace.tar", "per%20cent.tar", "ha#sh.tar", "ünï.tar", "br[1].tar", "q?.tar", "st*r.tar", "a::b.tar"]
)
def test_a_name_may_hold_any_character(tmp_path: Path, memory: str, name: str) -> None:
    """It is found by its folder and by itself, though it reads as a pattern or a chain."""
    (tmp_path / name).write_bytes(b"content")
    Root(memory).put_new(name, b"content")
    (tmp_path / "br1.tar").write_bytes(b"another")
    for folder in (str(tmp_path), memory):
        (found,) = [e for e in list_files(folder) if e.size == 7 and e.url.endswith("/" + name)]
        assert list_files(found.url) == [found] and is_unchanged(found)
        assert open_input(found.url, found.size).read() == read_bytes(found.url) == b"content"


def test_a_name_need_not_be_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 stay what they are, from the listing to the open file."""
    with open(os.fsencode(tmp_path) + b"/\xff.tar", "wb") as f:
        f.write(b"content")
    (found,) = list_files(str(tmp_path))
    assert os.fsencode(found.url).endswith(b"/\xff.tar") and len(found.etag) == 16
    assert open_input(found.url, found.size).read() == b"content" and is_unchanged(found)
    assert list_files(found.url) == [found] and len(digest(found.url)) == 16


def test_links_are_followed(tmp_path: Path) -> None:
    """To files and to folders, once round a circle; the etag is the target's."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(b"abc")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "x.tar").symlink_to("../store/x")
    (tmp_path / "in" / "linked").symlink_to("../store")
    (tmp_path / "in" / "sub" / "up").symlink_to("..")
    root = tmp_path / "in"
    assert names(root) == [f"{root}/linked/x", f"{root}/x.tar"]
    found = {e.url: e for e in list_files(str(root))}[f"{root}/x.tar"]
    assert found.size == 3 and is_unchanged(found)
    os.utime(tmp_path / "store" / "x", (1, 1))
    assert not is_unchanged(found)


def test_a_link_to_nowhere_is_an_empty_file(tmp_path: Path) -> None:
    """It does not vanish from the listing, nor end it: who reads it finds nothing."""
    (tmp_path / "good.jpg").write_bytes(b"abc")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    assert {e.url: e.size for e in list_files(str(tmp_path))} == {
        f"{tmp_path}/good.jpg": 3,
        f"{tmp_path}/gone.jpg": 0,
        f"{tmp_path}/self.jpg": 0,
    }
    assert all(map(is_unchanged, list_files(str(tmp_path))))
    os.mkfifo(tmp_path / "pipe.jpg")
    assert len(names(tmp_path)) == 3
    with pytest.raises(OSError):
        open_input(f"{tmp_path}/gone.jpg", 0)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_pattern_matches_level_by_level(tmp_path: Path, memory: str, store: str) -> None:
    url = str(tmp_path) if store == "local" else memory
    for name in ("a.tar", "b.tar", "c.txt", "x/a.tar", "x/y/a.tar", ".h.tar"):
        Root(url).put_new(name, b"1")

    def expected(*found: str) -> list[str]:
        return [f"{Root(url).url}/{name}" for name in found]

    assert names(f"{url}/*.tar") == expected(".h.tar", "a.tar", "b.tar")
    assert names(f"{url}/[a]?tar") == expected("a.tar")
    assert names(f"{url}/*/a.tar") == expected("x/a.tar")
    assert names(f"{url}/x/*/*.tar") == expected("x/y/a.tar")
    assert names(f"{url}/x/**/*.tar") == expected("x/a.tar", "x/y/a.tar")
    for pattern in ("*.png", "none/*.tar", "*.tar/*"):
        with pytest.raises(UsageError, match="nothing matches"):
            names(f"{url}/{pattern}")


@pytest.mark.parametrize("pattern", ["", "/*/*", "/**/*.jpg"])
def test_a_folder_that_cannot_be_listed_is_not_passed_over(flaky: type[FlakyStore], pattern: str) -> None:
    """fsspec's own walk would give the rest and say nothing."""
    for name in ("a/1.jpg", "b/2.jpg"):
        Root("flaky://in").put_new(name, b"1")
    assert len(names(f"flaky://in{pattern}")) == 2
    flaky.closed = {"/in/b"}
    with pytest.raises(UsageError, match="could not list flaky://"):
        names(f"flaky://in{pattern}")


def test_a_web_servers_folder_is_listed_with_sizes(tmp_path: Path) -> None:
    """A URL with `/` at its end; each file's size and etag are asked for."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"abc")
    with serving(tmp_path) as url:
        (found,) = list_files(f"{url}/in/")
        assert found.url == f"{url}/in/a.tar" and found.size == 3 and is_unchanged(found)
        assert list_files(found.url) == [found]
        os.utime(tmp_path / "in" / "a.tar", (1, 1))
        assert not is_unchanged(found)
        with pytest.raises(UsageError, match="not found"):
            list_files(f"{url}/none.tar?signature=secret")


@pytest.mark.parametrize("store", ["local", "memory"])
def test_the_etag_moves_with_the_content(tmp_path: Path, memory: str, store: str) -> None:
    """Same name, same size, other content: another etag. What is gone is not unchanged."""
    root = Root(str(tmp_path / "in") if store == "local" else memory)
    root.put_new("x", b"abc")
    (before,) = list_files(root.url)
    assert before.size == 3 and is_unchanged(before) and list_files(root.url) == [before]
    time.sleep(0.02)  # a kernel's clock tick is 4 ms
    root.overwrite("x", b"abd")
    (after,) = list_files(root.url)
    assert after.etag != before.etag and not is_unchanged(before) and is_unchanged(after)
    root.delete("x")
    root.delete("x")
    assert not is_unchanged(after)


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://x/y",
        "s3://",
        "s3://key:secret@bucket/x",
        "simplecache::https://me:secret@host/x?sig=secret",
        "zip://a.tar::/data/x.zip",
        "zip://a.tar",
        "memory://nothing/here",
        "/nothing/here",
        "/nothing/here/*.tar",
        "/tmp/a**b/*.tar",
        "https://me:secret@127.0.0.1:9/x.tar?sig=secret",
    ],
)
def test_what_cannot_be_listed_is_one_line_without_secrets(url: str) -> None:
    with stamina.set_testing(True, attempts=2), pytest.raises(UsageError) as caught:
        list_files(url)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert redact(url).partition("::")[0] in str(caught.value)


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


def test_many_files_are_listed(tmp_path: Path) -> None:
    for i in range(3000):
        folder = tmp_path / f"{i % 30}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.parquet").touch()
    listed = Root(str(tmp_path)).list("")
    assert len(listed) == 3000 and listed["7/7.parquet"] == 0
    assert len(list_files(str(tmp_path))) == 3000


def test_an_entry_is_small_and_fixed() -> None:
    """A million of them are held by the driver."""
    e = Entry("a", 1, "b")
    assert not hasattr(e, "__dict__")
    with pytest.raises(AttributeError):
        e.url = "b"  # type: ignore[misc]
