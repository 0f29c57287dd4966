"""`status`: what is done, running, rejected; the current version."""

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from jobs import exits
from pipeline.errors import StorageError, UsageError


def status(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    metrics: Annotated[
        bool, typer.Option("--metrics", help="The same for Prometheus, as text: for a textfile collector")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Show the current version, each set's finished shards, and the runs that are alive.

    Example: shard2vec status out
    """

    def body() -> int:
        if metrics and json:
            raise UsageError("--metrics and --json: choose one, both are for stdout")
        if metrics:
            print(_exposed(output), end="", flush=True)
            return 0
        found = _look(output)
        if json:
            exits.print_json(found)
        else:
            _show(found)
        return 0

    exits.run(body, json)


def _exposed(output: str) -> str:
    from pipeline import metrics, versions

    return metrics.text(metrics.of_output(versions.existing_output(output)))


def _look(output: str) -> dict[str, Any]:
    from pipeline import lease, progress, stored_index, versions

    root = versions.existing_output(output)
    current = versions.read_version(root)
    done: dict[str, int] = {}
    for name in root.list("sets"):
        parts = name.split("/")
        done.setdefault(parts[1], 0)
        done[parts[1]] += parts[2] == "embeddings"
    runs = progress.read_notes(root)
    alive = [r for r in runs if progress.is_alive(r)]
    last = runs[-1] if runs else None
    index, damage = None, ""
    try:
        index = stored_index.index_of(root, current) if current else None
    except StorageError as e:
        damage = str(e)
    held = lease.holder(root)
    return {
        "output": root.url,
        "version": current.version if current else None,
        "current": asdict(current) if current else None,
        "versions": versions.numbers(root),
        "sets": {
            name: {"shards_done": n, "current": bool(current and current.set == name)} for name, n in done.items()
        },
        "index": {name: getattr(index, name) for name in ("kind", "vectors", "bytes", "recall_at_10", "created")}
        if index
        else None,
        "index_damage": damage or None,
        "running": [asdict(r) for r in alive],
        "lease": str(held) if held else None,
        "last_run": asdict(last) | {"state": progress.outcome(last)} if last else None,
    }


def _show(found: dict[str, Any]) -> None:
    current = found["current"]
    if current:
        rejects = sum(current["rejects"].values())
        reasons = ", ".join(f"{n} {reason}" for reason, n in current["rejects"].items())
        back = f", rolled back to version {current['rolled_back']['to']}" if current["rolled_back"] else ""
        print(f"version {current['version']} of {found['output']}, {current['created']}, set {current['set']}{back}")
        print(
            f"  {current['shards']:,} shards, {current['samples']:,} samples: {current['rows']:,} rows, "
            f"{rejects:,} rejects{f' ({reasons})' if reasons else ''}"
        )
        damage = found["index_damage"] or ""
        if index := found["index"]:
            print(f"  {index['kind']} index: {index['vectors']:,} vectors, recall@10 {index['recall_at_10']:.4f}")
        else:
            print(f"  no index{damage and f' that can be used: {damage}'}")
    else:
        print(f"{found['output']}: no version is committed yet")
    for name, one in found["sets"].items():
        print(f"set {name}: {one['shards_done']:,} shards done{', current' if one['current'] else ''}")
    for run in found["running"]:
        finished = run["shards_done"] + run["shards_unchanged"]
        print(
            f"running on {run['host']} (pid {run['pid']}): {finished:,} of {run['shards']:,} shards, "
            f"{run['images']:,} images, {run['images_per_s']:,.0f}/s, {run['rejects']:,} rejected"
        )
    if found["lease"]:
        print(f"lease of a scheduled job: held by {found['lease']}")
    last = found["last_run"]
    if last and not found["running"]:
        ago = round(time.time() - last["updated"])
        print(f"last run: {last['state']} {ago:,} s ago, set {last['set']}")
