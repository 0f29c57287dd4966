"""A report's figures → plotly charts as JSON. Colours are names of the page's (`var(--c1)`), which its script resolves.

Text in charts is escaped: plotly takes a few HTML tags in it, and names come from strangers.
"""

import html
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from pipeline.distributions import Accuracy, Distributions, Histogram
from pipeline.legible import first_synonym, legible
from pipeline.rejected import Rejected
from pipeline.timeline import Timeline
from pipeline.vector_map import NEAR, Duplicates, Map, Sampled

Chart = dict[str, Any]  # plotly's `data` and `layout`

# Okabe and Ito's palette, told apart by the colour-blind; the page has a lighter one for the dark.
STAGE_COLOURS = {
    "read": "var(--c6)", "decode": "var(--c2)", "transfer": "var(--c7)", "forward": "var(--c1)", "write": "var(--c3)",
}  # fmt: skip
CLASS_COLOURS = tuple(f"var(--c{i})" for i in range(1, 7))
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")  # beside the colours
LABEL_CHARS = 24  # beside bars: some 150 pixels, of a phone's 358
BAR_PX, AXIS_PX = 26, 64
CLEAR = "rgba(0,0,0,0)"
AXIS = {
    "automargin": True,
    "gridcolor": "var(--line)",
    "linecolor": "var(--line)",
    "zerolinecolor": "var(--line)",
    "tickfont": {"color": "var(--soft)", "size": 12},
    "title": {"font": {"color": "var(--soft)", "size": 12}, "standoff": 8},
}
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}, "itemclick": False}


def plain(text: str, most: int = LABEL_CHARS) -> str:
    return html.escape(legible(text, most), quote=False)


def brief(name: str, most: int = LABEL_CHARS) -> str:
    return plain(first_synonym(name, most), most)


def _chart(
    traces: Sequence[Any], height: int, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None, **layout: Any
) -> Chart:
    figure = go.Figure(
        list(traces),
        {
            "template": go.layout.Template(),  # else plotly's own, 7 kB a chart
            "height": height,
            "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR,
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "color": "var(--ink)"},
            "margin": {"l": 4, "r": 12, "t": 8, "b": 4},
            "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
            "showlegend": False,
            "legend": LEGEND,
            "dragmode": False,  # a finger on a chart scrolls the page
            "bargap": 0.25,
            "xaxis": _axis(x),
            "yaxis": _axis(y),
            **layout,
        },
    )
    chart: Chart = json.loads(figure.to_json())
    return chart


def _axis(own: dict[str, Any] | None) -> dict[str, Any]:
    own = dict(own or {})
    title = {**AXIS["title"], "text": own.pop("title", "")}  # type: ignore[dict-item]
    return {**AXIS, "fixedrange": True, **own, "title": title}


def _bars(ticks: Sequence[str], traces: Sequence[Any], x: dict[str, Any], **layout: Any) -> Chart:
    """Horizontal bars, the first on top; by number, as shortened names may be the same."""
    y = {
        "tickvals": list(range(len(ticks))),
        "ticktext": list(ticks),
        "range": [len(ticks) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
        "tickfont": {"color": "var(--ink)", "size": 12},
    }
    height = BAR_PX * len(ticks) + AXIS_PX + (40 if layout.get("showlegend") else 0)
    return _chart(traces, height, {"rangemode": "tozero", **x}, y, **layout)


def _bar(values: Sequence[float], hover: Sequence[str], **own: Any) -> go.Bar:
    own = {"marker": {"color": "var(--c1)"}} | own
    return go.Bar(
        x=list(values), y=list(range(len(values))), orientation="h", hovertext=list(hover), hoverinfo="text", **own
    )


def _columns(histogram: Histogram) -> list[Any]:
    """A histogram whose bins were counted already."""
    edges = histogram.edges
    hover = [
        f"{low:.4g} to {high:.4g}<br>{n:,} images"
        for (low, high), n in zip(pairwise(edges), histogram.counts, strict=True)
    ]
    return [
        go.Bar(
            x=[(low + high) / 2 for low, high in pairwise(edges)],
            y=histogram.counts,
            width=[0.94 * (high - low) for low, high in pairwise(edges)],
            marker={"color": "var(--c1)"},
            hovertext=hover,
            hoverinfo="text",
        )
    ]


def throughput(timeline: Timeline) -> Chart:
    """Images a second as steps, filled."""
    edges, rates = timeline.edges, timeline.images_per_s
    line = go.Scatter(
        x=edges,
        y=[*rates, rates[-1]],
        mode="lines",
        line={"shape": "hv", "width": 2, "color": "var(--c1)"},
        fill="tozeroy",
        fillcolor="var(--c1-faint)",
        hovertext=[f"{rate:,.1f} images/s" for rate in [*rates, rates[-1]]],
        hoverinfo="text",
    )
    return _chart([line], 240, _seconds(edges), {"title": "images/s", "rangemode": "tozero"}, hovermode="x")


def at_work(timeline: Timeline) -> Chart:
    """Threads at each stage, on top of each other."""
    traces = [
        go.Scatter(
            x=timeline.edges,
            y=[*values, values[-1]],
            name=stage,
            mode="lines",
            line={"shape": "hv", "width": 0.5, "color": STAGE_COLOURS[stage]},
            stackgroup="stages",
            fillcolor=STAGE_COLOURS[stage],
            hovertext=[f"{stage} {value:.2f}" for value in [*values, values[-1]]],
            hoverinfo="text",
        )
        for stage, values in timeline.at_work.items()
    ]
    y = {"title": "threads at work", "rangemode": "tozero"}
    return _chart(traces, 270, _seconds(timeline.edges), y, showlegend=True, hovermode="x")


def _seconds(edges: Sequence[float]) -> dict[str, Any]:
    return {"title": "seconds since the first shard began", "range": [0, edges[-1]]}


def busy(result: dict[str, Any]) -> Chart:
    """How much of its time each thing was busy, the busiest on top."""
    shares = {f"{stage}": share for stage, share in result.get("stage_busy", {}).items()}
    shares |= {"all cores": result["cores_busy"]} if result.get("cores_busy") is not None else {}
    shares |= {"device": result["device_busy"]} if result.get("device_busy") is not None else {}
    order = sorted(shares, key=lambda name: -shares[name])
    values = [100 * shares[name] for name in order]
    colours = [STAGE_COLOURS.get(name, "var(--soft)") for name in order]
    bar = _bar(values, [f"{n}: {v:.0f} % busy" for n, v in zip(order, values, strict=True)], marker={"color": colours})
    return _bars(order, [bar], {"title": "busy, % of the time", "range": [0, 100], "dtick": 20})


def slow_shards(timeline: Timeline) -> Chart:
    """Each stage's share of the seconds at work, for the slowest shards."""
    slowest = timeline.slowest
    traces = []
    for stage, colour in STAGE_COLOURS.items():
        values = [shard.stage_seconds[stage] for shard in slowest]
        hover = [f"{plain(s.shard, 60)}<br>{stage} {v:.2f} s" for s, v in zip(slowest, values, strict=True)]
        traces.append(_bar(values, hover, name=stage, marker={"color": colour}))
    x = {"title": "thread-seconds by stage"}
    return _bars([plain(s.shard) for s in slowest], traces, x, barmode="stack", showlegend=True)


def reject_reasons(rejected: Rejected) -> Chart:
    names, counts = list(rejected.reasons), list(rejected.reasons.values())
    hover = [f"{name}: {n:,} ({n / rejected.samples:.2%})" for name, n in rejected.reasons.items()]
    bar = _bar(counts, hover, marker={"color": "var(--c4)"}, text=[f"{n:,}" for n in counts], textposition="auto")
    return _bars(names, [bar], {"title": "samples"})


def classes(found: Distributions) -> Chart:
    top = found.classes
    hover = [f"{plain(c.name, 80)}<br>{c.images:,} images, mean confidence {c.confidence:.2f}" for c in top]
    bar = _bar([c.images for c in top], hover)
    return _bars([brief(c.name) for c in top], [bar], {"title": "images that have it first"})


def confidence(histogram: Histogram) -> Chart:
    x = {"title": "probability of the first class", "range": [0, histogram.edges[-1]]}
    return _chart(_columns(histogram), 260, x, {"title": "images"}, bargap=0)


def norms(histogram: Histogram) -> Chart:
    return _chart(_columns(histogram), 260, {"title": "norm of the embedding"}, {"title": "images"}, bargap=0)


def calibration(accuracy: Accuracy) -> Chart:
    """Accuracy over confidence; on the diagonal the scores are what they claim."""
    bins = accuracy.calibration
    most = max(b["images"] for b in bins)
    diagonal = go.Scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": "var(--soft)", "dash": "dot", "width": 1}, hoverinfo="skip"
    )
    found = go.Scatter(
        x=[b["confidence"] for b in bins],
        y=[b["accuracy"] for b in bins],
        mode="lines+markers",
        line={"color": "var(--c1)", "width": 2},
        marker={"size": [7 + 13 * (b["images"] / most) ** 0.5 for b in bins], "color": "var(--c1)"},
        hovertext=[
            f"confidence {b['confidence']:.2f}, right {b['accuracy']:.0%}<br>{b['images']:,} images" for b in bins
        ],
        hoverinfo="text",
    )
    x = {"title": "confidence", "range": [-0.02, 1.02]}
    return _chart([diagonal, found], 300, x, {"title": "share that is right", "range": [-0.04, 1.06]})


def confusions(accuracy: Accuracy) -> Chart:
    """The most confused classes, true downwards, predicted across."""
    names, cells = [brief(n, 18) for n in accuracy.grid_classes], accuracy.grid
    hover = [
        [f"{plain(a, 60)}<br>taken for {plain(b, 60)}: {cells[i][j]:,}" for j, b in enumerate(accuracy.grid_classes)]
        for i, a in enumerate(accuracy.grid_classes)
    ]
    places = list(range(len(names)))
    heat = go.Heatmap(
        z=cells,
        x=places,
        y=places,
        hovertext=hover,
        hoverinfo="text",
        colorscale=[[0, "var(--surface)"], [1, "var(--c1)"]],
        showscale=False,
        xgap=2,
        ygap=2,
    )
    axis = {"tickvals": places, "ticktext": names, "showgrid": False, "zeroline": False}
    x = {**axis, "title": "predicted", "tickangle": -45, "side": "bottom"}
    y = {**axis, "title": "label", "range": [len(names) - 0.5, -0.5]}
    return _chart([heat], 150 + 28 * len(names), x, y)


def accuracy_by_run(runs: Sequence[dict[str, Any]]) -> Chart:
    """`runs`: oldest first, with `top1` and `top5`."""
    traces = [
        go.Scatter(
            x=list(range(len(runs))),
            y=[100 * run[key] for run in runs],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"symbol": symbol, "size": 9},
            hovertext=[f"{plain(r['set'], 60)}<br>{name} {100 * r[key]:.2f} %" for r in runs],
            hoverinfo="text",
        )
        for key, name, colour, symbol in (
            ("top1", "top-1", "var(--c1)", "circle"),
            ("top5", "top-5", "var(--c2)", "square"),
        )
    ]
    room = {"range": [-0.3, len(runs) - 0.7]}
    ticks = {"tickvals": list(range(len(runs))), "ticktext": [plain(r["started"]) for r in runs], **room}
    y = {"title": "right, %", "rangemode": "tozero"}
    return _chart(traces, 260, ticks, y, showlegend=True)


def vector_map(sampled: Sampled, drawn: Map, has_picture: Sequence[bool]) -> Chart:
    """A trace a class, the most frequent ones in colours; `customdata` is each point's place on the map.

    Points with a picture are larger.
    """
    counts: dict[int, int] = {}
    for point in drawn.points:
        counts[sampled.first[point]] = counts.get(sampled.first[point], 0) + 1
    top = [c for c in sorted(counts, key=lambda c: (-counts[c], c)) if c >= 0][: len(CLASS_COLOURS)]
    groups: dict[int, list[int]] = {c: [] for c in [*top, -1]}
    for at, point in enumerate(drawn.points):
        groups[sampled.first[point] if sampled.first[point] in top else -1].append(at)
    names = {sampled.first[point]: sampled.names[point] for point in drawn.points}
    traces = []
    for rank, (c, members) in enumerate(groups.items()):
        is_rest = c == -1
        traces.append(
            go.Scatter(
                x=[_rounded(drawn.x[i]) for i in members],
                y=[_rounded(drawn.y[i]) for i in members],
                customdata=members,
                name=("other classes" if top else "images") if is_rest else brief(names[c], 22),
                mode="markers",
                marker={
                    "color": "var(--c7)" if is_rest and top else CLASS_COLOURS[rank % len(CLASS_COLOURS)],
                    "symbol": "circle" if is_rest else SYMBOLS[rank],
                    "size": [10 if has_picture[i] else 6 for i in members],
                    "opacity": 0.8,
                    "line": {"width": 0.5, "color": "var(--surface)"},
                },
                hoverinfo="none",  # the page shows a card; "skip" would tell it nothing
            )
        )
    ticks = {"showticklabels": False, "zeroline": False}
    x, y = (
        {**ticks, "fixedrange": False, "title": f"component {i}, {share:.0%} of the variance"}
        for i, share in enumerate(drawn.explained, 1)
    )
    legend = {**LEGEND, "y": -0.1, "yanchor": "top"}  # above are the map's buttons
    bar = {"bgcolor": CLEAR, "color": "var(--soft)", "activecolor": "var(--c1)"}
    shown = [trace for trace in traces if trace.x]
    return _chart(shown, 560, x, y, showlegend=bool(top), legend=legend, modebar=bar, hovermode="closest")


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def similarity(found: Duplicates) -> Chart:
    histogram = Histogram(edges=found.edges, counts=found.nearest, least=0, median=found.median, most=1)
    x = {"title": "cosine to the nearest other image"}
    line = {"type": "line", "x0": NEAR, "x1": NEAR, "yref": "paper", "y0": 0, "y1": 1}
    shapes = [{**line, "line": {"color": "var(--c4)", "width": 1.5, "dash": "dot"}}]
    return _chart(_columns(histogram), 260, x, {"title": "images"}, bargap=0, shapes=shapes)


def class_moves(moved: Sequence[Any], before: str, after: str) -> Chart:
    """The classes whose share changed most, both shares beside each other."""
    names = [move.name or f"class {move.index}" for move in moved]
    traces = []
    for key, name, colour in (("share_a", before, "var(--c7)"), ("share_b", after, "var(--c1)")):
        values = [100 * getattr(move, key) for move in moved]
        hover = [f"{plain(n, 60)}<br>{plain(name, 60)}: {v:.2f} %" for n, v in zip(names, values, strict=True)]
        traces.append(_bar(values, hover, name=plain(name, 40), marker={"color": colour}))
    chart = _bars(
        [brief(name) for name in names], traces, {"title": "% of the images"}, barmode="group", showlegend=True
    )
    return chart | {"layout": chart["layout"] | {"height": chart["layout"]["height"] + 12 * len(names)}}
