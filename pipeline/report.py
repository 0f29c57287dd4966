"""`report`: an output's run and version → one HTML file that people look at.

notes, receipts, version, rows, rejects → figures ─┬─► charts ─┐
shards of the input ─► thumbnails of what they show ┘           ├─► page ─► OUT/reports/report-….html
                                        template, plotly.js ────┘
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.legible import legible
from pipeline.listing import Shard
from pipeline.originals import check_input, originals
from pipeline.output import Root
from pipeline.progress import outcome
from pipeline.report_figures import Figures, choose, gather
from pipeline.report_verdict import verdict
from pipeline.result_file import check_place, written_whole

PICTURES = 300  # thumbnails, 4 kB each; some of them twice
EXTRA = ("plotly", "jinja2")


@dataclass(frozen=True)
class Report:
    """`path`: where the file lies. `json`: its figures, without pictures."""

    path: str
    json: dict[str, Any]


def check_extra() -> None:
    """Raises `UsageError` where what draws is not installed."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        need = " and ".join(EXTRA)
        raise UsageError(f"report needs {need}, and {missing[0]} is not here: pip install 'shard2vec[report]'")


def report(
    root: Root,
    *,
    version: int | None = None,
    run: str | None = None,
    shards: Sequence[Shard] | None = None,
    html: str | None = None,
) -> Report:
    """Writes the report: below the root under a new name, or to the local file `html`, which is replaced.

    `shards`: the input's listing, to fetch thumbnails from; None for a report without. Raises `UsageError` for an
    unknown version or run, an input that is another's, a file that cannot be written: before any work, but for a full
    disk.
    """
    from pipeline.report_page import page, wanted  # plotly and jinja2 are an extra

    if html is not None:
        check_place(Path(html), "--html")
    chosen = choose(root, version=version, run=run)
    columns = (chosen.files.column(name).to_pylist() for name in ("shard", "etag"))
    etags = dict(zip(*columns, strict=True))
    if shards is not None:
        check_input(shards, etags)
    figures = gather(root, chosen)
    pictures = originals(shards, etags, wanted(figures, PICTURES)) if shards is not None else None
    content = page(figures, pictures).encode("utf-8", "backslashreplace")
    path = _put(root, content) if html is None else _write(Path(html), content)
    told = _told(figures) | {"thumbnails": len(pictures.pictures) if pictures else 0}
    return Report(path, {"report": path, "bytes": len(content), **told})


def _put(root: Root, content: bytes) -> str:
    name = f"reports/report-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}.html"
    root.put_new(name, content)
    return f"{root.url}/{name}"


def _write(path: Path, content: bytes) -> str:
    with written_whole(path, "--html") as part:
        part.write_bytes(content)
    return str(path)


def _told(f: Figures) -> dict[str, Any]:
    """The figures as JSON's own types; names as the page shows them."""
    sections: dict[str, Any] = {
        "verdict": verdict(f),
        "run": f.run.name if f.run else None,
        "state": outcome(f.run) if f.run else None,
        "version": f.version.version if f.version else None,
        "set": f.version.set if f.version else f.run.set if f.run else None,
        "rows": f.files.totals.rows,
        "rejects": f.rejected.reasons if f.rejected else {},
        "machine": f.run.machine if f.run else {},
        "packages": f.packages,
        "result": f.run.result if f.run else {},
        "timeline": asdict(f.timeline) if f.timeline else None,
        "distributions": asdict(f.distributions) if f.distributions else None,
        "map": {"points": len(f.map.points), "explained": f.map.explained} if f.map else None,
        "duplicates": _duplicates(f),
        "change": asdict(f.change) if f.change else None,
        "drift": f.drift.as_dict() if f.drift else None,
        "absent": f.absent,
    }
    shown: dict[str, Any] = _legible(sections)
    return shown


def _duplicates(f: Figures) -> dict[str, Any] | None:
    if f.duplicates is None or f.sampled is None:
        return None
    ids = [[tile.id for tile in group] for group in f.duplicates.groups]
    return asdict(f.duplicates) | {"groups": ids, "sample": len(f.sampled)}


def _legible(value: Any) -> Any:
    if isinstance(value, str):
        return legible(value, 1000)
    if isinstance(value, dict):
        return {_legible(k): _legible(v) for k, v in value.items()}
    return [_legible(v) for v in value] if isinstance(value, list | tuple) else value
