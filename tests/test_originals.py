"""The images behind ids: those that were embedded, or none."""

from pathlib import Path

import containers
import pytest
from pictures import broken, jpeg

from pipeline import originals as module
from pipeline.columns import Columns
from pipeline.errors import UsageError
from pipeline.listing import list_shards
from pipeline.originals import check_input, originals
from pipeline.shards import read_samples


def etags(shards: list) -> dict[str, str]:
    return {s.name: s.etag for s in shards}


def test_each_id_has_its_picture(tmp_path: Path) -> None:
    """Of tars and folders; one that does not decode has none and is no failure."""
    images = {f"k{i}.jpg": jpeg(40 + i, 30) for i in range(4)}
    containers.write_tar(tmp_path / "in" / "a.tar", images | {"bad.jpg": broken()["noise"][1]})
    containers.write_folder(tmp_path / "in" / "f", images)
    shards = list_shards([f"{tmp_path}/in/a.tar"]) + list_shards([f"{tmp_path}/in/f"])
    ids = {f"{s.name}/{x.id_key}": s.name for s in shards for x in read_samples(s)}
    found = originals(shards, etags(shards), ids)
    assert found.pictures.keys() == {i for i in ids if "bad" not in i} and len(ids) == 9
    assert (found.wanted, found.changed, found.unread) == (9, 0, 0)


def test_a_shard_that_has_changed_shows_nothing(tmp_path: Path) -> None:
    """Its ids may be other images now. Another input altogether is the caller's mistake."""
    for name in "ab":
        containers.write_tar(tmp_path / f"{name}.tar", {"k.jpg": jpeg()})
    shards = list_shards([f"{tmp_path}/*.tar"])
    known = etags(shards) | {"a": "0" * 16, "gone": "1" * 16}
    found = originals(shards, known, {"a/k": "a", "b/k": "b", "gone/k": "gone"})
    assert found.pictures.keys() == {"b/k"} and found.changed == 2
    check_input(shards, known)
    check_input(shards, {})
    with pytest.raises(
        UsageError, match="--input lists 2 shards, such as a, and none of this version's, such as other"
    ):
        check_input(shards, {"other": "0" * 16})
    with pytest.raises(UsageError, match="--input lists 0 shards, such as none, and"):
        check_input([], {"other": "0" * 16})


def test_no_more_is_read_than_a_report_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containers.write_tar(tmp_path / "a.tar", {f"k{i}.jpg": jpeg(90, 90, seed=i) for i in range(6)})
    shards = list_shards([f"{tmp_path}/a.tar"])
    monkeypatch.setattr(module, "READ_BYTES", 2 * len(jpeg(90, 90)) + 9)
    found = originals(shards, etags(shards), {f"a/k{i}": "a" for i in range(6)})
    assert 2 <= len(found.pictures) <= 4 and found.unread == 6 - len(found.pictures)


def test_images_behind_urls_are_fetched_only_where_embed_may(tmp_path: Path) -> None:
    """A column of local paths: with `--allow-url` as then, else the shard is another one and shows nothing."""
    (tmp_path / "x.jpg").write_bytes(jpeg())
    containers.write_parquet(tmp_path / "u.parquet", [None], url=[str(tmp_path / "x.jpg")], id=["k"])
    allowed = Columns(uri="url", key="id", allow_urls=(f"{tmp_path}/",))
    shards = list_shards([f"{tmp_path}/u.parquet"], columns=allowed)
    assert originals(shards, etags(shards), {"u/k": "u"}).pictures.keys() == {"u/k"}
    closed = list_shards([f"{tmp_path}/u.parquet"], columns=Columns(uri="url", key="id"))
    found = originals(closed, etags(shards), {"u/k": "u"})
    assert found.pictures == {} and found.changed == 1
