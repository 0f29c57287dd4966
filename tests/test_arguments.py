"""A verb's arguments for another machine: the same values, local paths spelled out, local lists taken along."""

import os
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs import arguments
from jobs.__main__ import app
from pipeline.errors import UsageError
from pipeline.shipment import Shipment

GROUP: Any = typer.main.get_command(app)


def sent(*given: str) -> tuple[Shipment, list[str]]:
    verb, *rest = given
    shipment, local, _ = arguments.parse(GROUP.commands[verb], verb, rest, None)
    return shipment, local


def params(given: list[str]) -> dict[str, Any]:
    with GROUP.commands[given[0]].make_context(given[0], given[1:]) as context:
        return dict(context.params)


def test_the_cluster_parses_what_was_given() -> None:
    """Repeated flags, switches, numbers and zeros, values that begin with a dash, positional arguments come through."""
    given = [
        "embed", "--input", "s3://b/{0..3}.tar", "--input=s3://b/x y.tar", "--output", "s3://b/o", "--model", "vit",
        "--normalize", "--top-k", "7", "--labels=gs://b/-l.txt", "--weights", "random:3", "--outputs=-x",
    ]  # fmt: skip
    shipment, local = sent(*given)
    assert shipment.verb == "embed" and local == []
    assert params([*shipment.arguments]) == params(given)
    zeros = ["--max-reject-rate", "0", "--num-classes", "0", "--feeders", "0", "--gpus-per-actor", "0"]
    gates = ["--min-rows", "0", "--max-shrink", "0", "--min-overlap", "0", "--min-top1-agreement", "0"]
    given = ["reembed", *given[1:], *zeros, *gates]
    assert params([*sent(*given)[0].arguments]) == params(given)
    assert sent("index", "s3://b/o", "--recall", "0")[0].arguments == ["index", "--recall=0.0", "--", "s3://b/o"]
    shipment, _ = sent("files", "s3://b/o", "--kind", "rejects", "--version", "2")
    assert params([*shipment.arguments]) == params(["files", "s3://b/o", "--kind", "rejects", "--version", "2"])


def test_local_paths_are_spelled_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones go by this machine's working directory, also a verb's own default; patterns stay patterns."""
    monkeypatch.chdir(tmp_path)
    shipment, local = sent(
        "embed", "--input", "in/*.tar", "--input", "s3://b/a.tar", "--output", "~/out", "--model", "local-dir:m",
        "--weights", "w.pth", "--labels", "file:///l.txt",
    )  # fmt: skip
    home = os.path.expanduser("~")
    assert shipment.arguments == [
        "embed", f"--input={tmp_path}/in/*.tar", "--input=s3://b/a.tar", f"--output={home}/out",
        f"--model=local-dir:{tmp_path}/m", f"--weights={tmp_path}/w.pth", "--labels=/l.txt",
    ]  # fmt: skip
    assert local == [f"{tmp_path}/in/*.tar", f"{home}/out", f"{tmp_path}/m", f"{tmp_path}/w.pth", "/l.txt"]
    assert sent("verify", "out")[0].arguments == ["verify", "--", f"{tmp_path}/out"]
    assert sent("demo")[0].arguments == ["demo", f"--output={tmp_path}/demo"]


def test_a_local_list_travels_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one file of the working directory, its own relative lines spelled out; a list in a store is named only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("\ufeff# mine\ns3://b/a.tar?sig=1\nb.tar\n\n", encoding="utf-8")
    shipment, local = sent("verify", "s3://b/o", "--input", "@list.txt", "--input", "@s3://b/list.txt")
    assert shipment.arguments[1:3] == ["--input=@lists/0.txt", "--input=@s3://b/list.txt"]
    assert shipment.lists == {"lists/0.txt": f"# mine\ns3://b/a.tar?sig=1\n{tmp_path}/b.tar\n\n"}
    assert local == [f"{tmp_path}/b.tar"]
    with pytest.raises(UsageError, match="the list cannot be read"):
        sent("verify", "s3://b/o", "--input", "@none.txt")
