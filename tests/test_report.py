"""The report of real runs in a real browser: right figures, whole charts, no request; nothing of strangers runs."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import planted
import pytest
from containers import write_tar
from pictures import broken, jpeg
from typer.testing import CliRunner

import pipeline
from jobs.__main__ import app
from pipeline import index, vector_map, versions
from pipeline.config import RunConfig
from pipeline.errors import UsageError
from pipeline.listing import list_shards
from pipeline.output import Root
from pipeline.progress import read_notes
from pipeline.receipts import read_receipts
from pipeline.report import Report, check_extra, report
from pipeline.run import COMMITTED, REFUSED, embed

pytestmark = pytest.mark.usefixtures("ray_session")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
NO_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and none is on the PATH")
# A tar's names are anybody's; a dot would end the key.
SCRIPT = "</script><script>window['hit']=1</script>"
HANDLER = "\"><img src=x onerror=window['hit']=1>"
SIGNED = "https://h.test/a?X-Amz-Signature=SECRET"
ENTITY = "&lt;b&gt; %{x} $x^2$ \u202egpj"
CLASS = "<a href=\"javascript:window['hit']=1\">class</a> <b>"
CHARTS = {
    "throughput", "at_work", "busy", "slow", "rejects", "classes", "confidence", "calibration", "confusions", "runs",
    "norms", "map", "similarity",
}  # fmt: skip


def config(folder: Path, **changes: Any) -> RunConfig:
    asked = RunConfig(
        inputs=(str(folder / "in"),),
        output=str(folder / "out"),
        model="test_vit",
        weights="random:0",
        precision="fp32",
        labels=str(folder / "labels.txt"),
        batch_size=4,
        max_reject_rate=0.3,
        actors=(1, 1),
    )
    return replace(asked, **changes)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A folder with `in` and `out`: two versions, the second with a shard of hostile names more; and a refused run."""
    folder = tmp_path_factory.mktemp("report")
    oracle.write_shards(folder / "in")
    (folder / "labels.txt").write_text("".join(f"{CLASS} {i}\n" for i in range(1000)))
    first = embed(config(folder), lambda line: None)
    names = {f"{key}.jpg": jpeg(60, 40, seed=i) for i, key in enumerate((SCRIPT, HANDLER, ENTITY, SIGNED))}
    names |= {f"{key}-cut.jpg": broken()["jpeg_rgb_cut"][1] for key in (SCRIPT, HANDLER)}
    write_tar(folder / "in" / "hostile.tar", names)
    second = embed(config(folder), lambda line: None)
    refused = embed(config(folder, max_reject_rate=0.0), lambda line: None)
    assert (first.exit_code, second.exit_code, refused.exit_code) == (COMMITTED, COMMITTED, REFUSED)
    return folder


@pytest.fixture(scope="module")
def made(output: Path) -> Report:
    """Of the second run, with thumbnails."""
    root = Root(str(output / "out"))
    shards = list_shards([str(output / "in")])
    return report(root, version=2, shards=shards, html=str(output / "report.html"))


def test_the_figures_are_those_of_the_run(made: Report, output: Path) -> None:
    """Counts of the version and its list, speed of the run's own note, accuracy as the run counted it."""
    told, root = made.json, Root(str(output / "out"))
    first, second, _ = read_notes(root)
    assert (told["run"], told["version"], told["state"]) == (second.name, 2, "committed")
    assert told["result"] == second.result and second.machine["cores"] >= 1 and second.machine["memory_bytes"] > 2**30
    assert (told["rows"], told["rejects"]) == (25, {"truncated": 3, "corrupt": 1, "missing_image": 1})
    assert told["verdict"].startswith("Embedded 1 shard of 4 at ")
    assert told["verdict"].endswith("Version 2 holds 25 rows; 5 samples (16.7%) were rejected.")
    assert read_receipts(root, first.name).num_rows == 3 and told["timeline"]["shards"] == 1
    assert told["timeline"]["slowest"][0]["shard"] == "hostile"
    rows = told["distributions"]
    assert (rows["rows"], rows["of"], sum(rows["norm"]["counts"])) == (25, 25, 25)
    assert sum(c["images"] for c in rows["classes"]) == 25 and rows["classes_there"] == 1000
    assert rows["accuracy"]["labelled"] == second.result["labelled"] == 21
    for key in ("top1", "top5"):
        assert rows["accuracy"][key] == pytest.approx(second.result[key])
    assert told["change"] == {
        "before": 1, "same_set": True, "added": 1, "changed": 0, "removed": 0, "named": ["hostile"],
        "rows_before": 21, "rejected_before": 3,
    }  # fmt: skip
    assert told["drift"]["ids"] == 21 and told["drift"]["mean_cosine"] == pytest.approx(1)
    assert told["thumbnails"] == 25 + 3  # all rows, and what decodes of the cut images
    json.dumps(told, allow_nan=False)


def test_signatures_are_in_no_report(made: Report) -> None:
    """A key may be a signed URL: neither the page nor `--json` holds what signs it."""
    for text in (Path(made.path).read_text(), json.dumps(made.json)):
        assert "SECRET" not in text and "Amz" not in text
    assert "https://h.test/a" in Path(made.path).read_text()


def test_a_refused_run_tells_why_and_what_it_has(output: Path) -> None:
    """The newest run; it made no version, and its rejects are shown."""
    root = Root(str(output / "out"))
    made = report(root)
    assert made.json["state"] == "refused" and made.json["version"] is None
    assert made.json["verdict"].startswith("The run was refused by a gate. Its set has 25 rows in 4 shards; 5 ")
    assert Path(made.path).parent == output / "out" / "reports" and Path(made.path).stat().st_size == made.json["bytes"]
    page = Path(made.path).read_text()
    assert "--max-reject-rate is 0.00%" in page and "name the input again" in page
    assert made.json["thumbnails"] == 0 and "data:image/jpeg" not in page.partition('id="data"')[0]
    assert versions.numbers(root) == [1, 2]


def test_one_command_writes_it(output: Path) -> None:
    """Without `--html` below reports/; the path is all of stdout. `gc` and `status` live with what lies there."""
    runner = CliRunner()
    result = runner.invoke(app, ["report", str(output / "out"), "--version", "1"])
    path = Path(result.stdout.strip())
    assert result.exit_code == 0 and path.is_file() and path.parent == output / "out" / "reports"
    assert "Version 1 holds 21 rows" in result.stderr
    assert runner.invoke(app, ["status", str(output / "out")]).exit_code == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--version", "9"], "has no version 9: it has 1, 2"),
        (["--run", "run-x"], "--run run-x: {out} has no such run; the last ones: run-"),
        (
            ["--run", "{run}", "--version", "2"],
            "--version 2: the run {run} made version 1: leave out --version or --run",
        ),
        (["--html", "{tmp}/none/report.html"], "--html {tmp}/none/report.html: there is no folder {tmp}/none"),
        (["--input", "{tmp}/other/*.tar"], "none of this version's"),
        (["--input", "{tmp}/none/*.tar"], "nothing matches"),
    ],
)
def test_a_mistake_ends_with_2_and_one_sentence(output: Path, tmp_path: Path, args: list[str], says: str) -> None:
    write_tar(tmp_path / "other" / "x.tar", {"k.jpg": jpeg()})
    run = read_notes(Root(str(output / "out")))[0].name
    filled = [a.format(tmp=tmp_path, run=run) for a in args]
    version = [] if "--version" in args else ["--version", "2"] if "--run" not in args else []
    result = CliRunner().invoke(app, ["report", str(output / "out"), *version, *filled])
    assert result.exit_code == 2, result.output
    assert says.format(tmp=tmp_path, out=output / "out", run=run) in result.stderr and result.stderr.count("\n") == 1


def test_figures_of_a_sample_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near-duplicates through the index are of all rows, the median of the sample; other weights are told too."""
    monkeypatch.setattr(vector_map, "SAMPLE_ROWS", 16)
    root, rows = Root(str(tmp_path)), np.random.default_rng(5).normal(size=(60, 8)).astype(np.float32)
    for weights in "01":
        version = planted.commit(root, {"a": rows}, weights_sha256=weights * 64)
    index.build(root, version, say=lambda line: None)
    page = Path(report(root).path).read_text()
    assert "No two of 60 images have" in page and "Among a sample of 16, the median image" in page
    assert "of a sample of 16 to its nearest other" in page and "very many as similar" not in page
    assert "of an image&#39;s two vectors; the weights differ" in page


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_extra()
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=r"plotly is not here: pip install 'shard2vec\[report\]'"):
        check_extra()


# in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser: Any, made: Report) -> Iterator[Any]:
    """The report on a desktop, in light; what its console said and what it asked for are kept on the page."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened.set_default_timeout(120_000)
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    show(opened, made)
    yield opened
    opened.close()


def show(page: Any, made: Report) -> None:
    page.goto(Path(made.path).resolve().as_uri())
    page.wait_for_selector("html[data-drawn=yes]")


MARKS = ".bars path, .scatterlayer .points path, .scatterlayer .js-line, .scatterlayer .js-fill, .heatmaplayer image"


@NO_BROWSER
def test_it_shows_every_chart_asks_for_nothing_and_says_nothing(page: Any) -> None:
    """Each with marks of some size; the console is silent; the only request is for the file itself."""
    drawn = page.evaluate(
        """marks => Object.fromEntries([...document.querySelectorAll(".chart")].map(box => [box.dataset.chart,
        [...box.querySelectorAll(marks)].map(m => m.getBoundingClientRect()).filter(b => b.width + b.height > 0).length
        ]))""",
        MARKS,
    )
    assert drawn.keys() == CHARTS and all(drawn.values()), drawn
    assert page.evaluate("document.querySelectorAll('.js-plotly-plot').length") == len(CHARTS)
    assert page.locator('[data-chart="map"] .points path').count() == 25
    assert page.said == [] and [url for url in page.asked if not url.startswith("data:")] == [page.url]
    assert page.title() == "test_vit, version 2 – shard2vec report"


@NO_BROWSER
def test_thumbnails_are_pictures_and_rejects_that_decode_have_one(page: Any) -> None:
    sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(sizes) > 60 and all(done and 0 < width <= 128 for done, width, _ in sizes)
    assert all(alt for *_, alt in sizes)
    examples = page.locator(".examples li")
    with_picture = [e.locator("img").count() for e in examples.all()]
    reasons = examples.locator("h3").all_inner_texts()
    assert list(zip(reasons, with_picture, strict=True)) == [
        *[("truncated", 1)] * 3, ("corrupt", 0), ("missing_image", 0),
    ]  # fmt: skip


@NO_BROWSER
def test_nothing_of_strangers_runs(page: Any) -> None:
    """Keys and class names that would be markup are shown as text, in the page, its charts and the card."""
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.scripts.length") == 3
    assert page.locator("a[href^=javascript]").count() == 0 and page.locator("img[src=x]").count() == 0
    text = page.inner_text("body")
    assert SCRIPT in text and HANDLER in text
    assert CLASS in page.locator("bdi.what").first.get_attribute("title")
    assert "\u202e" not in text and "\\u202egpj" in text
    labels = page.locator('[data-chart="classes"] .yaxislayer-above text').all_text_contents()
    assert labels and all(label.startswith("<a href=") for label in labels)
    assert page.locator(".chart b, .chart a:not(.modebar-btn)").count() == 0


@NO_BROWSER
def test_the_map_shows_the_picture_under_the_pointer(page: Any) -> None:
    point = page.locator('[data-chart="map"] .points path').first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 40, box["y"] - 40)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.wait_for_selector("#card:not([hidden]) img")
    text = page.inner_text("#card")
    ids = {r["id"] for r in pipeline.open_dataset(made_output(page)).to_table(columns=["id"]).to_pylist()}
    assert any(i in text for i in ids) and CLASS in text
    assert page.evaluate("document.querySelector('#card img').naturalWidth") > 0


def made_output(page: Any) -> str:
    return str(page.locator("dt", has_text="output").last.locator("xpath=following-sibling::dd[1]").inner_text())


@NO_BROWSER
def test_it_follows_the_scheme_with_its_charts(page: Any) -> None:
    """From light to dark and back without a reload; text stays readable: WCAG's contrast of 4.5 on both."""
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(
            """() => getComputedStyle(document.querySelector('[data-chart="classes"] .yaxislayer-above text')).fill
            === getComputedStyle(document.body).color"""
        )
        seen[scheme] = page.evaluate(
            """() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('[data-chart="classes"] .yaxislayer-above text')).fill,
            getComputedStyle(document.querySelector('[data-chart="classes"] .bars path')).fill,
            getComputedStyle(document.querySelector('.lead')).color]"""
        )
        ground, *texts = seen[scheme]
        assert all(contrast(ground, text) >= 4.5 for text in (texts[0], texts[2])), seen
        assert contrast(ground, texts[1]) >= 3  # a bar
    page.emulate_media(color_scheme="light")
    assert all(a != b for a, b in zip(seen["light"], seen["dark"], strict=True)), seen


def contrast(one: str, other: str) -> float:
    """Of two colours as CSS computes them, by WCAG's formula."""

    def luminance(colour: str) -> float:
        parts = [float(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@NO_BROWSER
def test_a_phone_shows_it_without_scrolling_sideways(page: Any) -> None:
    """At 390 and 320 pixels, and charts are as wide as their cards; the screenshots of both schemes differ."""
    shots = []
    for width in (320, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(
            """() => [...document.querySelectorAll(".chart")].every(box =>
            Math.abs(box.querySelector(".main-svg").getBoundingClientRect().width - box.clientWidth) < 2)""",
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shots.append(page.screenshot())
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert shots[0] != shots[1]
