"""`gc`: deletes what no kept version names."""

from typing import Annotated

import typer

from jobs import exits
from pipeline.errors import UsageError


def gc(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    keep: Annotated[int, typer.Option(help="Versions to keep, newest first; at least 1")],
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what runs of the last week began and did not finish")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Delete what no kept version names; what belongs to a set that a run is writing or may go on with stays.

    Example: shard2vec gc out --keep 2
    """

    def body() -> int:
        from pipeline import garbage, progress, versions

        if keep < 1:
            raise UsageError(f"--keep {keep}: must be 1 or more, the current version always stays")
        root = versions.existing_output(output)

        writing, waiting, notes = set[str](), set[str](), progress.looks(root)

        def live_sets() -> set[str]:
            runs = next(notes)
            writing.update(run.set for run in runs if progress.is_alive(run))
            waiting.update(() if unfinished else progress.sets_in_use(runs))
            return writing | waiting

        deleted = garbage.collect_garbage(root, keep, live_sets)
        kept = versions.numbers(root)
        exits.say(f"shard2vec: deleted {len(deleted):,} files; versions kept: {', '.join(map(str, kept)) or 'none'}")
        if writing:
            exits.say(f"shard2vec: left alone what a run writes now: {', '.join(sorted(writing))}")
        if waiting - writing:
            exits.say(
                "shard2vec: left alone what a run of the last week began and did not finish: "
                f"{', '.join(sorted(waiting - writing))} (--unfinished deletes it)"
            )
        if json:
            exits.print_json({"deleted": deleted, "versions": kept, "spared": sorted(writing | waiting)})
        return 0

    exits.run(body, json)
