"""What a run and an output say to Prometheus, asked by a real one; the alerts and the dashboard that read it."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

import made
import oracle
import prometheus_server
import pytest
import yaml
from prometheus_server import IS_THERE, WHY_NOT, Prometheus, promtool
from test_jobs import call

from pipeline import metrics, versions
from pipeline.embed import STAGES, Receipt
from pipeline.listing import list_shards
from pipeline.metrics import Metric, of_output, text
from pipeline.output import Root
from pipeline.progress import Note, State, read_notes

DEPLOY = Path(__file__).parent.parent / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "shard2vec.json").read_text())
needs_prometheus = pytest.mark.skipif(not IS_THERE, reason=WHY_NOT)


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> dict[str, str]:
    """Panel and series → expression, as Grafana sends it with both variables at All."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$output", ".*").replace("$set", ".*")
        for panel in panels()
        for target in panel["targets"]
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


# names


def test_names_follow_the_conventions() -> None:
    """A counter ends in _total and a gauge does not; units are base units; no two share a name; no label is a shard."""
    every = {*metrics.RUN, *metrics.OUTPUT}
    assert len({m.name for m in every}) == len(every)
    for metric in every:
        assert re.fullmatch(r"[a-z][a-z_]*", metric.name), metric
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric
        assert not re.search(r"milli|micro|percent|minutes|hours", metric.name), metric
        assert metric.help[0].isupper() and bool(metric.label) == bool(metric.values), metric
        assert {metric.label} <= {"", "reason", "stage", "state"}


@pytest.mark.parametrize("where", ["dashboard", "alerts"])
def test_expressions_name_only_what_is_exported(where: str) -> None:
    """`ray_` goes before what a run exports, and before nothing else; labels that select have values that there are."""
    asked_by_variables = [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    found = {
        "dashboard": [*dashboard_expressions().values(), *asked_by_variables],
        "alerts": [rule["expr"] for rule in rules()],
    }[where]
    ours = {m.full_name: m for m in metrics.OUTPUT} | {f"ray_{m.full_name}": m for m in metrics.RUN}
    for expression in found:
        used = re.findall(r"((?:ray_)?shard2vec_\w+)(\{[^}]*\})?", expression)
        assert used
        for name, selected in used:
            assert name in ours, expression
            for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selected):
                assert label in ours[name].label_names, expression
                assert label in metrics.BASE or set(values.split("|")) <= set(ours[name].values), expression
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= {*metrics.BASE, "reason", "stage", "state"}, expression


def test_panels_can_be_read() -> None:
    """Each has a title, a description, a unit and a legend; two do not lie on each other; all follow the variables."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["legendFormat"] and "$output" in target["expr"]
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= {w for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for w in by.split(", ")}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_alerts_say_what_to_do() -> None:
    """Each waits before it fires, has a severity and a summary, and leads to its own part of the runbook."""
    headings = re.findall(r"^#+ (.*)$", (DEPLOY.parent / "docs" / "watching.md").read_text(), re.MULTILINE)
    for rule in rules():
        assert rule["for"] and rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "docs/watching.md" and anchor == rule["alert"].lower() and rule["alert"] in headings


@needs_prometheus
def test_alerts_fire_when_they_should() -> None:
    """promtool's own tests of them: each fires after its time, on its labels, and stays silent beside."""
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", ALERTS.with_name("alerts_test.yaml"))
    tested = yaml.safe_load(ALERTS.with_name("alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tested for case in test["alert_rule_test"]]
    for fires in (True, False):
        assert {c["alertname"] for c in cases if bool(c["exp_alerts"]) == fires} >= {r["alert"] for r in rules()} - (
            set() if fires else {"Shard2vecRejectRate"}  # silent beside the one that fires, in the same case
        )


# an output


def value(root: Root, metric: Metric, **labels: str) -> float | None:
    found = [s.value for s in of_output(root) if s.metric == metric and labels.items() <= s.labels.items()]
    assert len(found) <= 1
    return found[0] if found else None


def test_an_output_tells_its_version_and_how_runs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version, rows, rejects and when; a run that died; and that a run ended well, though it made no version."""
    root = Root(str(tmp_path))
    note = Note(root, State(set="vit@1", shards=1))
    assert (value(root, metrics.VERSION), value(root, metrics.RUNS)) == (0, 1)
    assert value(root, metrics.COMMIT) is None and value(root, metrics.SUCCESS) is None
    note.close("running")  # as a killed one leaves it
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 200)
    assert value(root, metrics.RUNS) == 0
    assert [s.labels["state"] for s in of_output(root) if s.metric == metrics.LAST_RUN and s.value] == ["died"]

    receipt = made.receipt("w", 0, 1, rows=7, rejects=2)
    assert receipt.files
    version = versions.commit(root, "vit@1", [receipt.files])
    assert (value(root, metrics.VERSION), value(root, metrics.VERSION_ROWS)) == (1, 7)
    assert value(root, metrics.VERSION_REJECTS, reason="corrupt") == 2
    assert value(root, metrics.VERSION_REJECTS, reason="empty") == 0
    assert value(root, metrics.COMMIT, set="vit@1") == metrics.unix_time(version) == value(root, metrics.SUCCESS)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 300)
    Note(root, State(set="vit@1", shards=1, started=time.time())).close("committed")
    assert value(root, metrics.SUCCESS) == read_notes(root)[-1].updated > (value(root, metrics.COMMIT) or 0) + 200
    assert value(root, metrics.LAST_RUN, state="committed") == 1 and value(root, metrics.LAST_RUN, state="died") == 0


@needs_prometheus
def test_status_prints_it_for_a_textfile_collector(tmp_path: Path) -> None:
    """promtool finds nothing to mend, whatever the output's name holds; --json beside it is a mistake."""
    root = Root(str(tmp_path / 'a "b" \\c'))
    Note(root, State(set="vit@1", shards=1)).close("refused")
    code, out, _ = call("status", root.url, "--metrics")
    assert code == 0 and out == text(of_output(root))
    assert promtool("check", "metrics", stdin=out) == ""
    assert f'output="{tmp_path}/a \\"b\\" \\\\c",set="vit@1",state="refused"}} 1' in out
    assert call("status", root.url, "--metrics", "--json")[0] == 2
    assert call("status", tmp_path / "none", "--metrics")[0] == 2


# a run


def test_a_worker_says_how_it_computes(shards: Path, tmp_path: Path) -> None:
    """Its batch size, and the seconds of all forward passes: those that its receipts come to, as do their number."""
    embedder = made.embedder(made.job(tmp_path, batch_size=4))
    done = made.receipts(embedder, list_shards([str(shards)]))
    said = embedder.activity.said()
    assert said["batch_size"] == 4
    assert 0 < said["forward_s"] == pytest.approx(sum(r.seconds["forward"] for r in done))
    for receipt in done:
        assert receipt.files and receipt.batches == -(-receipt.files.counts.rows // 4)


def test_a_long_pass_counts_while_it_lasts(tmp_path: Path, shards: Path) -> None:
    """On the CPU a batch may take longer than the gauge's window, which would show a device idle and then overfull."""
    embedder = made.embedder(made.job(tmp_path, batch_size=4))
    said, staging = list[float](), embedder._staging

    def slow(*batch: Any) -> Any:
        for _ in range(2):
            said.append(embedder.activity.said()["forward_s"])
            time.sleep(0.02)
        return staging(*batch)

    embedder._staging = slow  # type: ignore[assignment]
    made.receipts(embedder, list_shards([str(shards)])[:1])
    assert all(after - before >= 0.02 for before, after in zip(said[::2], said[1::2], strict=True)) and len(said) == 6


@pytest.mark.parametrize(
    ("after", "share", "busy"),
    [
        ({"a": 11.0, "b": 2.0}, 1.0, 0.2),  # 1 s and 1 s of two devices for 5 s
        ({"a": 13.0, "b": 2.0}, 0.5, 0.8),  # 3 s and 1 s of one
        ({"a": 13.0, "b": 4.0}, 0.5, 1.0),
        ({"new": 2.0}, 1.0, 0.4),  # its predecessor died
        ({"a": 1.0}, 1.0, 0.0),
        ({}, 1.0, 0.0),
    ],
)
def test_devices_are_busy_while_they_compute(after: dict[str, float], share: float, busy: float) -> None:
    """Over workers that have one each, share one, or were started meanwhile."""
    from pipeline.meters import device_busy

    assert device_busy({"a": 10.0, "b": 1.0}, after, 5.0, share) == pytest.approx(busy)


def test_metrics_beside_vectors_leave_the_last_commit(tmp_path: Path) -> None:
    """A run that ends well and makes no version is a success at its time, and no commit."""
    from pipeline.meters import Meters

    made_at = versions.commit(Root(str(tmp_path)), "x@1", [])
    meters = Meters(State(set="x@1", shards=0), str(tmp_path), made_at)
    meters.succeed(None)
    assert meters._commit_at == metrics.unix_time(made_at) and time.time() - meters._success_at < 60


class Watched(NamedTuple):
    server: Prometheus
    output: str
    told: dict[str, Any]  # the object of --json
    receipts: list[Receipt]
    at: float  # a moment when Prometheus had all of it

    def value(self, metric: Metric, **labels: str) -> float | None:
        selected = "".join(f', {label}="{value}"' for label, value in labels.items())
        series = f'ray_{metric.full_name}{{output="{self.output}"{selected}}}'
        return self.server.value(f"sum(last_over_time({series}[10m]))")


@pytest.fixture(scope="module")
def watched(shards: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A run with broken images among its input, on a Ray that a Prometheus scrapes as it would scrape a cluster's."""
    import ray
    from ray._private.metrics_agent import PrometheusServiceDiscoveryWriter
    from test_run import config

    from pipeline import run

    folder, receipts, watch = tmp_path_factory.mktemp("watched"), list[Receipt](), run.watch

    def kept(*asked: Any) -> Iterator[Receipt]:
        for receipt in watch(*asked):
            receipts.append(receipt)
            yield receipt

    gcs = ray.get_runtime_context().gcs_address
    # The dashboard, which this Ray lacks, writes the file with this.
    PrometheusServiceDiscoveryWriter(gcs, str(folder)).write()
    (discovery,) = folder.glob("*.json")
    with prometheus_server.prometheus(folder, {"file_sd_configs": [{"files": [str(discovery)]}]}, ALERTS) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "watch", kept)
            result = run.embed(replace(config(shards, folder / "out")), lambda line: None)
        assert result.exit_code == run.COMMITTED
        output = result.json["output"]
        success = f'ray_shard2vec_last_success_timestamp_seconds{{output="{output}"}}'
        for _ in range(600):
            found = server.query(f"{success}[5m]")
            if found and len(found[0]["values"]) >= 3:
                break
            time.sleep(0.1)
        assert found, server.get("targets")
        yield Watched(server, output, result.json, receipts, found[0]["values"][-1][0])


@needs_prometheus
def test_counters_are_what_the_receipts_say(watched: Watched) -> None:
    """Rows, rejects by reason, bytes, batches and seconds, exactly; every reason and stage has its series from 0."""
    receipts = watched.receipts
    assert watched.value(metrics.IMAGES) == sum(r.files.counts.rows for r in receipts if r.files) == 21
    for reason in metrics.REJECTS.values:
        counted = sum(r.files.counts.rejects.get(reason, 0) for r in receipts if r.files)
        assert watched.value(metrics.REJECTS, reason=reason) == pytest.approx(counted, rel=0, abs=1e-300)
        assert counted == watched.told["rejects"].get(reason, 0) == oracle.REJECTS.get(reason, 0)
    assert watched.value(metrics.READ) == sum(r.bytes_read for r in receipts) == watched.told["bytes_read"] > 0
    written = (Path(watched.output) / "sets").rglob("*.parquet")
    assert watched.value(metrics.WRITTEN) == sum(file.stat().st_size for file in written)
    assert watched.value(metrics.BATCHES) == 3 + 2 + 1  # of four images at most, of 11, 6 and 4 in three shards
    for stage in STAGES:
        seconds = sum(r.seconds[stage] for r in receipts)
        assert watched.value(metrics.STAGE_SECONDS, stage=stage) == pytest.approx(seconds)


@needs_prometheus
def test_gauges_tell_how_a_run_stands(watched: Watched) -> None:
    """At its end: every shard done, the commit's own time, no worker left; the batch size as asked for."""
    states = {state: watched.value(metrics.SHARDS, state=state) for state in metrics.SHARD_STATES}
    assert states == {"unchanged": 0, "done": 3, "failed": 0, "to_do": 0}
    assert (watched.value(metrics.RUN_IMAGES), watched.value(metrics.RUN_REJECTS)) == (21, 3)
    assert watched.value(metrics.WORKERS) == 0
    committed = metrics.unix_time(versions.current(Root(watched.output)))
    started, ended = watched.value(metrics.STARTED), watched.value(metrics.SUCCESS)
    assert started and ended and committed and watched.value(metrics.COMMIT) == committed
    assert int(started) <= committed <= ended < started + 600
    moved = watched.value(metrics.PROGRESS)
    assert moved and started < moved < ended


@needs_prometheus
def test_labels_are_few(watched: Watched) -> None:
    """Beside Ray's own labels and Prometheus' each series has those that its metric names, and no other."""
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId"}
    for metric in metrics.RUN:
        found = watched.server.get("series", **{"match[]": f'ray_{metric.full_name}{{output="{watched.output}"}}'})
        assert len(found) == (len(metric.values) or 1) or (metric == metrics.BATCH_SIZE and len(found) <= 1), metric
        for series in found:
            labels = {label for label in series if not label.startswith(("__", "otel_"))} - of_ray - {"instance", "job"}
            assert labels == set(metric.label_names) and series["set"] == watched.told["set"]
        named = f"ray_{metric.full_name}", f"ray_{metric.full_name.removesuffix('_total')}"  # as OpenMetrics has it
        said = [one for name in {*named} for one in watched.server.get("metadata", metric=name).get(name, [])]
        if found:
            assert [(one["type"], one["help"]) for one in said] == [(metric.kind, metric.help)]


# Nothing is to do any more, no worker lives; a run of a second may never have told its batch size.
MAY_BE_EMPTY = {"To go A", "Batch size A"}


@needs_prometheus
@pytest.mark.parametrize("series", dashboard_expressions())
def test_the_dashboard_shows_a_run(series: str, watched: Watched) -> None:
    """Each expression parses, and gives data of a run that has just ended."""
    found = watched.server.query(dashboard_expressions()[series], time=watched.at)
    assert found or series in MAY_BE_EMPTY
    assert all(set(one["metric"]) <= {*metrics.BASE, "reason", "stage", "state"} for one in found)


@needs_prometheus
def test_prometheus_runs_the_alerts(watched: Watched) -> None:
    """It has loaded them, each evaluates without an error, and none fires for a run that went well."""
    for _ in range(100):
        loaded = [r for g in watched.server.get("rules")["groups"] for r in g["rules"]]
        if all(rule["health"] == "ok" for rule in loaded):
            break
        time.sleep(0.1)
    assert {r["name"] for r in loaded} == {r["alert"] for r in rules()}
    assert {r["health"] for r in loaded} == {"ok"}
    assert [r["name"] for r in loaded if r["state"] == "firing"] == []
    with pytest.raises(HTTPError, match="400"):
        watched.server.query("sum by (rate(")
