"""`reembed`: the scheduled job, safe to start twice. Its result is one line on stdout, for a scheduler to alert on."""

from typing import Annotated, Any

import typer

from jobs import exits, flags
from jobs.embed_flags import EmbedFlags
from jobs.flag_groups import takes_flags
from pipeline.errors import StorageError, UsageError
from pipeline.storage import redact

# What the line tells, where the result has it.
FIRST = ("version", "version_before", "set", "shards", "shards_to_embed", "shards_embedded", "shards_unchanged")
THEN = ("shards_removed", "rows")
LAST = ("deleted", "images", "hours", "seconds", "images_per_s", "lease", "output")


@takes_flags
def reembed(
    asked: EmbedFlags,
    min_rows: Annotated[int, typer.Option(help="Fewer: exit 3, no version")] = 1,
    max_shrink: Annotated[
        float | None,
        typer.Option(help="Share of the current version's rows; more gone: exit 3 [0.5 where it has 10,000]"),
    ] = None,
    min_overlap: Annotated[
        float | None, typer.Option(help="Of 10 neighbours, where the set changed; less: exit 3 [measured only]")
    ] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Of first classes, where the set changed; less: exit 3 [measured only]")
    ] = None,
    keep: Annotated[str, typer.Option(help="Versions to keep, newest first, or all")] = "3",
    after_rollback: Annotated[
        bool, typer.Option("--after-rollback", help="Let what was rolled back come again")
    ] = False,
    lease_timeout: Annotated[float, typer.Option(help="Seconds after which a dead holder's lease is free")] = 120,
) -> None:
    """Embed what changed, check it, commit it, clean up: the job to run by a schedule.

    Starting it twice is safe: the second one says who works and ends with 0. Prints one line of key=value on stdout.

    Example: shard2vec reembed --config job.yaml --min-overlap 0.2
    """

    def body() -> int:
        try:
            config = asked.run_config("reembed")
            from pipeline.reembed import Terms
            from pipeline.reembed import reembed as run

            terms = Terms(
                min_rows=min_rows,
                max_shrink=max_shrink,
                min_overlap=min_overlap,
                min_top1_agreement=min_top1_agreement,
                keep=flags.keep(keep),
                after_rollback=after_rollback,
                lease_timeout_s=lease_timeout,
            )
            result = run(config, terms, exits.say)
        except (UsageError, StorageError, OSError, KeyboardInterrupt) as e:
            code, why = exits.ending(e)
            word = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
            if not asked.json:
                print(_line(word, code, {"output": redact(asked.output or "") or None}, why), flush=True)
            raise
        exits.say(f"shard2vec: {result.message}")
        if asked.json:
            exits.print_json(result.json)
        else:
            told = result.json
            why = result.message if result.exit_code else ""
            print(_line(told["result"], result.exit_code, told, why), flush=True)
        return result.exit_code

    exits.run(body, asked.json)


def _line(word: str, code: int, told: dict[str, Any], why: str) -> str:
    """`reembed result=… exit=…` and what else is known, as logfmt: a value with spaces is quoted."""
    pairs: dict[str, object] = {"result": word, "exit": code}
    pairs |= {key: told.get(key) for key in FIRST + THEN}
    if "rejects" in told:
        pairs["rejects"] = sum(told["rejects"].values())
    drift = (told.get("gates") or {}).get("drift") or {}
    pairs |= {key: drift.get(key) for key in ("overlap_at_10", "top1_agreement")}
    pairs |= {key: told.get(key) for key in LAST}
    if not told.get("images_per_s"):
        pairs.pop("images_per_s")  # nothing was embedded, and no alert should go by it
    if why:
        pairs["reason"] = why
    return " ".join(["reembed", *(f"{key}={_value(value)}" for key, value in pairs.items() if value is not None)])


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if text and not set(text) & set(' ="\\') else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
