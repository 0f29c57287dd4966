"""`bench` from end to end, in this process: what it prints can be typed, and what is wrong is told."""

import json
import shlex
from pathlib import Path

import pytest
from containers import write_tar
from test_jobs import call

from pipeline import machine


def test_bench_ends_in_a_command_that_runs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its cost, the trial its rate; `embed` takes the setting as it is printed, in words and as JSON."""
    monkeypatch.setattr(machine, "cores", lambda: 1)
    asked = ["bench", "--input", shards, "--model", "test_vit", "--seconds", 2, "--actors", 1, "--outputs", "classes"]
    code, out, err = call(*asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    rows = [told["read"], told["transfer"], told["write"], *told["decode"], *told["forward"]]
    assert all(row["cpu_ms"] > 0 and row["images_per_s"] > 0 for row in rows)
    assert 0 < told["expected_images_per_s"] == told["trial"]["images_per_s"]
    assert told["images"]["count"] == 21 and told["trial"]["images"] > 0
    exact = told["decode"][0]
    assert (exact["decode"], exact["largest_levels"], exact["cosine"]) == ("exact", 0, pytest.approx(1))
    assert told["ceiling"]["images_per_s"] in [d["ceiling_images_per_s"] for d in told["decode"]]
    assert "CPU ms" in err and told["command"] in err.splitlines()[-1]
    words = shlex.split(told["command"].replace("--output out", f"--output {tmp_path / 'out'} --weights random:0"))
    code, out, err = call(*words[1:], "--dry-run", "--json")
    assert code == 0 and json.loads(out)["shards_to_embed"] == 3, err


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
