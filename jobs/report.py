"""`report`: what a run and its version came to, as one HTML file."""

from typing import Annotated

import typer

from jobs import exits
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain


@takes_flags
def report(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    version: Annotated[int | None, typer.Option(help="[the run's, or the current one]")] = None,
    run: Annotated[str | None, typer.Option(help="A run, by the name of its note [the newest]")] = None,
    source: InputAgain = InputAgain(),
    html: Annotated[str | None, typer.Option(help="A local file, replaced [a new one below OUT/reports]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, with the figures")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Write one HTML file that needs no network: speed, rejects, classes, accuracy, a map, neighbours, drift.

    Example: shard2vec report out --input 'shards/*.tar' --html report.html
    """

    def body() -> int:
        from pipeline import report as reports
        from pipeline import versions

        reports.check_extra()
        root = versions.existing_output(output)
        made = reports.report(root, version=version, run=run, shards=source.shards(root.url), html=html)
        exits.say(f"shard2vec: {made.json['verdict']} {made.json['bytes'] / 1e6:.1f} MB: {made.path}")
        if json:
            exits.print_json(made.json)
        else:
            print(made.path)
        return 0

    exits.run(body, json)
