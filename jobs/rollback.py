"""`rollback`: the files of an earlier version become the current one again."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs import exits


def rollback(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    to: Annotated[int | None, typer.Option(help="The version to go back to [the one before the current]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Make an earlier version's files current again, as a new version; nothing is deleted or embedded.

    A scheduled `reembed` does not bring back what was rolled away, unless told so with --after-rollback.

    Example: shard2vec rollback out --to 2
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.rollback import roll_back

        root = versions.existing_output(output)
        before = versions.current(root)
        version = roll_back(root, to)
        if version == before:
            exits.say(f"shard2vec: version {version.version} of {root.url} has these files already: nothing done")
        else:
            files = f"the files of version {version.rolled_back['to']}, set {version.set}"
            exits.say(f"shard2vec: version {version.version} of {root.url}: {files}")
        if json:
            exits.print_json(asdict(version))
        return 0

    exits.run(body, json)
