"""The promises of pipeline/storage.py, on local disks and fsspec's own stores."""

import os
import time
from pathlib import Path

import pytest
import stamina
from containers import FlakyStore, serving

from pipeline.errors import UsageError
from pipeline.output import Root
from pipeline.storage import Entry, digest, is_unchanged, list_files, open_input, read_bytes, redact

REPOSITORY = Path(__file__).resolve().parent.parent


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
