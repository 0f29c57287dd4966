"""How a run ends as JSON: the same keys however far it came."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_run import config

from pipeline import reembed as reembed_module
from pipeline import run as run_module
from pipeline.errors import Stalled
from pipeline.reembed import Terms, reembed


def test_a_run_that_stalls_while_it_plans_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node came: the error, the exit code and the output; of `reembed` with its own keys, in a dry run too."""

    def stalls(*_: object) -> None:
        raise Stalled("no node in 600 s")

    (tmp_path / "out" / "versions").mkdir(parents=True)  # so that no Ray starts ahead
    asked, said = config(tmp_path, tmp_path / "out"), "no node in 600 s; run the same command to go on"
    want = {"error": said, "exit_code": 4, "output": str(tmp_path / "out")}
    monkeypatch.setattr(run_module, "plan", stalls)
    monkeypatch.setattr(reembed_module, "plan", stalls)
    ended = run_module.embed(asked, lambda line: None)
    assert (ended.exit_code, ended.message, ended.json) == (4, said, want)
    scheduled = reembed(asked, Terms(), lambda line: None)
    assert scheduled.json == want | {"result": "stalled", "lease": "held", "version_before": None}
    dry = reembed(replace(asked, dry_run=True), Terms(), lambda line: None)
    assert (dry.exit_code, dry.json) == (4, want | {"result": "stalled"})
