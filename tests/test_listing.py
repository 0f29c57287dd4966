"""The promises of pipeline/listing.py: what an input matches, what a shard is called, and what moves its etag."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from containers import serving, write_folder, write_parquet, write_tar

from pipeline.columns import Columns
from pipeline.errors import UsageError
from pipeline.listing import check_columns, list_shards
from pipeline.storage import digest

IMAGE = {"a.jpg": b"a"}


def names(*inputs: object, **options: object) -> list[str]:
    return [s.name for s in list_shards([str(i) for i in inputs], **options)]  # type: ignore[arg-type]


def tars(root: Path, *paths: str) -> None:
    for path in paths:
        write_tar(root / path, IMAGE)


def test_a_file_is_named_without_its_ending(tmp_path: Path) -> None:
    """Every ending of a format goes; `--format` is believed whatever the name."""
    for name in ("a.tar", "b.tar.gz", "c.TGZ", "d.other"):
        write_tar(tmp_path / name, IMAGE)
    write_parquet(tmp_path / "e.pq", [b"x"])
    (shard,) = list_shards([str(tmp_path / "a.tar")])
    assert (shard.name, shard.format, shard.url) == ("a", "webdataset", str(tmp_path / "a.tar"))
    assert shard.size == (tmp_path / "a.tar").stat().st_size and len(shard.etag) == 16
    assert names(tmp_path / "b.tar.gz") == ["b"] and names(tmp_path / "c.TGZ") == ["c"]
    assert names(tmp_path / "e.pq") == ["e"] and list_shards([str(tmp_path / "e.pq")])[0].format == "parquet"
    (believed,) = list_shards([str(tmp_path / "d.other")], format="webdataset")
    assert (believed.name, believed.format) == ("d.other", "webdataset")
    with pytest.raises(UsageError, match=r"d\.other.*give --format"):
        list_shards([str(tmp_path / "d.other")])


def test_a_folder_gives_its_tars_else_its_parquet_else_its_images(tmp_path: Path) -> None:
    """Files of other kinds and hidden ones are passed over; tars beside Parquet are ambiguous."""
    tars(tmp_path, "t/x.tar", "t/sub/y.tgz", "t/.git/z.tar", "t/sub/._y.tar", "t/_tmp.tar", "t/.hidden.tar")
    write_folder(tmp_path / "t", {"README.md": b"", "cover.jpg": b"j", "_SUCCESS": b""})
    assert names(tmp_path / "t") == ["sub/y", "x"]
    write_parquet(tmp_path / "p" / "x.parquet", [b"x"])
    write_folder(tmp_path / "p", {"a.jpg": b"j", "_metadata.parquet": b""})
    assert names(tmp_path / "p") == ["x"]
    write_parquet(tmp_path / "t" / "p.parquet", [b"x"])
    with pytest.raises(UsageError, match=r"tars and Parquet.*--format"):
        list_shards([str(tmp_path / "t")])
    assert names(tmp_path / "t", format="parquet") == ["p"]
    assert [s.format for s in list_shards([str(tmp_path / "t")], format="folder")] == ["folder"]
    write_folder(tmp_path / "other", {"x.txt": b""})
    with pytest.raises(UsageError, match="other"):
        list_shards([str(tmp_path / "other")])


def test_nothing_matching_is_refused_by_name(tmp_path: Path) -> None:
    """One input of several that matches nothing ends the run before any work."""
    tars(tmp_path, "a.tar")
    for missing in ("none.tar", "none/", "none-*.tar", "none-{00..03}.tar"):
        with pytest.raises(UsageError, match="none"):
            list_shards([str(tmp_path / "a.tar"), str(tmp_path / missing)])
    with pytest.raises(UsageError, match="no input"):
        list_shards([])
    with pytest.raises(UsageError, match="--format zip"):
        list_shards([str(tmp_path)], format="zip")


def test_globs_and_brace_ranges(tmp_path: Path) -> None:
    """A range needs every one of its objects; a literal file with a pattern's characters wins."""
    tars(tmp_path, *(f"d/s-{i:04}.tar" for i in range(12)), "d/val/s-0000.tar")
    assert names(tmp_path / "d/s-*.tar") == [f"s-{i:04}" for i in range(12)]
    assert names(tmp_path / "d/**/s-0000.tar") == ["s-0000", "val/s-0000"]
    assert names(str(tmp_path / "d/s-{0002..0004}.tar")) == ["s-0002", "s-0003", "s-0004"]
    assert names(str(tmp_path / "{d,d/val}/s-0000.tar")) == ["d/s-0000", "d/val/s-0000"]
    assert names(str(tmp_path / "d/{s-000[12],val/s-*}.tar")) == ["s-0001", "s-0002", "val/s-0000"]
    with pytest.raises(UsageError, match="s-0012"):
        list_shards([str(tmp_path / "d/s-{0010..0012}.tar")])
    tars(tmp_path, "d/x{1..2}.tar", "d/y[1].tar")
    assert names(str(tmp_path / "d/x{1..2}.tar")) == ["x{1..2}"]
    assert names(str(tmp_path / "d/y[1].tar")) == ["y[1]"]
    write_folder(tmp_path / "d", {"s.json": b"", "s.dat": b""})
    assert names(tmp_path / "d/s*") == [f"s-{i:04}" for i in range(12)], "other kinds are passed over"
    assert names(tmp_path / "d/s.*", format="webdataset") == ["s.dat", "s.json"], "no ending matches: all are meant"


def test_hidden_files_match_only_a_glob_that_asks_for_them(tmp_path: Path) -> None:
    """As in a shell."""
    tars(tmp_path, "d/a.tar", "d/._a.tar", "d/.cache/b.tar", "d/_c.tar")
    assert names(tmp_path / "d/*.tar") == ["a"]
    assert names(tmp_path / "d/.cache/*.tar") == ["b"]
    assert names(tmp_path / "d/_*.tar") == ["_c"]


def test_lists_name_one_input_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments and blank lines go; relative lines are relative to the working directory; the list may be a URL."""
    tars(tmp_path, "d/a.tar", "d/b/c.tar", "e/f.tar")
    monkeypatch.chdir(tmp_path)
    text = "# the first day\n\n  d/a.tar  \nd/b\n./e/../e/*.tar\n"
    (tmp_path / "d" / "list.txt").write_text(text)
    with fsspec.open("memory://lists/day.txt", "w") as f:
        f.write(text)
    for given in ("@d/list.txt", "@memory://lists/day.txt"):
        shards = list_shards([given])
        assert [s.name for s in shards] == ["d/a", "d/b/c", "e/f"]
        assert shards[0].url == str(tmp_path / "d/a.tar")
    for bad, content in (("gone.txt", None), ("empty.txt", "# nothing\n"), ("binary.txt", b"\xff\xfe\x00")):
        if content is not None:
            (tmp_path / bad).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UsageError, match=bad):
            list_shards([f"@{bad}"])


def test_names_come_from_what_was_asked_not_from_what_was_found(tmp_path: Path) -> None:
    """A shard keeps its name when its neighbours come and go."""
    tars(tmp_path, "in/2024/jan/a.tar")
    assert names(tmp_path / "in") == ["2024/jan/a"]
    assert names(tmp_path / "in/*/*/*.tar") == ["2024/jan/a"]
    tars(tmp_path, "in/2025/b.tar")
    assert names(tmp_path / "in") == ["2024/jan/a", "2025/b"]
    assert names(tmp_path / "in/2024", tmp_path / "in/2025") == ["2024/jan/a", "2025/b"]
    assert names(tmp_path / "in/2024/jan/a.tar", tmp_path / "in/2025/b.tar") == ["2024/jan/a", "2025/b"]
    assert names(tmp_path / "in/2025/../2025") == ["b"]


def test_equal_names_stay_apart(tmp_path: Path) -> None:
    """Equal names, and a name on another's path, keep their endings; what is still equal is refused."""
    tars(tmp_path, "in/x.tar", "in/x.tar.gz", "in/y.tar")
    assert names(tmp_path / "in") == ["x.tar", "x.tar.gz", "y"]
    tars(tmp_path, "p/a.tar", "p/a/b.tar", "p/a/c.tar")
    assert names(tmp_path / "p") == ["a.tar", "a/b", "a/c"], "ids a/b/… could come from both a and a/b"
    tars(tmp_path, "q/a.tar", "q/a/b.tar", "q/a.tar.d/x.tar")
    assert names(tmp_path / "q") == ["a.tar", "a.tar.d/x", "a/b"]
    for url in ("memory://clash//k.tar", "memory://clash/k.tar"):
        with fsspec.open(url, "wb") as f:
            f.write(b"x")
    with pytest.raises(UsageError, match="not be unique"):
        list_shards(["memory://clash"])


def test_the_same_object_is_listed_once(tmp_path: Path) -> None:
    """However many inputs reach it, in whatever order."""
    tars(tmp_path, "in/a.tar", "in/sub/b.tar")
    inputs = [tmp_path / "in/sub/b.tar", tmp_path / "in", tmp_path / "in/**/*.tar", tmp_path / "in/a.tar"]
    assert names(*inputs) == names(*reversed(inputs)) == ["a", "sub/b"]
    assert list_shards([str(i) for i in inputs]) == list_shards([str(i) for i in reversed(inputs)])


def test_the_output_is_no_input(tmp_path: Path) -> None:
    """An output root below an input folder is left out of it; its namesakes are not."""
    write_parquet(tmp_path / "in/a.parquet", [b"x"])
    write_parquet(tmp_path / "in/out/sets/m/embeddings/a-1.parquet", [b"x"])
    write_parquet(tmp_path / "in/outer/b.parquet", [b"x"])
    assert names(tmp_path / "in", exclude=str(tmp_path / "in/x/../out/")) == ["a", "outer/b"]
    with pytest.raises(UsageError, match="lies in the output"):
        list_shards([str(tmp_path / "in/out/sets")], exclude=str(tmp_path / "in/out"))


def test_buckets_and_schemes_keep_names_apart(tmp_path: Path) -> None:
    """Inputs in different stores: the name keeps the bucket, and the scheme where schemes differ."""
    for url in ("memory://one/d/a.tar", "memory://two/d/a.tar"):
        with fsspec.open(url, "wb") as f:
            f.write(b"x")
    tars(tmp_path, "a.tar")
    assert names("memory://one/d/a.tar") == ["a"]
    assert names("memory://one/d", "memory://two") == ["one/d/a", "two/d/a"]
    both = names("memory://one/d/a.tar", tmp_path / "a.tar")
    assert both == [f"file{tmp_path}/a", "memory/one/d/a"]
    assert list_shards(["memory://one/d/a.tar"])[0].url == "memory:///one/d/a.tar"


def test_an_address_with_a_query_is_named_by_its_path(tmp_path: Path) -> None:
    """A presigned URL: its query is needed for reading and is no part of the name."""
    tars(tmp_path, "d/a.tar")
    with serving(tmp_path) as url:
        (shard,) = list_shards([f"{url}/d/a.tar?signature=secret"])
        assert (shard.name, shard.url, shard.format) == ("a", f"{url}/d/a.tar?signature=secret", "webdataset")
        with pytest.raises(UsageError) as e:
            list_shards([f"{url}/d/gone.tar?signature=secret"])
        assert "gone.tar" in str(e.value) and "secret" not in str(e.value)


def test_the_etag_moves_with_the_object_and_with_how_it_is_read(tmp_path: Path) -> None:
    """A changed object, another format, other columns: another etag. The same: the same."""
    path = write_parquet(tmp_path / "a.parquet", [b"x"], thumb=[b"y"], key=["k"], id=["i"])

    def etag(**options: object) -> str:
        return list_shards([str(path)], **options)[0].etag  # type: ignore[arg-type]

    before = etag()
    assert before == etag()
    assert etag(columns=Columns(image="thumb")) != before != etag(columns=Columns(key="id"))
    assert etag(format="webdataset") != before
    allowed = etag(columns=Columns(allow_urls=("/data/", "s3://b/x/")))
    assert allowed != before, "what was refused is fetched with the flag, so the shard is to do again"
    assert allowed == etag(columns=Columns(allow_urls=("s3://b/x/*", "/data/", "/data/")))
    os.utime(path, (1, 1))
    assert etag() != before
    tar = write_tar(tmp_path / "b.tar", IMAGE)
    by_default = list_shards([str(tar)])
    assert by_default == list_shards([str(tar)], columns=Columns(key="id", allow_urls=("/data/",))), (
        "columns are nothing to a tar"
    )


def test_wrong_columns_end_before_any_work(tmp_path: Path) -> None:
    """The sentence names the columns that there are; unreadable footers are left to become rejects."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no footer")
    write_parquet(tmp_path / "b.parquet", [b"x"], text=["t"])
    shards = list_shards([str(tmp_path)])
    check_columns(shards, Columns(image="image"))
    with pytest.raises(UsageError, match=r"b\.parquet.*picture.*image \(binary\), text \(string\)"):
        check_columns(shards, Columns(image="picture"))
    with pytest.raises(UsageError, match=r"--image-column text: it is string"):
        check_columns(shards, Columns(image="text"))
    write_parquet(tmp_path / "c" / "c.parquet", [b"x"], photo=pa.array([b"y"]))
    with pytest.raises(UsageError, match="more than one"):
        check_columns(list_shards([str(tmp_path / "c")]), Columns())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("photos")
    yield write_folder(folder, {f"{i % 7}/img{i:05}.jpg": b"" for i in range(5000)})


def test_an_image_more_or_less_changes_its_own_slice_only(photos: Path) -> None:
    """5,000 images: slices are cut by the names' digests, so all others keep their name and etag."""
    before = {s.name: s for s in list_shards([str(photos)])}
    assert 2 <= len(before) <= 15
    paths = [m.url.removeprefix(f"{photos}/") for s in before.values() for m in s.members]
    assert sorted(paths) == sorted(f"{i % 7}/img{i:05}.jpg" for i in range(5000))
    for shard in before.values():
        mark = digest(shard.members[0].url.removeprefix(f"{photos}/"))
        assert shard.name == (f"slice-{mark[:8]}" if int(mark, 16) % 1000 == 0 else "slice-00000000")
        assert [m.url for m in shard.members] == sorted(m.url for m in shard.members)
        assert (shard.format, shard.url, shard.size) == ("folder", str(photos), 0)
    new = photos / "3" / "img00003-new.jpg"
    assert int(digest("3/img00003-new.jpg"), 16) % 1000, "it would cut its slice in two, which is another promise"
    new.write_bytes(b"")
    after = {s.name: s for s in list_shards([str(photos)])}
    new.unlink()
    assert after.keys() == before.keys()
    (changed,) = [name for name in before if before[name].etag != after[name].etag]
    assert str(new) in {m.url for m in after[changed].members}
    assert {s.name: s for s in list_shards([str(photos)])} == before
    touched = before[changed].members[0]
    os.utime(touched.url, (1, 1))
    after = {s.name: s for s in list_shards([str(photos)])}
    assert [name for name in before if before[name] != after[name]] == [changed]
    cutting = next(n for n in (f"3/img00003-{i}.jpg" for i in range(10**5)) if int(digest(n), 16) % 1000 == 0)
    (photos / cutting).write_bytes(b"")
    after = {s.name: s for s in list_shards([str(photos)])}
    (photos / cutting).unlink()
    assert after.keys() == before.keys() | {f"slice-{digest(cutting)[:8]}"}
    assert [name for name in before if before[name].etag != after[name].etag] == [changed], "it was cut in two"


def test_a_glob_of_images_and_single_images_are_folders(tmp_path: Path) -> None:
    """The root is the glob's fixed prefix, or the image's own folder; a slice lies below its folder's path."""
    write_folder(tmp_path / "in", {"a/1.jpg": b"1", "a/2.PNG": b"22", "b/3.jpg": b"3", "b/x.txt": b""})
    (shard,) = list_shards([str(tmp_path / "in/*/*.jpg")])
    assert (shard.name, shard.url) == ("slice-00000000", str(tmp_path / "in"))
    assert [m.url.removeprefix(shard.url) for m in shard.members] == ["/a/1.jpg", "/b/3.jpg"]
    assert names(tmp_path / "in/a", tmp_path / "in/b") == ["a/slice-00000000", "b/slice-00000000"]
    (single,) = list_shards([str(tmp_path / "in/a/1.jpg"), str(tmp_path / "in/a/2.PNG")])
    assert (single.name, single.url, len(single.members), single.size) == ("slice-00000000", f"{tmp_path}/in/a", 2, 3)
