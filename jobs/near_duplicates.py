"""`near-duplicates`: groups of images of a version that are nearly the same."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import exits, sheets
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.near_duplicates import Duplicates

GROUPS_SHOWN, IMAGES_SHOWN = 20, 7  # of a sheet


@takes_flags
def near_duplicates(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    above: Annotated[float, typer.Option(help="The least cosine of a pair")] = 0.95,
    parquet: Annotated[Path | None, typer.Option(help="Write the groups there: group, id, score …")] = None,
    sheet: sheets.Sheet = None,
    source: InputAgain = InputAgain(),
    version: Annotated[int | None, typer.Option(help="[the current one]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """List groups of nearly equal images: chains of pairs whose cosine is at least --above.

    Example: shard2vec near-duplicates out --above 0.98
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.near_duplicates import near_duplicates as find

        started = time.monotonic()
        sheets.check(sheet, source)
        if parquet is not None and not parquet.absolute().parent.is_dir():
            raise UsageError(f"--parquet {parquet}: there is no folder {parquet.parent}")
        root = versions.existing_output(output)
        committed = versions.current(root, version)
        found = find(root, committed, above=above)
        images = sum(map(len, found.groups))
        if parquet is not None:
            _write(found, parquet)
        if sheet is not None and found.groups:
            _draw(root, committed, source, sheet, found, above)
        exits.say(
            f"shard2vec: {len(found.groups):,} groups of {images:,} images with a cosine of {above:g} or more, of "
            f"{found.vectors:,}; {found.how}; {time.monotonic() - started:.1f} s"
        )
        if sheet is not None and not found.groups:
            exits.say(f"shard2vec: no group, so {sheet} was not drawn")
        if found.cut:
            exits.say(
                f"shard2vec: {found.cut:,} images have very many as similar; their groups may be parts of larger ones"
            )
        if json:
            groups = [[{"id": m.id, "score": m.score} for m in group] for group in found.groups]
            result = {"set": committed.set, "version": committed.version, "above": above, "how": found.how}
            exits.print_json(result | {"vectors": found.vectors, "images": images, "cut": found.cut, "groups": groups})
        else:
            for number, group in enumerate(found.groups, 1):
                print(f"group {number}: {len(group)} images")
                for member in group:
                    print(f"{member.score:8.4f}  {member.id}  {member.width}x{member.height}")
        return 0

    exits.run(body, json)


def _write(found: "Duplicates", path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = [(number, member) for number, group in enumerate(found.groups, 1) for member in group]
    table = pa.table(
        {
            "group": pa.array([number for number, _ in members], pa.int64()),
            "id": pa.array([m.id for _, m in members], pa.string()),
            "score": pa.array([m.score for _, m in members], pa.float32()),
            "shard": pa.array([m.shard for _, m in members], pa.string()),
            "key": pa.array([m.key for _, m in members], pa.string()),
            "width": pa.array([m.width for _, m in members], pa.int32()),
            "height": pa.array([m.height for _, m in members], pa.int32()),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _draw(root: Any, version: Any, source: InputAgain, sheet: Path, found: "Duplicates", above: float) -> None:
    from jobs.pictures import contact_sheet

    groups = [group[:IMAGES_SHOWN] for group in found.groups[:GROUPS_SHOWN]]
    shown = sheets.images(root, version, source, [m for group in groups for m in group])
    rows = [[(shown[m.id], f"{m.score:.3f} {m.key}") for m in group] for group in groups]
    more = f", the first {len(groups)} of {len(found.groups):,} groups" if len(groups) < len(found.groups) else ""
    title = f"Near duplicates in version {version.version}, cosine {above:g} or more{more}"
    contact_sheet(rows, sheet, title=title, heads=("first", "the others of its group"))
