"""The command line: exit codes, one sentence for each mistake, JSON last on stdout."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made
import numpy as np
import oracle
import pytest
import safetensors.torch
import timm
import torch
from chaos_job import workers_of
from containers import write_parquet, write_tar
from pictures import jpeg
from PIL import Image
from poison import environment, poison
from torch.nn.functional import interpolate
from typer.testing import CliRunner

from jobs import job_file
from jobs.__main__ import app
from pipeline import readers, versions
from pipeline.errors import UsageError
from pipeline.output import Root


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
    assert code == 0 and json.loads(out) == {"deleted": [], "versions": [1]}


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


def start(*args: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
    """The real command in a process group of its own."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *map(str, args)],
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )  # type: ignore[call-overload]


ENDS = (signal.SIGINT, signal.SIGTERM)


def wait_for(found, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def many_shards(folder: Path) -> Path:
    for shard in range(6):
        members = {f"{i:03d}.jpg": jpeg(90, 70, seed=shard * 50 + i) for i in range(24)}
        write_tar(folder / f"s{shard}.tar", members | {"broken.jpg": b"\xff\xd8\xff no"})
    return folder


def slow_args(shards: Path, output: Path) -> list[object]:
    """Small batches of a larger model, so that a kill falls in the middle of the work."""
    asked = ["embed", "--input", shards, "--output", output, "--model", "pit_ti_224", "--weights", "random:0"]
    return [*asked, "--batch-size", 2, "--precision", "fp32", "--max-reject-rate", 0.1, "--json"]


def killed_when(finished: int, shards: Path, output: Path) -> None:
    """Starts a run and kills its process group soon after so many shards are there, in the midst of the next."""
    run = start(*slow_args(shards, output))
    wait_for(lambda: len(list(output.rglob("embeddings/*.parquet"))) >= finished or run.poll() is not None)
    assert run.poll() is None, run.communicate()
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_result_of_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL of the whole process group, mid-shard; no half file is to be seen; the same command ends it right."""
    shards = many_shards(tmp_path / "in")
    output = tmp_path / "killed"
    killed_when(2, shards, output)
    assert not (output / "versions").exists()
    for file in (output / "sets").rglob("embeddings/*.parquet"):
        versions.read_files(Root(str(output)), str(file.relative_to(output)))
    run = start(*slow_args(shards, output))
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["shards_unchanged"] >= 2 and told["shards_unchanged"] + told["shards_embedded"] == 6
    undisturbed = made.job(tmp_path / "whole", model="pit_ti_224", batch_size=2, decode="fast")
    files = [r.files for r in made.embed(undisturbed, shards)]
    versions.commit(Root(str(tmp_path / "whole")), undisturbed.vectors.name, files)
    tables = [
        readers.open_dataset(str(o), kind=kind).to_table()
        for o in (output, tmp_path / "whole")
        for kind in ("embeddings", "rejects")
    ]
    own = ["topk_label"]  # the command's classes have names
    assert tables[0].drop_columns(own).equals(tables[2].drop_columns(own)) and tables[1].equals(tables[3])
    assert len(tables[0]) == 144 and len(tables[1]) == 6
    assert call("verify", output, "--input", shards)[0] == 0


@pytest.mark.slow
def test_an_interrupted_run_ends_soon_and_resumes(tmp_path: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM end with 130 in seconds, saying how to go on; nothing but our lines is shown."""
    shards = many_shards(tmp_path / "in")
    sent = {
        tmp_path / sent.name: (sent, start(*slow_args(shards, tmp_path / sent.name), "--actors", 1)) for sent in ENDS
    }
    for output, (signal_sent, run) in sent.items():
        wait_for(lambda: list(output.rglob("embeddings/*.parquet")) or run.poll() is not None)  # noqa: B023
        os.kill(run.pid, signal_sent)
        started = time.monotonic()
        out, err = run.communicate(timeout=60)
        assert run.returncode == 130, err
        assert time.monotonic() - started < 30
        assert "interrupted; run the same command to go on" in err
        for line in err.splitlines():
            assert line.startswith(("pit_ti_224@", "embedding ", "shard2vec: ")), line
        assert json.loads(out.splitlines()[-1])["version"] is None
        assert json.loads(call("status", output, "--json")[1])["last_run"]["state"] == "interrupted"


@pytest.mark.slow
def test_a_killed_worker_and_images_that_kill_theirs_cost_time_and_no_row(tmp_path: Path) -> None:
    """Workers are started again and unpublished shards done again; each deadly image is one reject, named.

    Three of them lie in two shards, before and after sound ones. Stdout is still the result alone.
    """
    shards, output = many_shards(tmp_path / "in"), tmp_path / "out"
    images = {f"{i:03d}.jpg": jpeg(90, 70, seed=i) for i in range(24)}
    write_tar(shards / "s6.tar", {"a.jpg": poison("segfault"), **images, "z.jpg": poison("out of memory")})
    write_tar(shards / "s7.tar", images | {"010.jpg": poison("exit")})
    run = start(*slow_args(shards, output), "--actors", 1, env=environment(tmp_path / "poison"))
    wait_for(lambda: list(output.rglob("embeddings/*.parquet")) or run.poll() is not None)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "died and had a successor" in err and "Traceback" not in err
    told = json.loads(out)
    assert len(out.splitlines()) == 1 and told["rows"] == 144 + 24 + 23
    assert told["rejects"] == {"corrupt": 2, "too_large": 1, "truncated": 6}
    rejects = readers.open_dataset(str(output), kind="rejects").to_table().to_pylist()
    found = {r["id"]: r["message"] for r in rejects if not r["id"].endswith("/broken")}
    assert found == {
        "s6/a": "its decoder crashed (SIGSEGV)",
        "s6/z": "its decoder was killed, as the system does where memory runs out",
        "s7/010": "its decoder crashed (exit status 3)",
    }
    assert call("verify", output, "--input", shards)[0] == 0


def test_demo_shows_a_result(tmp_path: Path, ray_session: None) -> None:
    """Shards, rejects by reason, a verified version, a table that pandas printed and a picture."""
    code, out, err = call("demo", "--output", tmp_path / "demo", "--images", 48, "--model", "test_vit", "--json")
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["rows"] == 48 and sum(told["rejects"].values()) >= 4
    assert len(out.splitlines()) == 1
    assert "each exactly once: yes" in err and "pd.read_parquet" in err and "photos-0000" in err
    assert (tmp_path / "demo" / "neighbours.png").stat().st_size > 50_000
