"""The inner pipeline: every sample once, in order, whatever goes wrong around it."""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_parquet, write_tar
from pictures import jpeg

from pipeline import feed as feed_module
from pipeline.columns import Columns
from pipeline.embed import Receipt
from pipeline.feed import Fed
from pipeline.flow import ByteBudget, Flow
from pipeline.listing import Shard, list_shards
from pipeline.output import Root
from pipeline.readers import open_dataset
from pipeline.shards import read_samples
from pipeline.versions import file_name, published


def rows(receipts: list[Receipt], output: Path, columns: list[str] | None = None) -> dict[str, dict]:
    tables = [pq.read_table(output / r.files.embeddings, columns=columns).to_pylist() for r in receipts if r.files]
    return {row["id"]: row for table in tables for row in table}


@pytest.mark.by_model
@pytest.mark.parametrize("model", [*(m for m in oracle.SEEDS if m not in oracle.ON_RAY), *oracle.OTHERS])
def test_every_layout_and_head_ends_in_the_right_row(model: str, tmp_path: Path) -> None:
    """Seeds and other families: embedding, scores and tokens in the files are timm's own calls'; others' maps too."""
    images = list(oracle.good_images().values())[:2]
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": image for i, image in enumerate(images)})
    classes, has_maps = "eva02" not in model, model in oracle.OTHERS  # the seeds' maps: test_features.py
    outputs = ("embedding", *["classes"] * classes, "tokens", *["features"] * has_maps)
    job = made.job(tmp_path / "out", model=model, outputs=outputs, indices=(2, 0), top_k=5 * classes)
    (receipt,) = made.embed(job, tmp_path / "in")
    want = oracle.expected(model, images, maps=has_maps)
    tables = {kind: pq.read_table(tmp_path / "out" / name) for kind, name in receipt.files.names.items()}
    assert oracle.relative(np.array(tables["embeddings"]["embedding"].to_pylist()), want.embedding) < 1e-5
    beside = [("tokens", "tokens", want.tokens), *(("features", f"feature_{i}", m) for i, m in enumerate(want.maps))]
    assert len(beside) == 1 + 2 * has_maps
    for kind, column, values in beside:
        got = tables[kind][column].combine_chunks().flatten().to_numpy().astype(np.float32).reshape(len(values), -1)
        (of,) = (t for t in job.vectors.tensors if t.column == column)
        if kind == "features" and of.layouts == ("NHWC",):  # the oracle's are NCHW
            got = got.reshape(-1, *of.shapes[0]).transpose(0, 3, 1, 2).reshape(len(values), -1)
        assert oracle.relative(got, values) < 1e-3, column
    if classes:
        order = np.argsort(-want.scores, axis=1, kind="stable")[:, :5]
        assert tables["embeddings"]["topk_index"].to_pylist() == order.tolist()


def test_every_sample_is_a_row_or_a_reject(shards: Path, tmp_path: Path) -> None:
    """Rows carry timm's vectors, labels and sizes; each broken sample is one reject with its reason."""
    receipts = made.embed(made.job(tmp_path), shards)
    assert [r.error for r in receipts] == [None] * 3 and all(r.embedded for r in receipts)
    found = rows(receipts, tmp_path)
    images = oracle.images_by_id(shards)
    assert found.keys() == images.keys()
    want = oracle.expected(made.MODEL, list(images.values()))
    for i, name in enumerate(images):
        row = found[name]
        assert oracle.relative(np.array(row["embedding"]), want.embedding[i]) < 1e-5
        assert row["topk_index"] == np.argsort(-want.scores[i], kind="stable")[:5].tolist()
        assert row["topk_score"] == pytest.approx(want.scores[i][row["topk_index"]], rel=1e-5)
        assert row["norm"] == pytest.approx(np.linalg.norm(want.embedding[i]), rel=1e-5)
        assert row["id"] == f"{row['shard']}/{row['key']}"
    assert (found["a/two/turned"]["width"], found["a/two/turned"]["height"]) == (60, 90)
    assert found["a/one/photo_1"]["label"] == 7
    rejects = [row for r in receipts for row in pq.read_table(tmp_path / r.files.rejects).to_pylist()]
    assert {(r["key"], r["reason"]) for r in rejects} == {
        ("cut", "truncated"),
        ("html", "corrupt"),
        ("nothing", "missing_image"),
    }
    totals = [r.files.counts for r in receipts]
    assert sum(c.samples for c in totals) == oracle.SAMPLES == sum(c.rows + c.rejected for c in totals)
    positions = [(r["shard"], r["row"]) for r in [*found.values(), *rejects]]
    assert len(set(positions)) == oracle.SAMPLES


def test_batch_size_and_order_of_shards_change_no_bit_of_a_row(shards: Path, tmp_path: Path) -> None:
    """Whatever ran before in the same process, and in whatever order, a shard's rows are the same."""
    listed = list_shards([str(shards)])
    one = made.embed(made.job(tmp_path / "a"), listed)
    other = made.embed(made.job(tmp_path / "b"), listed[::-1])
    assert rows(one, tmp_path / "a") == rows(other, tmp_path / "b")
    single = rows(made.embed(made.job(tmp_path / "c", batch_size=1), listed), tmp_path / "c")
    for name, row in rows(one, tmp_path / "a").items():
        assert np.allclose(row["embedding"], single[name]["embedding"], rtol=1e-5, atol=1e-6)
        assert row["topk_index"] == single[name]["topk_index"]


def test_an_embedder_is_used_again_and_finds_its_own_work(shards: Path, tmp_path: Path) -> None:
    """A second call on the same shards embeds nothing and gives receipts of the files that are there."""
    listed = list_shards([str(shards)])
    embedder = made.embedder(made.job(tmp_path))
    first, second = made.receipts(embedder, listed), made.receipts(embedder, listed)
    assert [r.files for r in first] == [r.files for r in second]
    assert not any(r.embedded for r in second)


def test_normalised_float16_vectors(shards: Path, tmp_path: Path) -> None:
    """--normalize gives unit vectors and keeps the norm from before; --vector-type float16 stores halves."""
    plain = rows(made.embed(made.job(tmp_path / "a"), shards), tmp_path / "a")
    unit = rows(made.embed(made.job(tmp_path / "b", normalized=True, vector_type="float16"), shards), tmp_path / "b")
    for name, row in plain.items():
        vector = np.array(row["embedding"])
        assert np.allclose(unit[name]["embedding"], vector / np.linalg.norm(vector), atol=1e-3)
        assert unit[name]["norm"] == row["norm"]


def test_a_shard_that_changed_under_the_reader_is_not_published(tmp_path: Path) -> None:
    """What was read may be half old and half new: the shard is left, with a sentence, the next one is not."""
    changing = write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": jpeg(seed=i) for i in range(6)})
    write_tar(tmp_path / "in" / "y.tar", {"a.jpg": jpeg()})
    listed = list_shards([str(tmp_path / "in")])
    changing.write_bytes(changing.read_bytes() + b"\0" * 512)
    x, y = made.embed(made.job(tmp_path / "out"), listed)
    assert x.files is None and "changed while it was read" in x.error
    assert y.files is not None
    assert not list((tmp_path / "out" / ".tmp").iterdir())
    assert published(Root(str(tmp_path / "out")), made.vector_set().folder, listed[0]) is None


def test_a_vanished_shard_fails_alone(tmp_path: Path) -> None:
    """A store's error costs one shard its turn, and says which."""
    for name in ("x", "y"):
        write_tar(tmp_path / "in" / f"{name}.tar", {"a.jpg": jpeg()})
    listed = list_shards([str(tmp_path / "in")])
    (tmp_path / "in" / "x.tar").unlink()
    x, y = made.embed(made.job(tmp_path / "out"), listed)
    assert x.files is None and "x.tar" in x.error
    assert y.files is not None and y.files.counts.rows == 1


def test_a_model_that_gives_nan_fails_its_shard(tmp_path: Path) -> None:
    """A vector that is not finite is never a row: the shard is left, and the message names image and way out."""
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg(), "b.jpg": jpeg(seed=2)})
    embedder = made.embedder(made.job(tmp_path / "out"))
    with torch.no_grad():
        next(embedder.backbone._module.parameters()).fill_(float("nan"))
    (receipt,) = made.receipts(embedder, list_shards([str(tmp_path / "in")]))
    assert receipt.files is None
    assert "x/a" in receipt.error and "--precision fp32" in receipt.error


def test_our_own_defect_is_raised_and_leaves_nothing(tmp_path: Path, shards: Path) -> None:
    """An error of the model itself ends the call, with its threads and temporary files."""
    embedder = made.embedder(made.job(tmp_path))
    embedder.backbone._module.forward_features = lambda x: 1 / 0
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        made.receipts(embedder, list_shards([str(shards)]))
    assert threading.active_count() == before
    assert not list((tmp_path / ".tmp").iterdir())


def test_a_receipt_comes_before_the_next_shard_is_done(tmp_path: Path) -> None:
    """Receipts stream: the first is there while a later shard is still to be read."""
    for name in "abcdefgh":
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{i}.jpg": jpeg(seed=i) for i in range(9)})
    there: dict[str, int] = {}

    def done(receipt: Receipt) -> None:
        there[receipt.shard] = len(list((tmp_path / "out").rglob("embeddings/*.parquet")))

    made.embedder(made.job(tmp_path / "out", batch_size=2))(list_shards([str(tmp_path / "in")]), done)
    assert list(there) == list("abcdefgh") and there["a"] < 8


def test_there_may_be_no_shard_for_now(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedder asks again; meanwhile what it has is finished, and an error of its own still ends it."""
    monkeypatch.setattr("pipeline.feed.NOTHING_S", 0.01)
    listed, seen = list_shards([str(shards)]), list[str]()

    def hesitant() -> Iterator[Shard | None]:
        for shard in listed:
            yield shard
            while shard.name not in seen:
                yield None

    made.embedder(made.job(tmp_path))(hesitant(), lambda receipt: seen.append(receipt.shard))
    assert seen == [s.name for s in listed]
    broken = made.embedder(made.job(tmp_path / "other"))
    broken.backbone._module.forward_features = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken(itertools.chain(listed[:1], itertools.repeat(None)), seen.append)  # type: ignore[arg-type]


def test_shards_that_come_interleaved_are_the_same_files(tmp_path: Path, shards: Path) -> None:
    """A feed may have several shards under way: each keeps its own order, batches and rows, to the bit."""
    listed = list_shards([str(shards)])
    want = rows(made.embed(made.job(tmp_path / "a"), listed), tmp_path / "a")
    embedder = made.embedder(made.job(tmp_path / "b"))
    feed = embedder._feed

    def interleaved(
        shards: Iterable[Shard | None], flow: Flow, at: Callable[[str, str], None]
    ) -> Generator[Fed, None, None]:
        fed = list(feed(shards, flow, at))
        parts = [[f for f in fed if f.shard.name == s.name] for s in listed]
        yield from (f for several in itertools.zip_longest(*parts) for f in several if f is not None)

    embedder._feed = interleaved
    assert rows(made.receipts(embedder, listed), tmp_path / "b") == want


def test_two_writers_of_one_shard_publish_it_once(tmp_path: Path, shards: Path) -> None:
    """Racing processes leave one file of a kind; the loser's receipt tells of the winner's."""
    listed = list_shards([str(shards)])
    results: list[list[Receipt]] = []
    threads = [
        threading.Thread(target=lambda: results.append(made.embed(made.job(tmp_path), listed))) for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [r.files for r in results[0]] == [r.files for r in results[1]] == [r.files for r in results[2]]
    assert len(list(tmp_path.rglob("embeddings/**/*.parquet"))) == 3
    for i in range(3):
        assert sum(result[i].embedded for result in results) == 1


def test_rejects_of_an_unfinished_attempt_are_not_mixed_with_ours(tmp_path: Path) -> None:
    """Where an attempt died after its rejects, and they differ from ours, the embeddings file names its own."""
    (tmp_path / "image.jpg").write_bytes(jpeg())
    write_parquet(tmp_path / "in" / "x.parquet", [], url=[])
    import pyarrow as pa

    pq.write_table(
        pa.table({"url": [str(tmp_path / "image.jpg"), str(tmp_path / "late.jpg")]}), tmp_path / "in/x.parquet"
    )
    listed = list_shards([str(tmp_path / "in")], columns=Columns(allow_urls=(str(tmp_path),)))
    job = made.job(tmp_path / "out")
    (died,) = made.embed(job, listed)
    assert died.files.counts.rejects == {"fetch_failed": 1}
    (tmp_path / "out" / died.files.embeddings).unlink()
    (tmp_path / "late.jpg").write_bytes(jpeg(seed=3))
    (again,) = made.embed(job, listed)
    assert (again.files.counts.rows, again.files.counts.rejected) == (2, 0)
    assert again.files.rejects != file_name(job.vectors.folder, "rejects", "x", listed[0].etag) == died.files.rejects
    assert pq.read_table(tmp_path / "out" / again.files.rejects).num_rows == 0


def test_a_killed_attempts_rejects_are_used_when_they_are_the_same(tmp_path: Path, shards: Path) -> None:
    """The usual case: the same shard gives the same rejects, and nothing is written twice."""
    listed = list_shards([str(shards)])
    job = made.job(tmp_path)
    first = made.embed(job, listed)
    for receipt in first:
        (tmp_path / receipt.files.embeddings).unlink()
    assert [r.files.rejects for r in made.embed(job, listed)] == [r.files.rejects for r in first]


def test_images_under_way_are_bounded_in_bytes() -> None:
    """The reader waits while too much is in memory; one image larger than the limit passes alone."""
    budget, flow, passed = ByteBudget(100), Flow(), threading.Event()
    budget.take(80, flow)
    thread = threading.Thread(target=lambda: (budget.take(300, flow), passed.set()))
    thread.start()
    time.sleep(0.3)
    assert not passed.is_set()
    budget.give(80)
    thread.join(5)
    assert passed.is_set()


def test_the_reader_does_not_run_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the device is busy, at most the lookahead is read ahead, however long the shard is."""
    write_tar(tmp_path / "in" / "x.tar", {f"{i}.jpg": jpeg(32, 32, seed=i % 3) for i in range(200)})
    read = []
    monkeypatch.setattr(
        feed_module, "read_samples", lambda shard: (read.append(s.row) or s for s in read_samples(shard))
    )
    embedder = made.embedder(made.job(tmp_path / "out", batch_size=4))
    seen = []
    original = embedder.backbone._module.forward_features
    embedder.backbone._module.forward_features = lambda x: seen.append(len(read)) or time.sleep(0.02) or original(x)
    made.receipts(embedder, list_shards([str(tmp_path / "in")]))
    ahead = [n - 4 * i for i, n in enumerate(seen)]
    handful = embedder._feed._handful  # one is being read and one unpacked
    assert handful == 2 and max(ahead) <= 4 + 4 * feed_module.LOOKAHEAD_BATCHES + 2 * handful


def device_feed(monkeypatch: pytest.MonkeyPatch, limit: int) -> tuple[feed_module.LocalFeed, list[ByteBudget]]:
    """A feed whose JPEGs stay encoded, with so many bytes of them; its budgets, a call each."""
    budgets: list[ByteBudget] = []
    monkeypatch.setattr(feed_module, "LOOKAHEAD_BYTES", limit)
    monkeypatch.setattr(feed_module, "HANDFUL_BYTES", 2 * limit // 5)
    monkeypatch.setattr(feed_module, "ByteBudget", lambda limit: budgets.append(ByteBudget(limit)) or budgets[-1])
    return feed_module.LocalFeed(made.vector_set(decode="cuda"), 2, batch_size=64), budgets


def test_images_for_the_device_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded, they count until they are handed over: large ones do not fill the memory while the device is busy."""
    image = jpeg(400, 300, quality=95)
    write_tar(tmp_path / "in" / "x.tar", {f"{i:02d}.jpg": image for i in range(40)})
    feed, budgets = device_feed(monkeypatch, 5 * len(image))
    held = []
    for _, sample, _ in feed(list_shards([str(tmp_path / "in")]), Flow(), lambda stage, shard: None):
        time.sleep(0.005 if sample else 0)
        held.append(budgets[0]._taken)
    # Two handfuls of two, for a third one would be too much.
    assert len(held) == 41 and max(held) == 4 * len(image) and budgets[0]._taken == 0


def test_a_shard_that_fails_gives_its_bytes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of images that nobody takes any more, too: the next shard is read."""
    image, last = jpeg(400, 300, quality=95), jpeg(400, 300, seed=1)
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": last} | {f"{i:02d}.jpg": image for i in range(40)})
    write_tar(tmp_path / "in" / "y.tar", {"a.jpg": image})
    feed, budgets = device_feed(monkeypatch, 100 * len(image))
    decode = feed._decoder

    def fails(data: bytes) -> object:
        if data == last:
            raise OSError("simulated")
        return decode(data)

    feed._decoder = fails  # type: ignore[assignment]
    fed = list(feed(list_shards([str(tmp_path / "in")]), Flow(), lambda stage, shard: None))
    assert [what.error if sample is None else sample.key for _, sample, what in fed] == ["decode: simulated", "a", None]
    assert budgets[0]._taken == 0


def test_several_epochs_of_a_job_read_back_as_one_dataset(tmp_path: Path, shards: Path) -> None:
    """A version made of these files opens as a dataset with every id once."""
    from pipeline.versions import commit

    receipts = made.embed(made.job(tmp_path), shards)
    commit(Root(str(tmp_path)), made.vector_set().name, [r.files for r in receipts])
    ids = open_dataset(str(tmp_path)).to_table(columns=["id"])["id"].to_pylist()
    assert sorted(ids) == sorted(oracle.images_by_id(shards))


def test_labels_are_counted_as_hits(tmp_path: Path) -> None:
    """top1 and top5 count rows whose .cls is the class predicted first, or among five."""
    image = jpeg(seed=4)
    best = np.argsort(-oracle.expected(made.MODEL, [image]).scores[0], kind="stable")
    members = {}
    for i, label in enumerate((best[0], best[3], best[700])):
        members |= {f"{i}.jpg": image, f"{i}.cls": str(label).encode()}
    write_tar(tmp_path / "in" / "x.tar", members | {"9.jpg": image})
    (receipt,) = made.embed(made.job(tmp_path / "out", top_k=2), tmp_path / "in")
    counts = receipt.files.counts
    assert (counts.rows, counts.labelled, counts.top1, counts.top5) == (4, 3, 1, 2)


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """A shard of 1,200 images needs no more memory than one of 200, but for rows that wait for their row group."""
    for n in (200, 1200):
        write_tar(tmp_path / f"in{n}" / "x.tar", {f"{i:05d}.jpg": jpeg(64, 64, seed=i % 5) for i in range(n)})
    code = """
import sys, resource
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import made
for n in (200, 1200):
    made.embed(made.job(f"{sys.argv[1]}/out{n}", batch_size=8), Path(sys.argv[1], f"in{n}"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, tmp_path, here, here.parent]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    few, many = map(int, out.stdout.split())
    assert many - few < 60_000, f"peaks of {few} and {many} kB"


def test_a_shard_that_took_a_worker_down_has_the_same_files(tmp_path: Path, shards: Path) -> None:
    """Its images are decoded in processes apart, call after call; after too many deaths it is left, and says why."""
    plain, apart = made.job(tmp_path / "a"), made.job(tmp_path / "b")
    want = rows(made.embed(plain, shards), tmp_path / "a")
    deaths = {"a/one": 1, "a/two": feed_module.MAX_DEATHS - 1, "three": feed_module.MAX_DEATHS}
    embedder = made.embedder(apart, deaths=lambda shard: deaths[shard])
    one, two, three = (r for shard in list_shards([str(shards)]) for r in made.receipts(embedder, [shard]))
    assert rows([one, two], tmp_path / "b") == {i: row for i, row in want.items() if not i.startswith("three/")}
    assert three.files is None and "8 workers died with this shard under way" in (three.error or "")


def test_another_set_in_one_output_is_another_folder(tmp_path: Path, shards: Path) -> None:
    """Vectors of two configurations never share a file."""
    first = made.embed(made.job(tmp_path), shards)
    second = made.embed(replace(made.job(tmp_path), vectors=made.vector_set(normalized=True)), shards)
    assert not {r.files.embeddings for r in first} & {r.files.embeddings for r in second}
