"""A report's figures, charts and thumbnails → one HTML file that needs no network.

Names, keys, labels and messages are strangers' text: everything is escaped, data lies in blocks of JSON that hold no
`<`, and the page's policy lets only its own two scripts run and nothing be fetched.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import Any

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

import pipeline
from pipeline import report_charts as charts
from pipeline.legible import first_synonym, legible
from pipeline.originals import Originals
from pipeline.progress import duration, outcome
from pipeline.report_figures import Figures
from pipeline.report_verdict import limits, rate, reasons, verdict
from pipeline.vector_map import NEAR, Tile

BRIEF_CHARS = 40  # of a class in a table
Pictures = Mapping[str, bytes]  # JPEGs by id


def page(figures: Figures, originals: Originals | None) -> str:
    """The whole file. `originals`: None where no input was named to fetch thumbnails from."""
    pictures: Pictures = originals.pictures if originals else {}
    scripts = {"plotly": get_plotlyjs(), "own": _text("report.js")}
    drawn = _charts(figures, pictures)
    context = {
        "f": figures,
        "run": figures.run,
        "state": outcome(figures.run) if figures.run else "",
        "result": figures.run.result if figures.run else {},
        "charts": {name: chart.label for name, chart in drawn.items()},
        "verdict": verdict(figures),
        "limits": limits(figures),
        "reasons": reasons,
        "originals": originals,
        "picture_of": lambda image_id: Markup(_uri(pictures.get(image_id))),
        "near": NEAR,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "shard2vec": pipeline.__version__,
        "css": Markup(_text("report.css")),
        "scripts": {name: Markup(text) for name, text in scripts.items()},
        "policy": _policy(scripts.values()),
        "data": _block({"charts": {name: c.chart for name, c in drawn.items()}, "map": _cards(figures, pictures)}),
    }  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {
        "brief": lambda name: first_synonym(name, BRIEF_CHARS),
        "code": _code,
        "count": _count,
        "rate": rate,
        "share": _share,
        "duration": duration,
        "size": _size,
        "moment": _moment,
    }
    return environment.from_string(_text("report.html.j2")).render(context)


def _text(name: str) -> str:
    return (package_files("pipeline") / name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    """Of everything that the template puts out: text of ours is markup and stays, all other is made legible."""
    return legible(value, 600) if type(value) is str else value


def _policy(scripts: Any) -> str:
    """Nothing may be fetched, and no script runs but those of these texts."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _block(data: Any) -> Markup:
    """JSON for a script block: no `<` that could end it, no `&`, no line that JavaScript would break."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


# charts, with what they show in words


@dataclass(frozen=True)
class _Drawn:
    chart: charts.Chart
    label: str  # for those who do not see it


def _charts(f: Figures, pictures: Pictures) -> dict[str, _Drawn]:
    drawn: dict[str, _Drawn] = {}
    if f.timeline and f.timeline.images_per_s:
        fastest = max(f.timeline.images_per_s)
        drawn["throughput"] = _Drawn(
            charts.throughput(f.timeline), f"Images a second over time, {fastest:,.0f} at most"
        )
        drawn["at_work"] = _Drawn(charts.at_work(f.timeline), "Threads at work over time, by stage")
        drawn["slow"] = _Drawn(charts.slow_shards(f.timeline), "Seconds by stage of the shards that took longest")
    if f.run and any(f.run.result.get("stage_busy", {}).values()):
        busiest = f.run.result["limited_by"]
        drawn["busy"] = _Drawn(charts.busy(f.run.result), f"How busy each stage kept its threads; limited by {busiest}")
    if f.rejected and f.rejected.reasons:
        drawn["rejects"] = _Drawn(
            charts.reject_reasons(f.rejected), f"Rejects by reason: {reasons(f.rejected.reasons)}"
        )
    drawn |= _row_charts(f)
    accuracies = [r for r in f.runs if r["top1"] is not None]
    if len(accuracies) > 1:
        dated = [r | {"started": _moment(r["started"])[5:16]} for r in accuracies]
        drawn["runs"] = _Drawn(charts.accuracy_by_run(dated), "Top-1 and top-5 accuracy by run")
    if f.sampled and f.map:
        has_picture = [f.sampled.ids[point] in pictures for point in f.map.points]
        drawn["map"] = _Drawn(
            charts.vector_map(f.sampled, f.map, has_picture), f"Map of {len(f.map.points):,} images by two components"
        )
    if f.duplicates:
        d = f.duplicates
        some = f" of a sample of {d.nearest_among:,}" if d.nearest_among < d.among else ""
        label = f"Cosine of each image{some} to its nearest other, median {d.median:.3f}"
        drawn["similarity"] = _Drawn(charts.similarity(f.duplicates), label)
    if f.drift and f.drift.moved:
        drawn["moved"] = _Drawn(
            charts.class_moves(f.drift.moved, f.drift.a, f.drift.b),
            "The classes whose share of the images changed most",
        )
    return drawn


def _row_charts(f: Figures) -> dict[str, _Drawn]:
    rows, drawn = f.distributions, dict[str, _Drawn]()
    if rows and rows.classes:
        first = legible(rows.classes[0].name, 60)
        drawn["classes"] = _Drawn(charts.classes(rows), f"Images by first class, the most frequent {first}")
    if rows and rows.confidence:
        label = f"Probability of the first class, median {rows.confidence.median:.2f}"
        drawn["confidence"] = _Drawn(charts.confidence(rows.confidence), label)
    if rows and rows.norm:
        drawn["norms"] = _Drawn(charts.norms(rows.norm), f"Norms of the embeddings, median {rows.norm.median:.3g}")
    if rows and rows.accuracy:
        error = rows.accuracy.calibration_error
        label = f"Accuracy by confidence; both differ by {error:.2f} on average"
        drawn["calibration"] = _Drawn(charts.calibration(rows.accuracy), label)
        if rows.accuracy.grid_classes:
            drawn["confusions"] = _Drawn(
                charts.confusions(rows.accuracy), "The most confused classes, true by predicted"
            )
    return drawn


# images


def _uri(picture: bytes | None) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" if picture else ""


def _cards(f: Figures, pictures: Pictures) -> list[dict[str, Any]]:
    """What the map shows of a point under the pointer."""
    if not f.sampled or not f.map:
        return []
    s = f.sampled
    return [
        {"id": legible(s.ids[p], 90), "name": legible(s.names[p], 60), "score": round(s.scores[p], 3)}
        | ({"label": s.labels[p]} if s.labels[p] is not None else {})
        | ({"src": src} if (src := _uri(pictures.get(s.ids[p]))) else {})
        for p in f.map.points
    ]


# numbers


def _code(text: str) -> Markup:
    """Text of ours, `so` marked parts as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _share(number: float, digits: int = 1) -> str:
    return f"{100 * number:.{digits}f} %"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _moment(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix))


def wanted(figures: Figures, most: int) -> dict[str, str]:
    """Id → shard of the images that the page can show, the sheets first, then points of the map evenly."""
    found = {example.id: example.shard for example in (figures.rejected.examples if figures.rejected else ())}
    tiles: list[Tile] = [tile for n in figures.neighbours for tile in (n.query, *n.nearest)]
    tiles += [tile for group in (figures.duplicates.groups if figures.duplicates else ()) for tile in group]
    found |= {tile.id: tile.shard for tile in tiles}
    if figures.map and figures.sampled and (left := most - len(found)) > 0:
        step = max(1.0, len(figures.map.points) / left)
        for i in range(min(left, len(figures.map.points))):
            point = figures.map.points[int(i * step)]
            found[figures.sampled.ids[point]] = figures.sampled.shards[point]
    return dict(list(found.items())[:most])
