"""The whole run on a local Ray: committed, resumable, incremental, gated."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from containers import write_folder, write_parquet, write_tar
from pictures import jpeg
from test_weights import save_local_dir

from pipeline import readers, site, versions
from pipeline.columns import Columns
from pipeline.config import RunConfig
from pipeline.embed import STAGES
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.progress import is_alive, read_notes
from pipeline.run import COMMITTED, FAILED, REFUSED, STALLED, Result, embed
from pipeline.shards import read_samples
from pipeline.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")


def config(inputs: Path, output: Path, **changes: object) -> RunConfig:
    asked = RunConfig(
        inputs=(str(inputs),),
        output=str(output),
        model="test_vit",
        weights="random:0",
        precision="fp32",
        decode="exact",
        batch_size=4,
        max_reject_rate=0.2,
        actors=(1, 1),
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def run(asked: RunConfig) -> Result:
    return embed(asked, lambda line: None)


def rows(output: Path) -> dict[str, dict]:
    return {row["id"]: row for row in readers.open_dataset(str(output)).to_table().to_pylist()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, shards: Path, ray_session: None) -> tuple[Path, Result]:
    """One run over the shared shards."""
    output = tmp_path_factory.mktemp("done") / "out"
    return output, run(config(shards, output))


def test_a_run_commits_every_sample_once(done: tuple[Path, Result], shards: Path) -> None:
    """The result counts add up, verify is clean against the input, and vectors are timm's."""
    output, result = done
    told = result.json
    assert result.exit_code == COMMITTED
    assert (told["version"], told["shards"], told["shards_embedded"], told["shards_unchanged"]) == (1, 3, 3, 0)
    assert (told["samples"], told["rows"], told["rejects"]) == (24, 21, oracle.REJECTS)
    assert told["images_per_s"] > 0 and told["limited_by"] in (*STAGES, "waiting")
    assert told["images_per_s"] == pytest.approx(told["of_ceiling"] * told["ceiling_images_per_s"], rel=0.01)
    assert told["stage_seconds"].keys() == told["stage_busy"].keys() == told["cpu_seconds"].keys() == set(STAGES)
    assert all(told["stage_seconds"][stage] > 0 for stage in STAGES) and told["device_busy"] is None
    (note,) = read_notes(Root(str(output)))
    assert note.result == told and told["speed"] in result.message
    assert 0 <= told["top1"] <= told["top5"] <= 1
    root = Root(str(output))
    assert verify(root, versions.current(root), list_shards([str(shards)])).clean
    images = oracle.images_by_id(shards)
    want = oracle.expected("test_vit", list(images.values()))
    found = rows(output)
    got = np.array([found[i]["embedding"] for i in images])
    assert oracle.relative(got, want.embedding) < 1e-5


def test_the_same_command_embeds_nothing(done: tuple[Path, Result], shards: Path) -> None:
    """Finished shards are recognised by name, not by content: with zeros in their place the run ends the same."""
    output, first = done
    tars = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.rglob("*.tar*")}
    try:
        for path, (content, mtime) in tars.items():
            path.write_bytes(bytes(len(content)))
            os.utime(path, ns=(mtime, mtime))
        result = run(config(shards, output))
    finally:
        for path, (content, mtime) in tars.items():
            path.write_bytes(content)
            os.utime(path, ns=(mtime, mtime))
    assert (result.exit_code, result.json["version"], result.json["shards_embedded"]) == (COMMITTED, 1, 0)
    assert result.json["shards_unchanged"] == 3 and result.json["limited_by"] == "nothing to do"
    for key in ("samples", "rows", "rejects", "top1", "top5"):
        assert result.json[key] == first.json[key]


def test_a_dry_run_writes_nothing(shards: Path, tmp_path: Path) -> None:
    """It says what would be embedded, and the output is not even created."""
    result = run(config(shards, tmp_path / "out", dry_run=True))
    assert result.json["shards_to_embed"] == 3 and result.json["to_embed"][0].startswith(("a/", "three"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_another_one_overtook_brings_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another set was committed meanwhile, both become versions; where the input has changed too, that stays.

    Its listing is older than the other's: the same command, which lists again, goes on from there.
    """
    from pipeline import run as run_module

    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg()})
    root, gate, asked = Root(str(tmp_path / "out")), run_module._gate, config(tmp_path / "in", tmp_path / "out")
    first = run(asked).json

    def overtaken_by(change: Callable[[], object]) -> Result:
        """The run, where at its gate another driver commits after `change`."""

        def meanwhile(*args: object) -> None:
            change()
            versions.commit(root, f"another@{len(versions.numbers(root))}", [])
            gate(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_gate", meanwhile)
            return run(asked)

    both = overtaken_by(lambda: None)
    assert (both.exit_code, both.json["version"], versions.current(root).set) == (COMMITTED, 3, first["set"])
    late = overtaken_by(lambda: write_tar(tmp_path / "in" / "x.tar", {"b.jpg": jpeg()}))
    assert late.exit_code == FAILED and versions.numbers(root)[-1] == 4
    assert "the input has changed, and version 4 was committed meanwhile; run the same" in late.message
    (tmp_path / "in" / "x.tar").unlink()
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg()})
    gone = overtaken_by((tmp_path / "in" / "x.tar").unlink)
    assert gone.exit_code == FAILED and "the input cannot be listed again" in gone.message


def test_only_what_changed_is_embedded(done: tuple[Path, Result], shards: Path, tmp_path: Path) -> None:
    """A changed, a new and a deleted shard: two are embedded, one is removed, the rest costs a listing entry."""
    work, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(shards, work)  # with their times, which are a part of their etags
    shutil.copytree(done[0], output)
    before = {f.shard: f.embeddings for f in versions.read_list(Root(str(output)), versions.current(Root(str(output))))}
    write_tar(work / "a" / "two.tar", {"x.jpg": jpeg(seed=5)})
    write_tar(work / "new.tar", {"y.jpg": jpeg(seed=6)})
    (work / "three.tar.gz").unlink()
    told = run(config(work, output)).json
    assert (told["version"], told["shards_embedded"], told["shards_unchanged"], told["removed"]) == (2, 2, 1, ["three"])
    after = {f.shard: f.embeddings for f in versions.read_list(Root(str(output)), versions.current(Root(str(output))))}
    assert after.keys() == {"a/one", "a/two", "new"} and after["a/one"] == before["a/one"]
    assert {i for i in rows(output) if not i.startswith("a/one/")} == {"a/two/x", "new/y"}


def test_actors_and_resuming_change_no_bit(done: tuple[Path, Result], shards: Path, tmp_path: Path) -> None:
    """Two actors instead of one, and a run that found one shard done, give the very same rows."""
    threads = torch.get_num_threads()
    output, _ = done
    two = run(config(shards, tmp_path / "out", actors=(2, 2)))
    assert two.exit_code == COMMITTED
    root = Root(str(tmp_path / "out"))
    embedded = versions.read_list(root, versions.current(root))[0].embeddings
    assert rows(tmp_path / "out") == rows(output)
    shutil.rmtree(tmp_path / "out" / "versions")
    (tmp_path / "out" / embedded).unlink()
    again = run(config(shards, tmp_path / "out"))
    assert (again.json["shards_embedded"], again.json["shards_unchanged"]) == (1, 2)
    assert rows(tmp_path / "out") == rows(output)
    assert torch.get_num_threads() == threads


def test_too_many_rejects_commit_no_version(done: tuple[Path, Result], shards: Path, tmp_path: Path) -> None:
    """Exit 3 names the reasons; with a higher limit the same command commits at once, embedding nothing."""
    shutil.copytree(done[0] / "sets", tmp_path / "out" / "sets")
    refused = run(config(shards, tmp_path / "out", max_reject_rate=0.1))
    assert refused.exit_code == REFUSED and "3 of 24 samples were rejected" in refused.message
    assert refused.json["version"] is None and refused.json["rejects"] == oracle.REJECTS
    assert versions.numbers(Root(str(tmp_path / "out"))) == []
    accepted = run(config(shards, tmp_path / "out", max_reject_rate=0.2))
    assert (accepted.exit_code, accepted.json["shards_embedded"], accepted.json["version"]) == (COMMITTED, 0, 1)


def test_a_shard_that_cannot_be_read_fails_the_run_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    """The other shards are finished; exit 1; once the store is well the same command does the rest."""
    for name in ("good", "bad"):
        write_tar(tmp_path / "in" / f"{name}.tar", {f"{i}.jpg": jpeg(seed=i) for i in range(3)})
    from pipeline import run as run_module

    def listing(*args: object, **options: object) -> list:
        found = list_shards(*args, **options)  # type: ignore[arg-type]
        (tmp_path / "in" / "bad.tar").rename(tmp_path / "away")
        return found

    monkeypatch.setattr(run_module, "list_shards", listing)
    failed = run(config(tmp_path / "in", tmp_path / "out"))
    assert failed.exit_code == FAILED and "1 of 2 shards failed" in failed.message and "bad.tar" in failed.message
    assert failed.json["failed"][0]["shard"] == "bad" and failed.json["version"] is None
    monkeypatch.undo()
    (tmp_path / "away").rename(tmp_path / "in" / "bad.tar")
    again = run(config(tmp_path / "in", tmp_path / "out"))
    assert (again.exit_code, again.json["shards_embedded"], again.json["rows"]) == (COMMITTED, 1, 6)


def test_a_node_that_cannot_tell_what_it_can_do_is_told(tmp_path: Path) -> None:
    """In a sentence with the reason, as where its disk is full."""

    def ask() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"^a node could not tell what it can do: OSError: .*No space left on device"):
        site._anywhere(ask, "cpu", config(tmp_path, tmp_path), lambda line: None)


def test_a_run_that_stands_still_ends_and_names_the_stage(tmp_path: Path) -> None:
    """A source that hangs (here: a server that takes calls and never answers) ends with 4, naming stage and shard."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.jpg"
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table({"url": [url]}), tmp_path / "in" / "y.parquet")
        allowed = Columns(allow_urls=(url,))
        stalled = run(config(tmp_path / "in" / "y.parquet", tmp_path / "out", stall_timeout_s=20.0, columns=allowed))
    assert stalled.exit_code == STALLED
    assert "no progress for 20 s in stage fetch of y" in stalled.message


def test_other_inputs(tmp_path: Path) -> None:
    """Parquet of bytes, of {bytes, path}, of URLs, and folders give the vectors of the same images; all in one run."""
    images = {f"p{i}.jpg": jpeg(70 + i, 60, seed=i) for i in range(5)}
    keys, content = list(images), list(images.values())
    write_parquet(tmp_path / "in" / "bytes.parquet", content, key=keys, label=list(range(5)))
    struct = pa.array([{"bytes": b, "path": k} for k, b in images.items()])
    pq.write_table(pa.table({"image": struct, "key": keys}), tmp_path / "in" / "face.parquet")
    write_folder(tmp_path / "store", images)
    urls = [*(str(tmp_path / "store" / k) for k in keys), str(tmp_path / "store" / "gone.jpg")]
    pq.write_table(pa.table({"url": urls, "key": [*keys, "gone"]}), tmp_path / "in" / "urls.parquet")
    write_folder(tmp_path / "images", images)
    asked = config(tmp_path / "in", tmp_path / "out", columns=Columns(allow_urls=(str(tmp_path / "store"),)))
    result = run(replace(asked, inputs=(*asked.inputs, str(tmp_path / "images"))))
    assert result.exit_code == COMMITTED and result.json["rows"] == 20
    assert result.json["rejects"] == {"fetch_failed": 1} and "top1" in result.json
    found = rows(tmp_path / "out")
    want = oracle.expected("test_vit", content).embedding
    for shard in ("in/bytes", "in/face", "in/urls", "images/slice-00000000"):
        got = {i: row for i, row in found.items() if i.startswith(f"{shard}/")}
        assert list(got) == [f"{shard}/{k}" for k in keys]
        assert oracle.relative(np.array([r["embedding"] for r in got.values()]), want) < 1e-5
        assert {r["label"] for r in got.values()} == (set(range(5)) if shard == "in/bytes" else {None})


def test_labels_and_weights_of_ones_own(tmp_path: Path) -> None:
    """--labels: the names in the file. set.json says what made the vectors; where that came from stands nowhere."""
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg()})
    (tmp_path / "names.txt").write_text("".join(f"thing {i}\n" for i in range(1000)))
    torch.save(oracle.module("test_vit", 1).state_dict(), tmp_path / "secret-token.pth")
    asked = config(tmp_path / "in", tmp_path / "out", labels=str(tmp_path / "names.txt"), top_k=3)
    told = run(replace(asked, weights=str(tmp_path / "secret-token.pth"))).json
    (row,) = rows(tmp_path / "out").values()
    assert row["topk_label"] == [f"thing {i}" for i in row["topk_index"]] and len(row["topk_index"]) == 3
    described = json.loads((tmp_path / "out" / "sets" / told["set"] / "set.json").read_text())
    assert described["set"] == told["set"] and described["precision"] == "fp32" and described["dim"] == 64
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"secret-token" not in path.read_bytes()


def test_a_model_without_classes_and_a_shard_without_samples(tmp_path: Path) -> None:
    """No classifier: no class columns. A tar of no samples is a file of no rows, and is not opened again."""
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg()})
    write_tar(tmp_path / "in" / "empty.tar", {})
    asked = config(tmp_path / "in", tmp_path / "out", model="eva02_tiny_patch14_224")
    first, second = run(asked), run(asked)
    assert first.exit_code == second.exit_code == COMMITTED
    assert (first.json["shards"], first.json["rows"], second.json["shards_unchanged"]) == (2, 1, 2)
    (row,) = rows(tmp_path / "out").values()
    assert len(row["embedding"]) == 192 and "topk_index" not in row


def top_hits(shards: Path) -> tuple[int, int, int]:
    """(labelled, first, among five) of the shared shards, by timm in a plain loop."""
    images = oracle.images_by_id(shards)
    labels = {f"{s.name}/{x.id_key}": x.label for s in list_shards([str(shards)]) for x in read_samples(s)}
    order = np.argsort(-oracle.expected("test_vit", list(images.values())).scores, axis=1, kind="stable")[:, :5]
    hits = [(o.tolist(), labels[i]) for o, i in zip(order, images, strict=True) if labels[i] is not None]
    return len(hits), sum(o[0] == label for o, label in hits), sum(label in o for o, label in hits)


def test_metrics_without_vectors(shards: Path, tmp_path: Path) -> None:
    """Accuracy against the shards' labels, as timm's plain loop has it; rows keep classes and labels, no embedding.

    Beside vectors, metrics make no version: readers keep what they had.
    """
    work = tmp_path / "in"
    shutil.copytree(shards, work)
    best = np.argsort(-oracle.expected("test_vit", [jpeg(seed=9)]).scores[0])
    likely = {f"{i}.{kind}": data for i in range(4) for kind, data in (("jpg", jpeg(seed=9)), ("cls", b"%d" % best[i]))}
    write_tar(work / "likely.tar", likely | {"4.jpg": jpeg(seed=9), "4.cls": b"-1"})
    result = run(config(work, tmp_path / "metrics", only_metrics=True))
    labelled, first, five = top_hits(shards)
    assert (result.exit_code, result.json["version"], result.json["labelled"]) == (COMMITTED, 1, labelled + 4)
    assert result.json["top1"] == pytest.approx((first + 1) / (labelled + 4))
    assert result.json["top5"] == pytest.approx((five + 4) / (labelled + 4))
    assert read_notes(Root(str(tmp_path / "metrics")))[0].result["top1"] == result.json["top1"]
    row = next(iter(rows(tmp_path / "metrics").values()))
    assert "embedding" not in row and len(row["topk_index"]) == 5 and row["norm"] > 0
    root = Root(str(tmp_path / "metrics"))
    assert verify(root, versions.current(root), list_shards([str(work)])).clean
    vectors = run(config(work, tmp_path / "metrics")).json
    assert vectors["version"] == 2 and vectors["set"] != result.json["set"] and vectors["top1"] == result.json["top1"]
    again = run(config(work, tmp_path / "metrics", only_metrics=True))
    assert (again.exit_code, again.json["version"], again.json["top1"]) == (COMMITTED, None, result.json["top1"])
    assert versions.current(root).set == vectors["set"]


def test_classes_of_ones_own(tmp_path: Path) -> None:
    """A folder that timm saved: its seven classes, its names, all seven where ten were asked for."""
    write_tar(tmp_path / "in" / "x.tar", {"a.jpg": jpeg(), "a.cls": b"3"})
    name = f"local-dir:{save_local_dir(tmp_path / 'm', 7, 7)}"
    result = run(config(tmp_path / "in", tmp_path / "out", model=name, weights="pretrained", top_k=10))
    assert result.exit_code == COMMITTED and result.json["top5"] in (0.0, 1.0)
    (row,) = rows(tmp_path / "out").values()
    assert sorted(row["topk_index"]) == list(range(7)) and sum(row["topk_score"]) == pytest.approx(1)
    assert row["topk_label"] == [f"n{i}" for i in row["topk_index"]]
    metadata = pq.read_schema(readers.files(str(tmp_path / "out"))[0]).metadata
    assert metadata[b"shard2vec.labels"] == b"model"


def test_the_run_leaves_a_note(done: tuple[Path, Result]) -> None:
    """`status` knows how the last run ended, and that it is over."""
    note = read_notes(Root(str(done[0])))[0]
    assert (note.state, note.shards, note.shards_done, note.images, note.rejects) == ("committed", 3, 3, 21, 3)
    assert not is_alive(note)
