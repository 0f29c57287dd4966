"""The scheduled job: one at a time, gated, complete before it is current, cleaned up, and held after a rollback."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
from containers import write_tar
from pictures import jpeg
from test_jobs import call
from test_jobs_killed import wait_for
from test_run import config

from jobs.reembed import _line
from pipeline import lease as lease_module
from pipeline import readers, versions
from pipeline.bill import bill
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.lease import Lease, holder, latest
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.progress import Note, State, read_notes, sets_in_use
from pipeline.reembed import Terms, reembed
from pipeline.result import Result
from pipeline.rollback import roll_back
from pipeline.run import plan
from pipeline.verify import verify

IMAGES = 12  # a shard: two of them are eleven ids and more


def shard(folder: Path, name: str, seed: int, images: int = IMAGES) -> Path:
    return write_tar(folder / f"{name}.tar", {f"{i:02d}.jpg": jpeg(90, 70, seed=seed + i) for i in range(images)})


@pytest.fixture
def asked(tmp_path: Path) -> RunConfig:
    """Two shards of twelve images, and an output beside them."""
    shard(tmp_path / "in", "a", 0)
    shard(tmp_path / "in", "b", 100)
    return config(tmp_path / "in", tmp_path / "out", max_reject_rate=0.0)


def publish(asked: RunConfig) -> None:
    """What a run would embed, in this process and without Ray; its job has only to commit."""
    planned = plan(asked, lambda line: None)
    job = replace(made.job(planned.root.url), vectors=planned.vectors, labels=planned.labels)
    vectors = planned.vectors
    versions.create_set(planned.root, vectors.folder, vectors.as_dict() | {"set": vectors.name})
    made.embedder(job, net=planned.module)(planned.todo, lambda receipt: None)


def committed(asked: RunConfig, **terms: Any) -> Result:
    publish(asked)
    return run(asked, **terms)


def run(asked: RunConfig, **terms: Any) -> Result:
    return reembed(asked, Terms(**terms), lambda line: None)


def told(result: Result, *keys: str) -> tuple[Any, ...]:
    return (result.exit_code, *(result.json[key] for key in keys))


def version(asked: RunConfig) -> versions.Version:
    return versions.current(Root(asked.output))


# What the contract has in `embed --json`, however it ended.
ALWAYS = (
    *("set", "version", "shards", "shards_embedded", "shards_unchanged", "shards_removed", "samples", "rows"),
    *("rejects", "seconds", "images_per_s", "limited_by"),
)
COUNTS = ("result", "version", "shards_embedded", "shards_unchanged", "shards_removed", "rows")


@pytest.mark.usefixtures("ray_session")
def test_five_scheduled_runs_over_a_changing_input(asked: RunConfig, tmp_path: Path) -> None:
    """First, one more, one changed and one gone, nothing new, another model: each commits what is there then."""
    folder, root = tmp_path / "in", Root(asked.output)
    assert told(run(asked), *COUNTS) == (0, "committed", 1, 2, 0, 0, 24)
    shard(folder, "c", 200)
    assert told(run(asked), *COUNTS) == (0, "committed", 2, 1, 2, 0, 36)
    shard(folder, "c", 300, 6)
    (folder / "a.tar").unlink()
    third = run(asked)
    assert told(third, *COUNTS, "removed", "lease") == (0, "committed", 3, 1, 1, 1, 18, ["a"], "held")
    assert told(run(asked), *COUNTS) == (0, "unchanged", 3, 0, 2, 0, 18)
    fifth = run(replace(asked, weights="random:1"))
    assert told(fifth, *COUNTS) == (0, "committed", 4, 2, 0, 0, 18)
    gates = fifth.json["gates"]
    assert (gates["against"], gates["rows_before"], gates["drift"]["ids"]) == (3, 18, 18)
    assert 0 <= gates["drift"]["overlap_at_10"] < 1 and gates["drift"]["same_weights"] is False
    assert verify(root, version(asked), list_shards(asked.inputs)).clean
    assert versions.numbers(root) == [2, 3, 4] and fifth.json["deleted"] > 0  # --keep 3
    assert holder(root) is None and latest(root)[0] == 5
    assert gates in [note.result.get("gates") for note in read_notes(root)]


def test_a_refused_result_keeps_its_files_and_the_current_version(asked: RunConfig) -> None:
    """All bounds that it missed are told with the figures; with others the same job has only to commit."""
    committed(asked)
    other = replace(asked, weights="random:1")
    publish(other)
    refused = run(other, min_rows=30, min_overlap=1.0, min_top1_agreement=1.0)
    drift = refused.json["gates"]["drift"]
    assert told(refused, "result", "version", "version_before") == (3, "refused", None, 1)
    assert refused.message == (
        f"24 rows, --min-rows is 30; overlap_at_10 is {drift['overlap_at_10']:.4f}, --min-overlap is 1; "
        f"top1_agreement is {drift['top1_agreement']:.4f}, --min-top1-agreement is 1; "
        "no version was committed, version 1 stays"
    )
    assert version(asked).version == 1
    done = run(other, min_overlap=drift["overlap_at_10"])
    assert told(done, *COUNTS) == (0, "committed", 2, 0, 2, 0, 24)


def test_an_input_that_shrinks_by_mistake_is_refused(asked: RunConfig, tmp_path: Path) -> None:
    """Half of the rows gone: refused below --max-shrink, let through at it; small outputs may shrink as they like."""
    committed(asked)
    (tmp_path / "in" / "b.tar").unlink()
    refused = run(asked, max_shrink=0.4)
    assert told(refused, "result") == (3, "refused") and version(asked).version == 1
    assert "12 rows are 50% fewer than the 24 of version 1, --max-shrink is 40%" in refused.message
    assert told(run(asked, max_shrink=0.5), "result", "rows") == (0, "committed", 12)
    shard(tmp_path / "in", "a", 0, 1)
    assert told(committed(asked), "result", "rows") == (0, "committed", 1)


def test_metrics_beside_vectors_commit_nothing_and_say_so(asked: RunConfig) -> None:
    """They end well, and the version that readers use stays: `unchanged`."""
    committed(asked)
    metrics = committed(replace(asked, only_metrics=True))
    assert told(metrics, "result", "version", "version_before", "rows") == (0, "unchanged", None, 1, 24)
    assert versions.numbers(Root(asked.output)) == [1]


def test_a_bound_on_what_cannot_be_measured_refuses(asked: RunConfig) -> None:
    """Where classes were never kept, no agreement is known; without the bound it is only not measured."""
    committed(replace(asked, outputs=("embedding",)))
    refused = committed(asked, min_top1_agreement=0.1)
    assert refused.exit_code == 3
    assert "top1_agreement cannot be measured (a set keeps no classes), --min-top1-agreement is 0.1" in refused.message
    assert told(run(asked, min_overlap=1.0), "result") == (0, "committed")  # the very vectors


def test_a_second_start_does_nothing_and_says_who_works(asked: RunConfig, tmp_path: Path) -> None:
    """Exit 0, with host and pid, since and until; nothing is written."""
    root = Root(asked.output)
    with Lease(root, 60):
        taken = run(asked)
        assert told(taken, "result", *ALWAYS[:-1]) == (0, "taken", None, None, *[0] * 6, {}, 0, 0.0)
        assert taken.json["limited_by"] == "nothing to do"
        assert taken.json["lease"].startswith(f"taken-by {lease_module.platform.node()}:{os.getpid()} since 20")
        assert not (tmp_path / "out" / "versions").exists() and not (tmp_path / "out" / "sets").exists()
    assert told(committed(asked), "result") == (0, "committed")


@pytest.mark.usefixtures("ray_session")
def test_who_lost_the_lease_commits_nothing(asked: RunConfig) -> None:
    """Another takes over while it works, as where clocks differ by a day: 1, a sentence, and the work is not lost."""
    root = Root(asked.output)

    def overtaken(line: str) -> None:
        if "to embed" in line:
            claim = replace(latest(root)[1], token="another", host="elsewhere", pid=7)  # type: ignore[type-var]
            root.put_new("reports/lease/00000002.json", json.dumps(vars(claim)).encode())

    ended = reembed(asked, Terms(), overtaken)
    assert told(ended, "result", "version", "shards_embedded") == (1, "failed", None, 2)
    assert "taken over by elsewhere:7 since" in ended.message and "run the same command" in ended.message
    assert versions.numbers(root) == [] and holder(root) is not None
    root.delete("reports/lease/00000002.json")
    assert told(run(asked), *COUNTS) == (0, "committed", 1, 0, 2, 0, 24)


def test_a_scheduler_that_ends_it_leaves_no_lease(asked: RunConfig) -> None:
    """SIGTERM is Ctrl-C from the start on, which the command line ends with 130; the next start may work."""
    root = Root(asked.output)
    seen: list[bool] = []
    handler = signal.getsignal(signal.SIGTERM)

    def ends(line: str) -> None:
        seen.append(holder(root) is not None)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        reembed(asked, Terms(), ends)
    assert seen == [True] and holder(root) is None and signal.getsignal(signal.SIGTERM) == handler


def test_what_was_rolled_back_does_not_come_again_by_itself(asked: RunConfig, tmp_path: Path) -> None:
    """Another model is held over a new shard too, and embeds nothing; the old model passes; or the flag lets it."""
    other, root = replace(asked, weights="random:1"), Root(asked.output)
    committed(asked)
    committed(other)
    roll_back(root)
    assert told(run(other), "result", "version_before") == (3, "refused", 3)
    shard(tmp_path / "in", "c", 200)
    refused = run(other)
    assert told(refused, "result", "shards_embedded") == (3, "refused", 0)
    assert "version 3 rolled back to version 1, away from set " in refused.message
    assert "--after-rollback" in refused.message and version(asked).version == 3
    assert told(committed(asked), "result", "version", "rows") == (0, "committed", 4, 36)
    assert told(committed(other), "result", "version") == (0, "committed", 5)  # a decision made after the rollback's
    roll_back(root)
    assert told(run(other, after_rollback=True), "result", "version") == (0, "committed", 7)


def test_an_input_that_was_rolled_back_is_held_until_it_changes(asked: RunConfig, tmp_path: Path) -> None:
    """Within one set it is the list of files: the same shards again are refused, repaired ones are not."""
    committed(asked)
    shard(tmp_path / "in", "bad", 200)
    committed(asked)
    roll_back(Root(asked.output))
    refused = run(asked)
    assert told(refused, "result") == (3, "refused")
    assert "away from the files of version 2" in refused.message
    shard(tmp_path / "in", "bad", 300)
    assert told(committed(asked), "result", "version") == (0, "committed", 4)


def test_clean_up_spares_what_an_unfinished_run_may_go_on_from(asked: RunConfig, tmp_path: Path) -> None:
    """A set that somebody embeds by hand and interrupted yesterday stays; one that was given up last month goes."""
    root = Root(asked.output)
    committed(asked)
    for name, days in (("by_hand@1", 1), ("given_up@2", 30)):
        root.put_new(f"sets/{name}/embeddings/x-1.parquet", b"")
        state = State(set=name, shards=9, started=time.time() - days * 86400)
        note = Note(root, state)
        note.close("interrupted")
        note_name = next(n for n in root.list("reports") if json.loads(root.read(n)).get("set") == name)
        aged = vars(state) | {"updated": state.started}
        root.overwrite(note_name, json.dumps({k: v for k, v in aged.items() if not k.startswith("_")}).encode())
    shard(tmp_path / "in", "c", 200)
    assert told(committed(asked, keep=1), "result", "deleted") == (0, "committed", 2)  # version 1 and the given up
    assert {name.split("/")[1] for name in root.list("sets")} == {"by_hand@1", version(asked).set}
    assert sets_in_use([State(set="x", shards=1, state="failed"), State(set="x", shards=1, state="committed")]) == set()
    assert told(run(asked, keep=None), "result", "deleted") == (0, "unchanged", 0)


@pytest.mark.usefixtures("ray_session")
def test_the_bill_is_counted_where_it_can_be_and_writes_nothing(asked: RunConfig, tmp_path: Path) -> None:
    """Nothing known; then another model over counted shards and a new one by bytes an image; what goes is named."""
    dry = replace(asked, dry_run=True)
    first = run(dry)
    assert told(first, "result", "images", "hours", "lease", "shards_to_embed") == (0, "dry-run", None, None, "free", 2)
    assert first.message.endswith(
        "shards to embed: 2; images: unknown (no former run to estimate by); "
        "time: unknown: no former run to go by; shards to drop: 0"
    )
    assert not Path(asked.output).exists()
    run(asked)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(asked.output).rglob("*"))
    again = run(dry)
    assert told(again, "images", "images_estimated", "hours", "shards_to_embed") == (0, 0, False, 0.0, 0)
    speed = read_notes(Root(asked.output))[-1].result["images_per_s"]
    other = run(replace(dry, weights="random:1"))
    assert told(other, "images", "images_estimated", "images_per_s") == (0, 24, False, speed)
    assert other.json["hours"] == pytest.approx(24 / speed / 3600)
    assert "images: 24 (counted by version 1); time: about " in other.message
    assert f" s, at the {speed:,.1f} images/s of the last run, of another set, test_vit@" in other.message
    shutil.copy(tmp_path / "in" / "a.tar", tmp_path / "in" / "c.tar")
    (tmp_path / "in" / "b.tar").unlink()
    more = run(dry)
    assert told(more, "images", "images_estimated", "removed", "to_embed") == (0, 12, True, ["b"], ["c"])
    assert "images: about 12 (bytes an image of the" in more.message and "shards to drop: 1 (b)" in more.message
    told_by, _ = bill(plan(asked, lambda line: None), None)  # as where no version is left: by the former run's bytes
    assert told_by["images_estimated"] and abs(told_by["images"] - 12) <= 12
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(asked.output).rglob("*")) == before
    with Lease(Root(asked.output)) as lease:
        assert run(dry).json["lease"].startswith("taken-by ")
        lease.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_rows": -1},
        {"max_shrink": 1.1},
        {"min_overlap": -0.1},
        {"min_top1_agreement": float("nan")},
        {"keep": 0},
    ],
)
def test_terms_name_the_value_that_cannot_be(wrong: dict[str, Any]) -> None:
    """The flag and its value."""
    flag, value = next(iter(wrong.items()))
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} {value}: must"):
        Terms(**wrong)


def pairs(line: str) -> dict[str, str]:
    first, *rest = shlex.split(line)
    assert first == "reembed"
    return dict(pair.split("=", 1) for pair in rest)


@pytest.mark.usefixtures("ray_session")
def test_the_line_for_a_scheduler(asked: RunConfig, tmp_path: Path) -> None:
    """One line of key=value on stdout, whatever the end; a job file stands for the flags; wrong ones end with 2."""
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {tmp_path}/in\noutput: {asked.output}\nmodel: test_vit\nweights: random:0\nactors: 1\nkeep: all\n"
        "max_shrink: 0.9\nprecision: fp32\n"
    )
    argv = ["reembed", *shlex.split(" ".join(expand(job)))]
    code, out, err = call(*argv)
    line = pairs(out)
    assert code == 0 and len(out.splitlines()) == 1, err
    assert {k: line[k] for k in ("result", "exit", "version", "rows", "rejects", "lease", "deleted")} == {
        **{"result": "committed", "exit": "0", "version": "1", "rows": "24", "rejects": "0", "lease": "held"},
        "deleted": "0",
    }
    code, out, _ = call(*argv, "--min-rows", 25)
    assert (code, pairs(out)["result"], pairs(out)["version_before"]) == (3, "refused", "1")
    assert pairs(out)["reason"].startswith("24 rows, --min-rows is 25; no version")
    with Lease(Root(asked.output)):
        code, out, _ = call(*argv)
        assert (code, pairs(out)["result"]) == (0, "taken") and "taken-by" in pairs(out)["lease"]
        code, out, _ = call(*argv, "--json")
        taken = json.loads(out)
        assert code == 0 and taken["lease"].startswith("taken-by ")
        assert [taken[key] for key in ALWAYS[1:9]] == [1, 2, 0, 2, 0, 24, 24, {}]
    for wrong, message in (
        (["--keep", "some"], "--keep some"),
        (["--lease-timeout", 1], "--lease-timeout 1.0: must be 2"),
    ):
        code, out, err = call(*argv, *wrong)
        assert (code, pairs(out)["result"], pairs(out)["exit"]) == (2, "failed", "2")
        assert message in pairs(out)["reason"] and message in err
    assert _line("failed", 1, {"output": 'a "b\\c"'}, "") == 'reembed result=failed exit=1 output="a \\"b\\\\c\\""'


def expand(job: Path) -> list[str]:
    from jobs import job_file

    return job_file.expand(["--config", str(job)])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_run_is_taken_up_once_its_lease_has_run_out(asked: RunConfig, tmp_path: Path) -> None:
    """Blue and green: killed amid another model, readers keep their version; then it goes on and is current."""
    run(asked)
    root = Root(asked.output)
    argv = ["--input", f"{tmp_path}/in", "--output", asked.output, "--model", "pit_ti_224", "--weights", "random:0"]
    argv += ["--actors", "1", "--batch-size", "2", "--precision", "fp32", "--lease-timeout", "8"]
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs", "reembed", *argv],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    green = tmp_path / "out" / "sets"
    wait_for(lambda: list(green.glob("pit*/embeddings/*.parquet")) or job.poll() is not None)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert versions.numbers(root) == [1] and all("test_vit@" in f for f in readers.files(asked.output))
    code, out, err = call("reembed", *argv)
    if holder(root) is not None:
        assert (code, pairs(out)["result"]) == (0, "taken") and f":{job.pid} since" in err
    wait_for(lambda: holder(root) is None)
    code, out, err = call("reembed", *argv, "--lease-timeout", 60, "--json")
    assert code == 0, err
    ended = json.loads(out)
    assert (ended["version"], ended["shards_unchanged"] + ended["shards_embedded"]) == (2, 2)
    assert ended["shards_unchanged"] >= 1 and ended["gates"]["drift"]["unmeasured"] == {
        "mean_cosine": "the models differ"
    }
    assert verify(root, version(asked), list_shards(asked.inputs)).clean
