"""`files`: the Parquet files of a version, one a line: what readers should open."""

from typing import Annotated

import typer

from jobs import exits


def files(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    kind: Annotated[str, typer.Option(help="embeddings, rejects, tokens, features or heads")] = "embeddings",
    version: Annotated[int | None, typer.Option(help="[the current one]")] = None,
    set_name: Annotated[str | None, typer.Option("--set", help="The newest version of this set instead")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Print the Parquet files of a version, one a line.

    Example: shard2vec files out --kind embeddings
    """

    def body() -> int:
        from pipeline import readers

        names = readers.files(output, kind=kind, version=version, set_name=set_name)
        if json:
            exits.print_json({"kind": kind, "files": names})
        else:
            for name in names:
                print(name)
        return 0

    exits.run(body, json)
