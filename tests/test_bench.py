"""`bench` from end to end, in this process: what it prints can be typed, and what is wrong is told."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import made
import oracle
import pytest
import torch
from containers import write_tar
from pictures import jpeg
from test_jobs import call

from pipeline import bench, machine, measure
from pipeline.backbone import Backbone
from pipeline.ceiling import Forward
from pipeline.errors import NoRoom, UsageError
from pipeline.images import Decoder


def test_bench_ends_in_a_command_that_runs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its cost, the trial its rate; `embed` takes the setting as it is printed, in words and as JSON."""
    monkeypatch.setattr(machine, "cores", lambda: 1)
    asked = ["bench", "--input", shards, "--model", "test_vit", "--seconds", 2, "--actors", 1, "--outputs", "classes"]
    code, out, err = call(*asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    rows = [told["read"], told["transfer"], told["write"], *told["decode"], *told["forward"]]
    assert all(row["cpu_ms"] > 0 and row["images_per_s"] > 0 for row in rows)
    reachable = min(told["trial"]["images_per_s"], told["ceiling"]["alone_images_per_s"]["read"])
    assert told["expected_images_per_s"] == pytest.approx(reachable, abs=0.06) and reachable > 0
    assert told["images"]["count"] == 21 and told["trial"]["images"] > 0
    exact = told["decode"][0]
    assert (exact["decode"], exact["largest_levels"], exact["cosine"]) == ("exact", 0, pytest.approx(1))
    assert told["ceiling"]["images_per_s"] in [d["ceiling_images_per_s"] for d in told["decode"]]
    assert "CPU ms" in err and told["command"] in err.splitlines()[-1]
    words = shlex.split(told["command"].replace("--output out", f"--output {tmp_path / 'out'} --weights random:0"))
    code, out, err = call(*words[1:], "--dry-run", "--json")
    assert code == 0 and json.loads(out)["shards_to_embed"] == 3, err


class Moved(torch.nn.Module):
    """Tells where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[object] = []

    def to(self, place: object) -> "Moved":  # type: ignore[override]
        self.places.append(place)
        return self

    def cpu(self) -> "Moved":
        return self.to("cpu")


def half_a_bench(**more: object) -> SimpleNamespace:
    """What the methods of `Bench` that are called here look at."""
    forward = Forward(
        engine="compile", precision="fp32", batch_size=2, start_s=1.0, cost=measure.Cost(2, 1.0, 1.0), cosine=1.0
    )
    known = {
        "asked": SimpleNamespace(decode=None, seconds=0.1), "notes": [], "say": lambda line: None, "device": "cuda",
        "room": SimpleNamespace(gpus=1, cores=1), "vectors": made.vector_set(), "module": Moved(),
        "_fastest": lambda forwards: forward, "_decoder": lambda how: Decoder(made.vector_set().preprocessing, how=how),
    }  # fmt: skip
    return SimpleNamespace(**known | more)


def test_others_at_work_are_told_where_they_took_something() -> None:
    """By the CPU seconds of 1,000 images on one core, against the rate on the clock; of a GPU always."""
    one = half_a_bench(load=1.2, room=SimpleNamespace(gpus=0, cores=1))
    told = {"images": 1000, "cpu_seconds": {"decode": 2.0, "forward": 3.0}}
    (note,) = bench.Bench._of_load(one, told | {"images_per_s": 150.0})  # type: ignore[arg-type]
    assert "a load of 1.2" in note and "200 images/s" in note
    assert bench.Bench._of_load(one, told | {"images_per_s": 210.0}) == []  # type: ignore[arg-type]
    on_gpu = half_a_bench(load=1.2)
    assert len(bench.Bench._of_load(on_gpu, told | {"images_per_s": 210.0})) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_model_is_on_the_device_again_after_a_proof(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof leaves it on the CPU, and what is measured next was made before it, of the same module."""
    asked: list[dict[str, object]] = []

    def resolve(engine: str, module: Moved, **settings: object) -> tuple[str, str]:
        asked.append(settings)
        module.cpu()
        return engine, ""

    monkeypatch.setattr(bench, "resolve_engine", resolve)
    one = half_a_bench(room=SimpleNamespace(gpus=gpus, cores=1))
    bench.Bench._proven(one, [])  # type: ignore[arg-type]
    assert one.module.places == ["cpu", "cuda"]
    assert asked[0]["classes"] is True and asked[0]["top_k"] == 5
    assert asked[0]["threads"] == (1 if gpus else torch.get_num_threads())


@pytest.mark.parametrize("decode", [None, "cuda"])
def test_a_machine_without_the_devices_decoder_is_measured_without_it(
    decode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note says why; who asked for it alone hears nothing else."""

    def lacks(*_: object) -> None:
        raise UsageError("--decode cuda: this torchvision decodes no JPEG on cuda")

    monkeypatch.setattr(bench, "DeviceImages", lacks)
    one = half_a_bench(asked=SimpleNamespace(decode=decode, seconds=0.1))
    backbone, image = Backbone(oracle.module(made.MODEL), batch_size=2), jpeg(200, 150)
    pixels = [one._decoder("exact")(image)] * 2
    reference = measure.embeddings(backbone, pixels, 0.01)
    found = bench.Bench._decodings(one, [image] * 2, pixels, backbone, reference)  # type: ignore[arg-type]
    if decode:
        with pytest.raises(UsageError, match="this torchvision"):
            list(found)
    else:
        assert [d.decode for d in found] == ["exact", "fast", "scaled"]
        assert one.notes == ["cuda was left out: --decode cuda: this torchvision decodes no JPEG on cuda"]


def test_a_full_device_is_a_sentence(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 1, for others may leave it; with --json as an object too."""

    def full(*_: object) -> None:
        raise NoRoom("NVIDIA H100 has no room for the model, 0.1 of its 80.0 GB are free: CUDA out of memory.")

    monkeypatch.setattr(bench.Bench, "__init__", full)
    code, out, err = call("bench", "--input", shards, "--model", "test_vit", "--json")
    assert code == 1 and "Traceback" not in err and err.endswith("are free: CUDA out of memory.\n")
    assert json.loads(out)["exit_code"] == 1


@pytest.mark.gpu
def test_bench_measures_the_device(shards: Path) -> None:
    """Copies, decoding there, and how busy it was."""
    code, out, err = call(
        "bench", "--input", shards, "--model", "test_vit", "--seconds", 5, "--device", "cuda", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert [d["decode"] for d in told["decode"] if d["there"]] == ["cuda"] and told["trial"]["device_busy"] > 0
    assert told["expected_images_per_s"] > 0 and "--gpus-per-actor" in told["command"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "pit_b_242"], "pit_b_224"),
        (["--input", "{tmp}/none-*.tar"], "nothing matches"),
        (["--input", "{tmp}/empty.tar"], "holds no image"),
        (["--seconds", "0.5"], "--seconds 0.5: must be 1 or more"),
        (["--decode", "slow"], "--decode slow: choose one of"),
        (["--decode", "cuda", "--device", "cpu"], "--decode cuda: the device is the CPU"),
    ],
)
def test_bench_says_what_is_wrong(flags: list[str], message: str, tmp_path: Path) -> None:
    """Exit 2 and one sentence, as `embed`."""
    write_tar(tmp_path / "empty.tar", {"a.txt": b"no image"})
    defaults = {"--model": "test_vit", "--input": str(tmp_path / "empty.tar"), "--seconds": "2"}
    asked = defaults | {flag: v.format(tmp=tmp_path) for flag, v in zip(flags[::2], flags[1::2], strict=True)}
    code, out, err = call("bench", *(part for pair in asked.items() for part in pair))
    assert (code, out) == (2, "") and message in err.splitlines()[-1] and "Traceback" not in err
