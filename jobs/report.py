"""`report`: what a run and its version came to, as one HTML file."""

from typing import Annotated

import typer

from jobs import exits


def report(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    version: Annotated[int | None, typer.Option(help="[the run's, or the current one]")] = None,
    run: Annotated[str | None, typer.Option(help="A run, by the name of its note [the newest]")] = None,
    input: Annotated[
        list[str] | None, typer.Option(help="The input again, to show thumbnails from its shards; repeatable")
    ] = None,
    format: Annotated[str | None, typer.Option(help="As for embed")] = None,
    image_column: Annotated[str | None, typer.Option(help="As for embed")] = None,
    key_column: Annotated[str | None, typer.Option(help="As for embed")] = None,
    uri_column: Annotated[str | None, typer.Option(help="As for embed")] = None,
    allow_url: Annotated[list[str] | None, typer.Option(help="As for embed; repeatable")] = None,
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
        from pipeline.listing import Columns, list_shards

        reports.check_extra()
        root = versions.existing_output(output)
        allowed = tuple(allow_url or ())
        columns = Columns(image=image_column, key=key_column, uri=uri_column, allow_urls=allowed)
        shards = list_shards(input, format=format, columns=columns, exclude=root.url) if input else None
        made = reports.report(root, version=version, run=run, shards=shards, html=html)
        exits.say(f"shard2vec: {made.json['verdict']} {made.json['bytes'] / 1e6:.1f} MB: {made.path}")
        if json:
            exits.print_json(made.json)
        else:
            print(made.path)
        return 0

    exits.run(body, json)
