"""Engines: the vectors of timm within the stated error, one compilation, and never another engine without a word."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import timm
import torch
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline import embed, engines, run, versions
from pipeline.backbone import Backbone, Facts, facts_of
from pipeline.cache import KEEP_S
from pipeline.config import RunConfig
from pipeline.embed import Job
from pipeline.engines import STATED_ERROR, Bound, OpenVINO, Unavailable, resolve_engine
from pipeline.errors import NoRoom
from pipeline.features import feature_names
from pipeline.images import Decoder
from pipeline.output import Root

IMAGES = list(oracle.good_images().values())[:7]
EVERYTHING = ("tokens", "features", "heads")


def pixels(net: torch.nn.Module) -> torch.Tensor:
    decoder = Decoder(Backbone(net).preprocessing)
    return torch.from_numpy(np.stack([decoder(i).pixels for i in IMAGES]))


def asked(model: str, net: torch.nn.Module, by: str) -> Facts:
    """Facts with the columns of tokens, of maps by index or by name, and of two heads where there are."""
    outputs = EVERYTHING if "distilled" in model else EVERYTHING[:2]
    return facts_of(net, model, outputs, None, feature_names(net) if by == "name" else None)


def pretend(model: str, tmp_path: Path, *flags: str) -> tuple[dict[str, object], str]:
    """(JSON, stderr) of a dry run over no more than a listing."""
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    paths = ("--input", str(tmp_path / "a.jpg"), "--output", str(tmp_path / "out"), "--format", "folder")
    command = ["embed", *paths, "--model", model, "--weights", "random:0", "--dry-run", "--json", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "by"), [("test_vit", "name"), ("pit_ti_distilled_224", "index")])
def test_openvino_gives_timms_vectors_within_its_stated_error(model: str, by: str, precision: str) -> None:
    """Embedding, scores, tokens, maps by index and by name, and both heads; the head's own error is float32's."""
    net = oracle.module(model)
    tensors = asked(model, net, by).tensors
    images = pixels(net)
    want = Backbone(net, batch_size=7, tensors=tensors)(images)
    got = Backbone(net, engine="openvino", precision=precision, batch_size=4, tensors=tensors)(images)
    found, bound = engines.difference(got, want, torch.arange(7)), STATED_ERROR["openvino", precision]
    assert found.cosine >= bound.cosine and found.relative <= bound.relative
    assert oracle.relative(want.embedding.numpy(), oracle.expected(model, IMAGES).embedding) < 1e-5
    assert got.topk_score is not None and want.topk_score is not None
    assert oracle.relative(got.topk_score.numpy(), want.topk_score.numpy()) <= bound.relative
    assert not torch.equal(got.topk_score, got.topk_score.bfloat16().float())


def test_openvinos_rows_do_not_depend_on_how_full_the_batch_is() -> None:
    """4, 3 and 1 images give the same rows to the bit, none of the padding comes out, and rows stay when more come."""
    net = oracle.module("test_vit")
    backbone, images = Backbone(net, engine="openvino", batch_size=4), pixels(net)
    full = backbone(images)
    kept = full.embedding.clone()
    for n in (4, 3, 1):
        part = backbone(images[:n])
        assert len(part.embedding) == n and torch.equal(part.embedding, full.embedding[:n])
        assert torch.equal(part.topk_score, full.topk_score[:n])
    assert torch.equal(full.embedding, kept)


def test_openvino_takes_torchs_threads_and_sends_nothing(tmp_path: Path) -> None:
    """No telemetry is imported, no file appears in the home, the process keeps its cores."""
    code = """
import os, sys, timm, torch
from pathlib import Path
cores = os.sched_getaffinity(0)
torch.set_num_threads(1)
from pipeline.backbone import Backbone
backbone = Backbone(timm.create_model("test_vit").eval(), engine="openvino", batch_size=2)
assert backbone._body._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1
import openvino.tools.ovc.telemetry_utils as utils
assert utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
assert not any(name.startswith("openvino_telemetry") for name in sys.modules)
assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == 1
assert not list(Path.home().iterdir()), list(Path.home().iterdir())
"""
    home = {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled lies there; the environment is as before afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path / "cache"))


def small() -> torch.nn.Module:
    """The tiny ViT with one block: a compiler needs a second for each kind of kernel."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", depth=1).eval()


def test_a_model_is_compiled_once_and_found_again(own_compiler_cache: None, tmp_path: Path) -> None:
    """One graph for full and short batches with hooks and tokens, within the stated error, the same bits however full
    the batch is; weights are part of it, and the next process finds its kernels, proven on the way, in the cache."""
    from torch._dynamo.utils import counters

    def kernels() -> set[Path]:
        return set((tmp_path / "cache").rglob("*.so"))

    net = small()
    tensors = facts_of(net, "test_vit", EVERYTHING[:2], None, ("patch_embedding", "block_0")).tensors
    images = pixels(net)
    want = Backbone(net, batch_size=7, tensors=tensors)(images)
    made = resolve_engine(
        "compile", net, precision="fp32", device="cpu", batch_size=4, threads=torch.get_num_threads(), tensors=tensors
    )
    assert made == ("compile", "")
    proven = kernels()
    assert proven
    counters.clear()
    backbone = Backbone(net, engine="compile", batch_size=4, tensors=tensors)
    got = backbone(images)
    found, bound = engines.difference(got, want, torch.arange(7)), STATED_ERROR["compile", "fp32"]
    assert found.cosine >= bound.cosine and found.relative <= bound.relative
    for n in (4, 3, 1):
        assert torch.equal(backbone(images[:n]).embedding, got.embedding[:n])
    assert counters["stats"]["unique_graphs"] == 1
    assert kernels() == proven
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(backbone(images).tensors[0], got.tensors[0])
    with pytest.raises(RuntimeError, match="recompile"):
        backbone._body(torch.zeros(3, *backbone.preprocessing.input_size))


def test_without_a_compiler_a_run_is_eager_and_a_worker_fails(
    own_compiler_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver says that there is no C++ compiler; a worker that lacks what its driver had makes no other vectors."""
    from torch._inductor.config import cpp

    monkeypatch.setattr(cpp, "cxx", (None, "/nonexistent"))
    engine, why = resolve_engine("compile", small(), precision="fp32", device="cpu", batch_size=2)
    assert engine == "eager" and "No working C++ compiler" in why and "TORCH" not in why
    with pytest.raises(Unavailable, match="No working C"):
        Backbone(small(), engine="compile", batch_size=2)


class Breaks(torch.nn.Module):
    """Python decides by a value: no graph holds that."""

    pretrained_cfg = {"input_size": (3, 32, 32), "num_classes": 4}  # noqa: RUF012
    num_classes = 4

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :8] * (2 if x.sum().item() > 0 else 3)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else x[:, :4]


@pytest.mark.parametrize(
    ("engine", "precision", "device", "why"),
    [
        ("openvino", "fp16", "cpu", "it has no fp16, only fp32, bf16"),
        ("openvino", "bf16", "cuda", "OpenVINO runs on the CPU here, the device is cuda"),
        ("openvino", "fp32", "cpu", "and openvino fp32 promises 0.999999"),
        ("compile", "fp32", "cpu", "UserError"),
    ],
)
def test_an_engine_that_cannot_be_had_is_named_with_its_reason(
    engine: str, precision: str, device: str, why: str
) -> None:
    """Eager runs instead, one sentence says why: a precision, a device, a graph that is wrong, one that breaks."""
    got, sentence = resolve_engine(engine, Breaks(), precision=precision, device=device, batch_size=2)
    assert got == "eager" and sentence.startswith(f"--engine {engine} cannot be used, eager runs instead: ")
    assert why in sentence and "\n" not in sentence


def test_an_engine_that_is_too_far_off_is_proven_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same weights get the same sentence without a proof; others, and other settings, get a proof."""
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    settings: dict[str, Any] = {"precision": "fp32", "device": "cpu", "batch_size": 2, "weights_sha256": "a" * 64}
    first = resolve_engine("openvino", Breaks(), **settings)
    assert first[0] == "eager" and "promises" in first[1]
    proven: list[dict[str, Any]] = []
    monkeypatch.setattr(engines, "_prove", lambda engine, module, bound, given: proven.append(given))
    assert resolve_engine("openvino", Breaks(), **settings) == first and not proven
    for other in ({"weights_sha256": "b" * 64}, {"threads": 2}, {"precision": "bf16"}, {"batch_size": None}):
        assert resolve_engine("openvino", Breaks(), **settings | other) == ("openvino", "")
    assert len(proven) == 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), NoRoom("no room for the model")]
)
def test_a_full_device_makes_a_run_eager_for_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence says so; when there is room again, so is the engine."""
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    settings: dict[str, Any] = {"precision": "fp32", "device": "cpu", "weights_sha256": "a" * 64}

    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engines, "_prove", full)
        engine, why = resolve_engine("compile", Breaks(), **settings)
        assert engine == "eager" and str(error).split("\n")[0] in why and "\n" not in why
    monkeypatch.setattr(engines, "_prove", lambda *_: None)
    assert resolve_engine("compile", Breaks(), **settings) == ("compile", "")


def test_compiled_code_that_nothing_reads_is_deleted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After a month; before the proof, so that no worker misses what its driver found."""
    monkeypatch.setenv("SHARD2VEC_CACHE", str(tmp_path))
    old = time.time() - KEEP_S - 60
    for name, (read, written) in {"unused": (old, old), "read": (time.time(), old), "new": (old, time.time())}.items():
        path = tmp_path / "inductor" / "fxgraph" / "ab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (read, written))
    there: list[set[str]] = []
    monkeypatch.setattr(engines, "_prove", lambda *_: there.append({p.name for p in tmp_path.rglob("ab/*")}))
    resolve_engine("compile", Breaks(), precision="fp32", device="cpu")
    assert there == [{"read", "new"}]


def test_without_openvino_a_run_is_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not installed: the plan says how to have it, in words and in JSON, and the set is the one of eager."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    plain, _ = pretend("test_vit", tmp_path)
    result, err = pretend("test_vit", tmp_path, "--engine", "openvino")
    assert "pip install 'shard2vec[openvino]'" in err and result["engine_fallback"] in err
    assert (result["engine"], result["set"]) == ("eager", plain["set"])
    assert (plain["engine"], plain["engine_fallback"]) == ("eager", None)


@pytest.mark.parametrize("row", [0, 3])
def test_a_single_wrong_row_of_a_batch_is_found(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is wrong in one place of its batch, the last one too, or not finite, is not used."""
    right = OpenVINO.__call__
    for wrong in (1.1, float("nan")):

        def call(self: OpenVINO, x: torch.Tensor, wrong: float = wrong) -> object:
            body, caught = right(self, x)
            body[row] *= wrong
            return body, caught

        monkeypatch.setattr(OpenVINO, "__call__", call)
        engine, why = resolve_engine(
            "openvino", oracle.module("test_vit"), precision="fp32", device="cpu", batch_size=4
        )
        assert engine == "eager" and "promises" in why


def test_a_set_of_openvino_is_made_and_found_again(
    ray_session: None, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers embed with it, the set and its files say so, and the same command again proves nothing: all is there.

    What is proven is what the workers make: their backbone's settings, on their threads.
    """
    prove, proven, jobs = engines._prove, list[tuple[dict[str, Any], int]](), list[Job]()

    def spy(engine: str, module: torch.nn.Module, bound: Bound, settings: dict[str, Any]) -> None:
        proven.append((settings | {"engine": engine}, torch.get_num_threads()))
        prove(engine, module, bound, settings)

    monkeypatch.setattr(engines, "_prove", spy)
    monkeypatch.setattr(run, "Job", lambda **fields: jobs.append(Job(**fields)) or jobs[-1])
    config = RunConfig(
        inputs=(str(shards),),
        output=str(tmp_path / "out"),
        model="test_vit",
        weights="random:0",
        engine="openvino",
        max_reject_rate=0.2,
        actors=(1, 1),
        batch_size=4,
    )
    first = run.embed(config, lambda line: None)
    assert first.exit_code == 0, first.message
    assert (first.json["engine"], first.json["rows"]) == ("openvino", oracle.SAMPLES - 3)
    version = versions.read_version(Root(config.output))
    assert version is not None
    assert json.loads(Root(config.output).read(f"sets/{version.set}/set.json"))["engine"] == "openvino"
    monkeypatch.setattr(embed, "load_backbone", lambda *_, **settings: settings)
    assert proven == [(embed.backbone_of(jobs[0]), jobs[0].torch_threads)]
    monkeypatch.setattr(engines, "_prove", lambda *_: pytest.fail("nothing is to do"))
    again = run.embed(config, lambda line: None)
    assert (again.json["set"], again.json["shards_unchanged"]) == (first.json["set"], 3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_on_cuda_is_recorded_once_and_gives_rows_to_keep(precision: str) -> None:
    """CUDA graphs write every batch to the same place: what was given before stays what it was."""
    from torch._dynamo.utils import counters

    net = oracle.module("pit_ti_224")
    assert resolve_engine("compile", net, precision=precision, device="cuda", batch_size=4) == ("compile", "")
    counters.clear()
    backbone, images = Backbone(net, engine="compile", precision=precision, device="cuda", batch_size=4), pixels(net)
    first = backbone(images[:4])
    kept = first.embedding.clone()
    backbone(images[4:])
    assert torch.equal(first.embedding, kept) and torch.equal(backbone(images[:1]).embedding, kept[:1])
    assert counters["stats"]["unique_graphs"] == 1
