"""How a run ends, in words and as the object of `--json`."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import AGAIN, COMMITTED, FAILED, INTERRUPTED, REFUSED, STALLED, Stalled
from pipeline.lists import FileList
from pipeline.output import Root
from pipeline.speed import Means, Sums
from pipeline.versions import Version

if TYPE_CHECKING:
    from pipeline.run import Run

ENDS = {COMMITTED: "committed", FAILED: "failed", REFUSED: "refused", STALLED: "stalled", INTERRUPTED: "interrupted"}


@dataclass
class Result:
    """How the run ended: the exit code, a sentence for a person, and the object of `--json`."""

    exit_code: int
    message: str
    json: dict[str, Any] = field(default_factory=dict)


def reasons(rejects: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(rejects.items(), key=lambda r: (-r[1], r[0]))) or "none"


def report(run: "Run", files: FileList, version: Version | None) -> dict[str, Any]:
    """The object of `embed --json`; counts are over all shards of the result, speed over what this run embedded."""
    sums = run.sums
    total = files.totals if files else sums.counts
    seconds = time.monotonic() - run.started
    accuracy: dict[str, Any] = {}
    if total.labelled or run.config.only_metrics:
        accuracy = {"labelled": total.labelled}
    if total.labelled:
        hits = {"top1": total.top1 / total.labelled, "top5": total.top5 / total.labelled}
        accuracy |= hits
    return {
        "set": run.vectors.name,
        **_engine(run),
        "version": version.version if version else None,
        "output": run.root.url,
        "shards": len(run.shards),
        "shards_embedded": sums.shards,
        "shards_unchanged": len(run.shards) - len(run.todo),
        "shards_removed": len(run.removed),
        "samples": total.samples,
        "samples_embedded": sums.samples,
        "rows": total.rows,
        "rejects": dict(sorted(total.rejects.items())),
        "seconds": round(seconds, 3),
        **sums.speed(run.means).as_dict(),
        "images_per_s_all_in": round(sums.samples / seconds, 2),
        "stage_seconds": {stage: round(s, 3) for stage, s in sums.stage_seconds.items()},
        "bytes_read": sums.bytes_read,
        "failed": [{"shard": r.shard, "error": r.error} for r in run.failed],
        "removed": run.removed,
        **({"gates": run.gates} if run.gates else {}),
        **accuracy,
    }


def summary(result: dict[str, Any]) -> str:
    rejects = sum(result["rejects"].values())
    parts = [f"{result['rows']:,} rows, {rejects:,} rejects ({reasons(result['rejects'])})"]
    if result["shards_removed"]:
        parts.append(f"{result['shards_removed']} shards removed: {', '.join(result['removed'][:3])}")
    if "top1" in result:
        of = f"the labels of {result['labelled']:,} images"
        parts.append(f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} against {of}")
    elif result.get("labelled") == 0:
        parts.append("no accuracy: no image has a label of this model's classes")
    return "; ".join([*parts, result["speed"]])


def plan_line(run: "Run") -> str:
    vectors, count = run.vectors, len(run.shards)
    columns = ", ".join(f"{f.column} {'+'.join('x'.join(map(str, s)) for s in f.shapes)}" for f in vectors.tensors)
    what = f"{vectors.dim}-d embeddings" if "embedding" in vectors.outputs else "metrics only"
    return (
        f"{vectors.name}: {what}{f', {columns}' if columns else ''}, "
        f"{vectors.precision} on {run.device} ({vectors.engine}); "
        f"{count} shards, {len(run.todo)} to embed, {count - len(run.todo)} unchanged, {len(run.removed)} removed"
    )


def _engine(run: "Run") -> dict[str, Any]:
    return {"engine": run.vectors.engine, "engine_fallback": run.engine_fallback or None}


def idle(output: str, before: Version | None) -> dict[str, Any]:
    """The object of `--json` where somebody else works there: counts of the current version, and nothing done."""
    shards = before.shards if before else 0
    return {
        "set": before.set if before else None,
        "version": before.version if before else None,
        "output": output,
        "shards": shards,
        "shards_embedded": 0,
        "shards_unchanged": shards,
        "shards_removed": 0,
        "samples": before.samples if before else 0,
        "samples_embedded": 0,
        "rows": before.rows if before else 0,
        "rejects": before.rejects if before else {},
        "seconds": 0,
        **Sums().speed(Means(cores=1, threads=1)).as_dict(),
    }


def stalled(error: Stalled, output: str) -> Result:
    """While planning, where there are no counts yet."""
    message = f"{error}; {AGAIN}"
    return Result(STALLED, message, {"error": message, "exit_code": STALLED, "output": Root(output).url})


def dry(run: "Run") -> dict[str, Any]:
    return {
        "dry_run": True,
        "set": run.vectors.name,
        **_engine(run),
        "output": run.root.url,
        "shards": len(run.shards),
        "shards_to_embed": len(run.todo),
        "shards_unchanged": len(run.shards) - len(run.todo),
        "shards_removed": len(run.removed),
        "bytes_to_read": sum(s.size for s in run.todo),
        "to_embed": [s.name for s in run.todo],
        "removed": run.removed,
        "seconds": round(time.monotonic() - run.started, 3),
    }
