"""`index`: the nearest-neighbour index of a version, measured against exact search."""

import time
from typing import Annotated

import typer

from jobs import exits
from pipeline.errors import REFUSED


def index(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    kind: Annotated[
        str, typer.Option(help="flat: exact, 4 bytes a value; ivf: lists of 1 byte a value; auto: ivf above 128 MiB")
    ] = "auto",
    recall: Annotated[float, typer.Option(help="The least recall@10 against exact search; below it: exit 3")] = 0.95,
    version: Annotated[int | None, typer.Option(help="[the current one]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Build the nearest-neighbour index of a version, by cosine; again later, only what changed is encoded.

    Example: shard2vec index out --recall 0.95
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.index import LowRecall, build

        started = time.monotonic()
        root = versions.existing_output(output)
        committed = versions.current(root, version)
        try:
            built = build(root, committed, kind=kind, least=recall, say=lambda line: exits.say(f"shard2vec: {line}"))
        except LowRecall as e:
            exits.say(f"shard2vec: {e}; no index was made")
            if json:
                exits.print_json({"error": str(e), "exit_code": REFUSED})
            return REFUSED
        found, seconds = built.index, time.monotonic() - started
        exits.say(
            f"shard2vec: {found.kind} index of version {found.version}"
            + (f", {built.parts_made:,} files encoded" if built.is_new else " was there already")
            + f": {found.vectors:,} vectors, {found.bytes / 2**20:,.1f} MiB, recall@10 {found.recall_at_10:.4f} with "
            f"{found.probes:,} of {found.lists:,} lists and {found.candidates} candidates; {seconds:.1f} s"
        )
        if json:
            result = {name: value for name, value in vars(found).items() if name not in ("points", "sha256")}
            made = {"is_new": built.is_new, "parts_made": built.parts_made, "trained": built.trained}
            exits.print_json(result | made | {"seconds": round(seconds, 3)})
        return 0

    exits.run(body, json)
