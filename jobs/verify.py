"""`verify`: is every input id exactly once in the output, every value finite, every file as listed?"""

from typing import Annotated

import typer

from jobs import exits
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain


@takes_flags
def verify(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    source: InputAgain = InputAgain(),
    version: Annotated[int | None, typer.Option(help="[the current one]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Read the whole version and prove its promises; exit 1 names what does not hold.

    Example: shard2vec verify out --input 'shards/*.tar'
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.verify import verify as check

        root = versions.existing_output(output)
        committed = versions.current(root, version)
        found = check(root, committed, source.shards(root.url))
        for problem in found.problems:
            exits.say(problem)
        exits.say(
            f"shard2vec: version {committed.version} "
            + ("is whole" if found.clean else "is NOT whole")
            + f": {found.ids:,} ids, {found.missing:,} missing, {found.duplicated:,} duplicated, "
            f"{found.unexpected:,} unexpected, {found.not_finite:,} not finite, {found.bad_files:,} bad files"
        )
        if json:
            exits.print_json({"version": committed.version, "set": committed.set, **vars(found)})
        return 0 if found.clean else exits.FAILED

    exits.run(body, json)
