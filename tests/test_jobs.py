"""The command line: exit codes, one sentence for each mistake, JSON last on stdout."""

import io
import json
import time
from dataclasses import asdict
from pathlib import Path

import made
import numpy as np
import oracle
import pytest
import safetensors.torch
import timm
import torch
from containers import write_parquet, write_tar
from pictures import jpeg
from PIL import Image
from torch.nn.functional import interpolate
from typer.testing import CliRunner

from jobs import job_file
from jobs.__main__ import app
from jobs.embed_flags import EmbedFlags
from pipeline import readers, versions
from pipeline.errors import UsageError
from pipeline.output import Root
from pipeline.progress import State


def call(*args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one verb in this process."""
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def embed_args(shards: Path, output: Path, *more: object) -> list[object]:
    asked = ["embed", "--input", shards, "--output", output, "--model", "test_vit", "--weights", "random:0"]
    return [*asked, "--max-reject-rate", 0.2, "--actors", 1, *more]


MAPS = ("feature_0", "feature_1")
WRONG = {
    "unknown model": (["--model", "pit_b_242"], "pit_b_224"),
    "no such input": (["--input", "{tmp}/none-*.tar"], "nothing matches"),
    "output is a file": (["--output", "{tmp}/file"], "is a file"),
    "output of others": (["--output", "{tmp}/others"], "holds other things"),
    "output not writable": (["--output", "/proc/nobody/out"], "cannot be"),
    "weights that do not fit": (["--weights", "{tmp}/other.safetensors"], "do not fit"),
    "weights not there": (["--weights", "{tmp}/none.pth"], "cannot be read"),
    "labels of no classes": (["--outputs", "tokens", "--labels", "{tmp}/labels.txt"], "no classes are kept"),
    "labels too few": (["--labels", "{tmp}/labels.txt"], "2 names, the model 1000 classes"),
    "bad batch size": (["--batch-size", "many"], "--batch-size many"),
    "bad actors": (["--actors", "2:1"], "--actors 2:1"),
    "bad precision": (["--precision", "fp8"], "--precision fp8"),
    "bad number": (["--top-k", "x"], "top-k"),
    "no such column": (["--input", "{tmp}/x.parquet"], "--image-column"),
    "allowed nowhere": (
        ["--allow-url", "photos/"],
        "--allow-url photos/: must be a URL's beginning or an absolute path",
    ),
    "unknown flag": (["--colour", "red"], "--colour"),
    "unknown output": (["--outputs", "embedding,logits"], "--outputs logits: choose one of"),
    "one head": (["--outputs", "heads"], "test_vit has no second classifier head"),
    "image size": (["--image-size", "165x160"], "do not cover 165; 160 or 176 would do"),
    "no size": (["--image-size", "large"], "--image-size large: must be H or HxW"),
    "bad indices": (["--feature-indices", "0;2"], "--feature-indices 0;2: must be whole numbers"),
    "channels": (["--in-chans", "2"], "images of 2 channels"),
    "engine": (["--engine", "onnx"], "--engine onnx: choose one of eager, compile, openvino"),
    "decode": (["--decode", "cuda", "--device", "cpu"], "--decode cuda: the device is the CPU"),
    "client of a cluster": (["--ray-address", "ray://h:10001"], "--ray-address ray://h:10001: must be host:port"),
    "no port": (["--ray-address", "somewhere"], "--ray-address somewhere: must be host:port or auto"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_before_any_work(case: str, shards: Path, tmp_path: Path, ray_session: None) -> None:
    """Exit 2, one sentence, no traceback, nothing written. (Beside a Ray, else each case would begin to start one.)"""
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.docx").write_text("")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    write_parquet(tmp_path / "x.parquet", [b"a"], picture=[b"b"])
    safetensors.torch.save_file(oracle.module("test_vit3").state_dict(), tmp_path / "other.safetensors")
    flags, message = WRONG[case]
    defaults = {"--input": shards, "--output": tmp_path / "out", "--model": "test_vit", "--weights": "random:0"}
    asked = defaults | {flag: v.format(tmp=tmp_path) for flag, v in zip(flags[::2], flags[1::2], strict=True)}
    code, out, err = call("embed", *(part for pair in asked.items() for part in pair))
    assert code == 2, err
    assert message in " ".join(err.split()) and "Traceback" not in err and out == ""
    if not err.startswith("Usage:"):
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "versions").exists()


def test_json_says_what_was_wrong_too() -> None:
    """A scheduler that reads stdout finds an object there, whatever the end."""
    code, out, _ = call("embed", "--json")
    told = {"error": "--input is missing: see `shard2vec embed --help`", "exit_code": 2}
    assert code == 2 and json.loads(out) == told


def test_required_flags_are_asked_for() -> None:
    """Leaving one out names it."""
    assert call("embed")[0::2] == (2, "shard2vec: --input is missing: see `shard2vec embed --help`\n")


VERBS = [
    "demo",
    "embed",
    "reembed",
    "status",
    "files",
    "verify",
    "describe",
    "bench",
    "compare",
    "report",
    "rollback",
    "gc",
]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_a_working_example(verb: str) -> None:
    """--help says what the verb does and ends with a command to copy."""
    code, out, _ = call(verb, "--help")
    assert code == 0 and "Example: " in out and verb in out


def test_a_job_file_stands_for_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    """Same names, lists for repeated flags, false leaves a switch out."""
    (tmp_path / "job.yaml").write_text(
        "input: [a.tar, b.tar]\nmodel: pit_s_224\ntop_k: 3\nnormalize: true\n"
        "dry-run: false\noutputs: [embedding, classes]\n"
    )
    argv = job_file.expand(["embed", "--config", str(tmp_path / "job.yaml"), "--top-k=7", "--model", "test_vit"])
    assert argv == [
        *("embed", "--top-k=7", "--model", "test_vit"),
        *("--input", "a.tar", "--input", "b.tar", "--normalize", "--outputs", "embedding,classes"),
    ]
    (tmp_path / "urls.yaml").write_text("allow_url: [/data/, s3://b/]\nallow-urls: x\n")
    several = job_file.expand(["embed", "--config", str(tmp_path / "urls.yaml")])
    assert several[1:5] == ["--allow-url", "/data/", "--allow-url", "s3://b/"]
    (tmp_path / "pool.yaml").write_text("actors: 1:2\nbatch_size: 010\n")
    pool = job_file.expand(["embed", "--config", str(tmp_path / "pool.yaml")])
    assert pool == ["embed", "--actors", "1:2", "--batch-size", "010"]
    (tmp_path / "bad.yaml").write_text("- a list\n")
    for name, message in (("bad.yaml", "must be a mapping"), ("none.yaml", "cannot be read")):
        with pytest.raises(UsageError, match=message):
            job_file.expand(["embed", "--config", str(tmp_path / name)])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A committed output, made without Ray."""
    folder = tmp_path_factory.mktemp("jobs")
    receipts = made.embed(made.job(folder), shards)
    versions.commit(Root(str(folder)), made.vector_set().name, [r.files for r in receipts])
    return folder


def test_status_files_verify(output: Path, shards: Path) -> None:
    """The verbs that only read: for a person, and as JSON."""
    code, out, _ = call("status", output)
    assert code == 0 and "version 1" in out and "24 samples: 21 rows, 3 rejects" in out
    told = json.loads(call("status", output, "--json")[1])
    assert told["version"] == 1 and told["current"]["rejects"] == oracle.REJECTS
    assert told["sets"][made.vector_set().name] == {"shards_done": 3, "current": True}
    code, out, _ = call("files", output)
    assert code == 0 and [Path(p).exists() for p in out.splitlines()] == [True] * 3
    assert "/rejects/" in call("files", output, "--kind", "rejects")[1]
    code, out, err = call("verify", output, "--input", shards, "--json")
    assert code == 0 and "is whole" in err
    told = json.loads(out)
    assert {k: told[k] for k in ("ids", "missing", "duplicated", "not_finite", "bad_files")} == {
        "ids": 24,
        "missing": 0,
        "duplicated": 0,
        "not_finite": 0,
        "bad_files": 0,
    }


def test_verify_ends_with_1_and_names_what_is_wrong(output: Path, shards: Path, tmp_path: Path) -> None:
    """Against an input with one shard more, its ids are missing and named."""
    import shutil

    shutil.copytree(shards, tmp_path / "in")
    write_tar(tmp_path / "in" / "more.tar", {"z.jpg": jpeg()})
    code, _, err = call("verify", output, "--input", tmp_path / "in")
    assert code == 1 and "more/z" in err and "is NOT whole" in err


def test_gc_keeps_the_current_version(output: Path) -> None:
    """At least one version stays, and what it names with it."""
    assert call("gc", output, "--keep", 0)[0] == 2
    code, out, _ = call("gc", output, "--keep", 1, "--json")
    assert code == 0 and json.loads(out) == {"deleted": [], "versions": [1], "spared": []}


def test_gc_spares_what_a_run_of_this_week_may_go_on_with(output: Path) -> None:
    """It died two hours ago, and who started it comes back on Monday; --unfinished deletes it, not what lives."""
    root = Root(str(output))
    for name, updated in (("died@1", time.time() - 7200), ("alive@2", time.time())):
        root.put_new(f"sets/{name}/embeddings/x-1.parquet", b"")
        note = asdict(State(set=name, shards=2, updated=updated))
        root.overwrite(f"reports/{note['name']}.json", json.dumps(note).encode())
    code, out, err = call("gc", output, "--keep", 1, "--json")
    assert code == 0 and json.loads(out) == {"deleted": [], "versions": [1], "spared": ["alive@2", "died@1"]}
    assert "did not finish: died@1 (--unfinished deletes it)" in err and "a run writes now: alive@2\n" in err
    code, out, err = call("gc", output, "--keep", 1, "--unfinished", "--json")
    assert (code, json.loads(out)["spared"]) == (0, ["alive@2"]) and "--unfinished" not in err
    assert json.loads(out)["deleted"] == ["sets/died@1/embeddings/x-1.parquet"]


def test_a_dashboards_address_is_for_submit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RAY_ADDRESS as `ray job submit` has it: told by its name to a run here, and no hindrance to a submitted one."""
    monkeypatch.setenv("RAY_ADDRESS", "http://me:secret@head:8265")
    asked = [
        "--input",
        tmp_path / "none.tar",
        "--output",
        tmp_path / "out",
        "--model",
        "test_vit",
        "--json",
        "--dry-run",
    ]
    for verb in ("embed", "reembed"):
        code, out, err = call(verb, *asked)
        assert code == 2 and json.loads(out)["exit_code"] == 2
        assert "RAY_ADDRESS is http://head:8265, which is for `shard2vec submit`" in err and "secret" not in err
        code, _, err = call(verb, *asked, "--ray-address", "local")
        assert code == 2 and "none.tar: " in err
    EmbedFlags(input=["s3://b/x.tar"], output="s3://b/out", model="test_vit").check("embed")


def test_reading_verbs_refuse_what_is_no_output(tmp_path: Path) -> None:
    """A wrong path is told as such."""
    for verb in ("status", "files", "verify"):
        code, _, err = call(verb, tmp_path / "none")
        assert code == 2 and "holds no output of ours" in err


def test_describe_prints_the_card() -> None:
    """The numbers of a model, without its weights."""
    code, out, _ = call("describe", "test_vit", "--json")
    card = json.loads(out)
    assert code == 0 and card["embedding_dim"] == 64 and card["classes"] == 1000
    code, out, _ = call("describe", "test_vit")
    assert code == 0 and "embedding_dim  64" in out


@pytest.mark.parametrize("model", oracle.ON_RAY)
def test_the_command_lines_vectors_are_timms(model: str, shards: Path, tmp_path: Path, ray_session: None) -> None:
    """Embedding, scores, tokens and maps of `embed` are timm's own calls'."""
    images = list(oracle.good_images().values())[:4]
    members = {f"photo_{i}.jpg": image for i, image in enumerate(images)}
    write_tar(tmp_path / "x.tar", [*list(members.items())[:3], ("photo_2.cls", b"5"), *list(members.items())[3:]])
    args = ["embed", "--input", tmp_path / "x.tar", "--output", tmp_path / "out", "--model", model]
    args += ["--outputs", "classes,tokens,features", "--feature-indices", "2,0"]
    code, out, err = call(
        *args, "--weights", "random:0", "--precision", "fp32", "--decode", "exact", "--batch-size", 3, "--json"
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["rows"] == 4
    want = oracle.expected(model, images, maps=True)
    table = readers.open_dataset(str(tmp_path / "out")).to_table().to_pylist()
    assert [r["key"] for r in table] == [f"photo_{i}" for i in range(4)]
    assert oracle.relative(np.array([r["embedding"] for r in table]), want.embedding) < 1e-5
    assert [r["label"] for r in table] == [None, None, 5, None]
    order = np.argsort(-want.scores, axis=1, kind="stable")[:, :5]
    assert [r["topk_index"] for r in table] == order.tolist()
    scores = np.array([r["topk_score"] for r in table])
    assert oracle.relative(scores, np.take_along_axis(want.scores, order, 1)) < 1e-5
    assert all(len(r["topk_label"]) == 5 for r in table)
    for kind, columns in {
        "tokens": {"tokens": want.tokens},
        "features": dict(zip(MAPS, want.maps, strict=True)),
    }.items():
        beside = readers.open_dataset(str(tmp_path / "out"), kind=kind).to_table()
        assert beside["id"].to_pylist() == [r["id"] for r in table]
        assert beside.column_names == ["id", *columns]
        for column, values in columns.items():
            assert oracle.relative(np.array(beside[column].to_pylist(), np.float32), values) < 1e-3  # float16


def test_another_size_and_grey_images_from_the_command_line(tmp_path: Path, ray_session: None) -> None:
    """Weights made for 224 and RGB, run at 256x192 and one channel: the actors build what the driver adapted."""
    images = {f"photo_{i}.jpg": image for i, image in enumerate(list(oracle.good_images().values())[:3])}
    write_tar(tmp_path / "x.tar", images)
    net = oracle.module("pit_ti_224")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    args = ["embed", "--input", tmp_path / "x.tar", "--output", tmp_path / "out", "--model", "pit_ti_224", "--json"]
    args += ["--weights", tmp_path / "w.safetensors", "--precision", "fp32", "--image-size", "256X192", "--in-chans", 1]
    code, out, err = call(*args, "--outputs", "tokens", "--decode", "exact")
    assert code == 0, err
    adapted = timm.create_model("pit_ti_224", img_size=(256, 192), in_chans=1).eval()
    state = net.state_dict()
    state["pos_embed"] = interpolate(state["pos_embed"], (31, 23), mode="bicubic", antialias=True)
    state["patch_embed.conv.weight"] = state["patch_embed.conv.weight"].sum(1, keepdim=True)
    adapted.load_state_dict(state)
    settings = timm.data.resolve_data_config({"input_size": (1, 256, 192)}, model=net)
    settings |= {name: (float(np.mean(settings[name])),) for name in ("mean", "std")}
    transform = timm.data.create_transform(**settings)
    x = torch.stack([transform(Image.open(io.BytesIO(i)).convert("L")) for i in images.values()])
    with torch.inference_mode():
        want = adapted.forward_head(adapted.forward_features(x), pre_logits=True).numpy()
    table = readers.open_dataset(str(tmp_path / "out")).to_table()
    assert oracle.relative(np.array(table["embedding"].to_pylist()), want) < 1e-5
    told = json.loads((tmp_path / "out" / "sets" / json.loads(out)["set"] / "set.json").read_text())
    assert told["preprocessing"]["input_size"] == [1, 256, 192] and told["outputs"] == ["embedding", "tokens"]


def test_demo_shows_a_result(tmp_path: Path, ray_session: None) -> None:
    """Shards, rejects by reason, a verified version, a table that pandas printed and a picture."""
    code, out, err = call("demo", "--output", tmp_path / "demo", "--images", 48, "--model", "test_vit", "--json")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["rows"] == 48 and sum(told["rejects"].values()) >= 4
    assert len(out.splitlines()) == 1
    assert "each exactly once: yes" in err and "pd.read_parquet" in err and "photos-0000" in err
    assert (tmp_path / "demo" / "neighbours.png").stat().st_size > 50_000
