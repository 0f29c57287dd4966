"""`gc`: deletes what no kept version names."""

from typing import Annotated

import typer

from jobs import exits
from pipeline.errors import UsageError


def gc(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    keep: Annotated[int, typer.Option(help="Versions to keep, newest first; at least 1")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Delete what no kept version names; what belongs to a set that a run is writing now stays.

    Example: shard2vec gc out --keep 2
    """

    def body() -> int:
        from pipeline import garbage, progress, versions

        if keep < 1:
            raise UsageError(f"--keep {keep}: must be 1 or more, the current version always stays")
        root = versions.existing_output(output)

        def live_sets() -> set[str]:
            return {run.set for run in progress.read_notes(root) if progress.is_alive(run)}

        deleted = garbage.collect_garbage(root, keep, live_sets)
        kept = versions.numbers(root)
        exits.say(f"shard2vec: deleted {len(deleted):,} files; versions kept: {', '.join(map(str, kept)) or 'none'}")
        if json:
            exits.print_json({"deleted": deleted, "versions": kept})
        return 0

    exits.run(body, json)
