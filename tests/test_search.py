"""search: by id, image and vector, the same neighbours on every way, and no vector of another model."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import planted
import pyarrow.parquet as pq
import pytest
import written
from containers import write_tar
from pictures import jpeg
from PIL import Image
from test_jobs import call, embed_args

from pipeline import index, near_duplicates, readers, report, stored_index, versions
from pipeline.errors import UsageError
from pipeline.output import Root
from pipeline.search import Searcher, read_vector, search
from pipeline.versions import Version

DIM = 16


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Root, Version]:
    """120 vectors in two files, with a flat index."""
    root = Root(str(tmp_path_factory.mktemp("search")))
    version = planted.commit(root, {"a": rows(80, 1), "b/c": rows(40, 2)})
    index.build(root, version, say=lambda line: None)
    return root, version


def test_hits_are_those_of_numpy_on_every_way(output: tuple[Root, Version]) -> None:
    """Through the index and without: the same ids in the same order, and scores that are the exact cosines."""
    root, version = output
    every = np.concatenate([rows(80, 1), rows(40, 2)]).astype(np.float64)
    ids = [f"a/{n}" for n in range(80)] + [f"b/c/{n}" for n in range(40)]
    query = rows(1, 3)[0]
    cosines = every @ query / np.linalg.norm(every, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines)[:7]
    for exact in (False, True):
        answer = Searcher(root, version, exact=exact)(1e-30 * query.astype(np.float64), top=7)
        assert [hit.id for hit in answer.hits] == [ids[i] for i in order]
        np.testing.assert_allclose([hit.score for hit in answer.hits], cosines[order], atol=2e-6)
        assert ("flat index of version 1" in answer.how) is not exact
    first = answer.hits[0]
    assert (first.shard, first.width, first.height) == (first.id.rpartition("/")[0], 640, 480)
    assert first.class_name == f"class {first.class_index}" and first.class_score == 0.75


def test_an_id_is_no_hit_of_its_own(output: tuple[Root, Version]) -> None:
    """Its own vector is the query; the others come in their order."""
    root, version = output
    query = Searcher(root, version).vector_of("b/c/5")
    np.testing.assert_allclose(query, rows(40, 2)[5] / np.linalg.norm(rows(40, 2)[5]), atol=1e-6)
    own = search(root, version, query, top=120).hits
    others = search(root, version, query, top=120, without="b/c/5").hits
    assert own[0].id == "b/c/5" and len(own) == 120
    assert [hit.id for hit in others] == [hit.id for hit in own[1:]]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("b/c/55", "similar ids in shard b/c are b/c/5"),
        ("b/cc/5", "similar shards are b/c$"),
        ("nothing-like-it", "has no id nothing-like-it$"),
        ("a", "has no id a: similar shards are a$"),
    ],
)
def test_an_unknown_id_is_answered_with_similar_ones(output: tuple[Root, Version], wanted: str, said: str) -> None:
    """The sentence names the version, and what the user may have meant."""
    with pytest.raises(UsageError, match=said):
        Searcher(*output).vector_of(wanted)


def test_as_many_hits_come_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lists hold ten hits, and not a hundred: more are looked into, so that recall holds too, and it is told."""
    root, every = Root(str(tmp_path)), rows(2000, 4)
    version = planted.commit(root, {"a": every})
    stored = index.build(root, version, kind="ivf", least=0.3, say=lambda line: None).index
    unit = every / np.linalg.norm(every, axis=1, keepdims=True)
    searcher, shares = Searcher(root, version), []
    assert stored.probes < stored.lists / 10
    for query in range(0, 2000, 100):
        answer = searcher(every[query], top=100, without=f"a/{query}")
        assert len(answer.hits) == 100 and not answer.is_exact
        true = np.argsort(-(unit @ unit[query]), kind="stable")[1:101]
        shares.append(len({f"a/{n}" for n in true} & {hit.id for hit in answer.hits}) / 100)
    assert np.mean(shares) >= stored.recall_at_10 - 0.05
    told = rf"recall@10 0\.\d+ as measured for 10 hits; {10 * stored.probes} of {stored.lists} lists .* for 100$"
    assert re.search(told, answer.how) and "as measured" not in searcher(every[0]).how
    assert len(searcher(every[0], top=1000).hits) == 1000
    monkeypatch.setattr(index, "LEAST_PER_LIST", 4)
    version = planted.commit(root, {"a": every[:300]})
    index.build(root, version, kind="ivf", least=0.3, say=lambda line: None)
    searcher = Searcher(root, version)
    assert searcher.index is not None and searcher.index.lists > 30
    searcher.index = replace(searcher.index, probes=1)
    assert all(len(searcher(every[n], without=f"a/{n}").hits) == 10 for n in range(40))
    found = searcher(every[0], top=1000, without="a/0").hits
    assert {hit.id for hit in found} == {f"a/{n}" for n in range(1, 300)}


def test_a_search_lists_no_parts(output: tuple[Root, Version], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an output of a million shards that alone would take minutes."""

    def refused(root: Root, folder: str) -> dict[str, int]:
        raise AssertionError(f"all of {folder} was listed")

    monkeypatch.setattr(Root, "list", refused)
    assert search(*output, rows(1, 3)[0]).how.startswith("flat index")


def test_a_wrong_input_is_found_before_any_work(
    output: tuple[Root, Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's shards, none at all, and places where nothing can be written: 2, and nothing was searched."""
    out = output[0].url

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr(Searcher, "__init__", refused)
    monkeypatch.setattr(near_duplicates, "near_duplicates", refused)
    monkeypatch.setattr(report, "gather", refused)
    write_tar(tmp_path / "other.tar", {"k.jpg": b""})
    other, none = ("--input", tmp_path / "other.tar"), ("--input", tmp_path / "none.tar")
    sheet, here = ("--sheet", tmp_path / "x.png"), ("--sheet", tmp_path)
    for verb in (("search", out, "--id", "a/1"), ("near-duplicates", out)):
        for more, said in (
            ((*sheet, *other), "none of this version's, such as a: give --input as it was"),
            ((*sheet, *none), "none.tar"),
            ((*here, *other), f"--sheet {tmp_path}: is a folder"),
            (("--sheet", tmp_path / "no" / "x.png", *other), "there is no folder"),
        ):
            code, _, told = call(*verb, *more)
            assert code == 2 and said in told, (verb, more, told)
    for args, said in (
        (("search", out, "--id", "a/1", "--top", 0), "--top 0"),
        (("near-duplicates", out, "--parquet", tmp_path), "is a folder"),
        (("report", out, *other), "none of this version's"),
        (("report", out, "--html", tmp_path), f"--html {tmp_path}: is a folder"),
        (("report", out, "--html", tmp_path / "no" / "x.html"), "there is no folder"),
    ):
        code, _, told = call(*args)
        assert code == 2 and said in told, (args, told)


def test_ids_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """A key may hold what clears a screen, or a line that looks like a hit; JSON has it as it is."""
    root, hostile = Root(str(tmp_path)), "\x1b[2J\n  1.0000  mine"
    same = {key: (np.ones(DIM), 1) for key in (hostile, "other")}
    written.version(root, written.vectors_of(DIM), {"s": same})
    for args in (("search", tmp_path, "--id", "s/other"), ("near-duplicates", tmp_path)):
        code, printed, told = call(*args)
        assert code == 0, told
        assert "\x1b" not in printed and "s/\\x1b[2J\\n  1.0000  mine" in printed
        found = json.loads(call(*args, "--json")[1])
        assert f"s/{hostile}" in {hit["id"] for hit in found.get("hits") or found["groups"][0]}


def test_a_version_without_an_index_is_searched_exactly(tmp_path: Path) -> None:
    """An index of the version before is not used: its rows are not this one's."""
    root = Root(str(tmp_path))
    before = planted.commit(root, {"a": rows(50, 1)})
    index.build(root, before, say=lambda line: None)
    version = planted.commit(root, {"a": rows(50, 1)[::-1]})
    answer = search(root, version, rows(50, 1)[3], top=1)
    assert answer.hits[0].id == "a/46" and answer.hits[0].score == pytest.approx(1, abs=1e-6)
    assert answer.how == "version 2 has no index (`shard2vec index` makes one): each of its 50 vectors was looked at"
    assert search(root, before, rows(50, 1)[3], top=1).hits[0].id == "a/3"


def npy(path: Path, value: object) -> str:
    np.save(path, value)
    return str(path)


def test_vectors_come_from_npy_files(tmp_path: Path) -> None:
    """One vector of floats, as a row or as a matrix of one row."""
    for given in (np.float16([1, 2]), np.float32([[1, 2]]), np.float64([1, 2])):
        np.testing.assert_array_equal(read_vector(npy(tmp_path / "v.npy", given)), [1, 2])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.ones((2, DIM)), "holds 2x16: one vector is wanted"),
        (np.ones(DIM, np.int64), "holds int64: floats are wanted"),
        (np.array(["x"]), "holds <U1: floats are wanted"),
        (np.float32(1), "holds a number: one vector is wanted"),
        (np.ones(2**18), "bytes: give a file of one vector"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, given: object, said: str) -> None:
    """Each with what it holds."""
    with pytest.raises(UsageError, match=said):
        read_vector(npy(tmp_path / "v.npy", given))


def test_files_that_are_no_npy_are_refused(tmp_path: Path) -> None:
    """Pickles too: nothing of them runs."""
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects", "text", "empty"):
        with pytest.raises(UsageError, match=r"is no \.npy file"):
            read_vector(str(tmp_path / f"{name}.npy"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_vector(str(tmp_path / "none.npy"))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (np.ones(DIM + 1), "is 17, those of version 1 of .* have 16 values"),
        (np.full(DIM, np.nan), "NaN or infinity"),
        (np.zeros(DIM), "is zero: it has no direction"),
    ],
)
def test_queries_that_do_not_fit_are_refused(output: tuple[Root, Version], query: np.ndarray, said: str) -> None:
    """Before anything is searched."""
    with pytest.raises(UsageError, match=said):
        search(*output, query)
    with pytest.raises(UsageError, match="--top 0: must be 1 to 1000"):
        search(*output, np.ones(DIM), top=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, shards: Path, ray_session: None) -> tuple[Path, Path]:
    """Input and output of an `embed`: the shared shards and one that repeats two photos; with an index."""
    folder = tmp_path_factory.mktemp("photos")
    good = oracle.good_images()
    again = {"again_3.jpg": good["photo_3"], "again_7.jpg": good["photo_7"], "other.jpg": jpeg(99, 70, seed=400)}
    (folder / "in").mkdir()
    for path in shards.rglob("*.tar*"):
        (folder / "in" / path.name).write_bytes(path.read_bytes())
    write_tar(folder / "in" / "again.tar", again)
    code, _, told = call(*embed_args(folder / "in", folder / "out", "--precision", "fp32", "--decode", "exact"))
    assert code == 0, told
    code, out, told = call("index", folder / "out", "--json")
    assert code == 0, told
    made = json.loads(out.splitlines()[-1])
    assert made["vectors"] == 24 and made["recall_at_10"] == 1.0
    assert {"bytes", "seconds", "kind", "version", "set"} <= made.keys()
    return folder / "in", folder / "out"


def hits(out: Path, *more: object) -> list[dict[str, object]]:
    code, printed, told = call("search", out, "--json", *more)
    assert code == 0, told
    found: list[dict[str, object]] = json.loads(printed.splitlines()[-1])["hits"]
    return found


def test_an_image_file_finds_itself(photos: tuple[Path, Path], tmp_path: Path) -> None:
    """Embedded as the set was, it has the stored vector; id and vector give the same neighbours."""
    _, out = photos
    (tmp_path / "query.jpg").write_bytes(oracle.good_images()["photo_3"])
    by_image = hits(out, "--image", tmp_path / "query.jpg", "--top", 3)
    assert {hit["id"] for hit in by_image[:2]} == {"one/photo_3", "again/again_3"}
    assert all(hit["score"] > 0.999999 for hit in by_image[:2])  # type: ignore[operator]
    own, *rest = hits(out, "--id", "one/photo_3", "--top", 2)
    assert own["id"] == "again/again_3" and rest[0]["id"] == by_image[2]["id"]
    files = readers.files(str(out))
    table = pq.read_table(next(f for f in files if "/again-" in f)).to_pylist()
    np.save(tmp_path / "query.npy", np.float32(next(r["embedding"] for r in table if r["key"] == "again_3")))
    by_vector = hits(out, "--vector", tmp_path / "query.npy", "--top", 3)
    assert [hit["id"] for hit in by_vector] == [hit["id"] for hit in by_image]
    np.testing.assert_allclose([hit["score"] for hit in by_vector], [hit["score"] for hit in by_image], atol=2e-6)


def test_weights_that_are_not_the_sets_are_refused(
    photos: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their SHA-256; the right ones may be named where this node keeps none, and no image is embedded without."""
    _, out = photos
    (tmp_path / "query.jpg").write_bytes(oracle.good_images()["photo_3"])
    asked = ("search", out, "--image", tmp_path / "query.jpg", "--top", 1)
    code, _, told = call(*asked, "--weights", "random:1")
    assert code == 2 and "--weights random:1 are not the set's own (SHA-256 " in told
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path / "cache"))
    code, _, told = call(*asked)
    assert code == 2 and "the set's weights are not on this node: name those it was embedded with as --weights" in told
    code, printed, told = call(*asked, "--weights", "random:0")
    assert code == 0 and printed.startswith("  1.0000  again/again_3")
    (tmp_path / "query.jpg").write_text("<html>no image</html>")
    code, _, told = call(*asked)
    assert code == 2 and "gives no vector: corrupt: HTML, not an image" in told


def test_sheets_show_the_images_themselves(photos: tuple[Path, Path], tmp_path: Path) -> None:
    """The query, framed at the left, and its nearest beside it; grey where the input is no longer what was embedded."""
    source, out = photos
    hits(out, "--id", "one/photo_3", "--top", 8, "--sheet", tmp_path / "sheet.png", "--input", source)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == 1400
    query, nearest = sheet[160:240, 60:200], sheet[160:240, 279:419]
    assert np.abs(query - nearest).mean() < 2  # the copy of it
    shown = Image.open(io.BytesIO(oracle.good_images()["photo_3"])).convert("RGB").resize((1, 1))
    assert np.abs(query.mean((0, 1)) - np.array(shown.getpixel((0, 0)))).max() < 30
    write_tar(tmp_path / "in" / "one.tar", {"photo_3.jpg": jpeg(60, 60, seed=1)})
    hits(out, "--id", "one/photo_3", "--sheet", tmp_path / "grey.png", "--input", tmp_path / "in")
    grey = np.asarray(Image.open(tmp_path / "grey.png").convert("RGB"))[150:170, 60:200].reshape(-1, 3)
    assert (grey == (226, 224, 218)).all()


def test_near_duplicates_come_as_lines_json_and_parquet(photos: tuple[Path, Path], tmp_path: Path) -> None:
    """The two photos that were stored twice, and a sheet of them."""
    source, out = photos
    more = ("--parquet", tmp_path / "groups.parquet", "--sheet", tmp_path / "sheet.png", "--input", source)
    code, printed, told = call("near-duplicates", out, "--above", 0.99999, "--json", *more)
    assert code == 0, told
    groups = json.loads(printed.splitlines()[-1])["groups"]
    pairs = {("again/again_3", "one/photo_3"), ("again/again_7", "one/photo_7")}
    assert {tuple(member["id"] for member in group) for group in groups} == pairs
    table = pq.read_table(tmp_path / "groups.parquet")
    assert (
        table["group"].to_pylist() == [1, 1, 2, 2] and {tuple(p) for p in np.array(table["id"]).reshape(2, 2)} == pairs
    )
    assert Image.open(tmp_path / "sheet.png").width == 1400
    code, printed, _ = call("near-duplicates", out, "--above", 0.99999)
    assert code == 0 and printed.startswith("group 1: 2 images\n  1.0000  again/again_3")


def test_mistakes_end_with_2_and_a_sentence(photos: tuple[Path, Path], tmp_path: Path) -> None:
    """Before any work."""
    _, out = photos
    for args, said in (
        (("search", out), "name one of --id, --image and --vector"),
        (("search", out, "--id", "a", "--image", "b"), "name one of"),
        (("search", out, "--id", "one/photo_99"), "similar ids in shard one are one/photo_9"),
        (("search", out, "--id", "one/photo_3", "--sheet", tmp_path / "x.png"), "name it with --input"),
        (("search", out, "--id", "one/photo_3", "--weights", "random:0"), "only --image is embedded"),
        (("search", out, "--image", tmp_path / "none.jpg"), "cannot be read"),
        (("search", tmp_path / "none", "--id", "a"), "holds no output of ours"),
        (("index", out, "--kind", "hnsw"), "--kind hnsw"),
        (("index", out, "--recall", 2), "--recall 2.0"),
        (("index", out, "--version", 9), "has no version 9"),
        (("near-duplicates", out, "--above", 2), "--above 2.0"),
        (("near-duplicates", out, "--parquet", tmp_path / "no" / "x.parquet"), "there is no folder"),
    ):
        code, _, told = call(*args)
        assert code == 2 and said in told, (args, told)


def test_a_recall_that_is_not_reached_ends_with_3(tmp_path: Path) -> None:
    """And with JSON that says so; `status` tells that there is no index."""
    root = Root(str(tmp_path))
    noise = np.random.default_rng(7).standard_normal((3000, 96)).astype(np.float32)
    planted.commit(root, {"a": noise})
    code, printed, told = call("index", tmp_path, "--kind", "ivf", "--recall", 1, "--json")
    assert code == 3 and "no index was made" in told
    assert json.loads(printed)["exit_code"] == 3
    assert json.loads(call("status", tmp_path, "--json")[1])["index"] is None
    assert call("index", tmp_path, "--kind", "flat", "--recall", 1)[0] == 0
    assert json.loads(call("status", tmp_path, "--json")[1])["index"]["kind"] == "flat"
    stored = stored_index.index_of(root, versions.current(root))
    assert stored is not None and stored.recall_at_10 == 1.0
