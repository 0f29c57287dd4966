"""`near-duplicates`: groups of images of a version that are nearly the same."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import exits, sheets
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain

if TYPE_CHECKING:
    from pipeline.near_duplicates import Duplicates

GROUPS_SHOWN, IMAGES_SHOWN = 20, 7  # of a sheet
ROWS_AT_ONCE = 8192  # as Python objects


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
        from pipeline.near_duplicates import check_above
        from pipeline.near_duplicates import near_duplicates as find
        from pipeline.result_file import check_place

        started = time.monotonic()
        check_above(above)
        sheets.check(sheet, source)
        if parquet is not None:
            check_place(parquet, "--parquet")
        root = versions.existing_output(output)
        committed = versions.current(root, version)
        shown = sheets.listed(root, committed, source) if sheet is not None else None
        found = find(root, committed, above=above)
        if parquet is not None:
            _write(found, parquet)
        if sheet is not None and shown is not None and found.count:
            title = f"Near duplicates in version {committed.version}, cosine {above:g} or more"
            _draw(shown, sheet, title, found)
        exits.say(
            f"shard2vec: {found.count:,} groups of {found.images:,} images with a cosine of {above:g} or more, of "
            f"{len(found.vectors):,}; {found.how}; {time.monotonic() - started:.1f} s"
        )
        if sheet is not None and not found.count:
            exits.say(f"shard2vec: no group, so {sheet} was not drawn")
        if found.cut:
            exits.say(
                f"shard2vec: {found.cut:,} images have very many as similar; their groups may be parts of larger ones"
            )
        if json:
            result = {"set": committed.set, "version": committed.version, "above": above, "how": found.how}
            counts = {"vectors": len(found.vectors), "images": found.images, "cut": found.cut}
            exits.print_json(result | counts | {"groups": _groups(found)})
        else:
            _show(found)
        return 0

    exits.run(body, json)


def _rows(found: "Duplicates") -> Iterator[dict[str, Any]]:
    """Every member, group after group."""
    for table in found.tables():
        for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _groups(found: "Duplicates") -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = [[] for _ in range(found.count)]
    for row in _rows(found):
        groups[row["group"] - 1].append({"id": row["id"], "score": round(row["score"], 6)})
    return groups


def _show(found: "Duplicates") -> None:
    from pipeline.legible import MOST_ID_CHARS, legible

    sizes, number = found.sizes(), 0
    for row in _rows(found):
        if row["group"] != number:
            number = row["group"]
            print(f"group {number}: {sizes[number - 1]} images")
        print(f"{row['score']:8.4f}  {legible(row['id'], MOST_ID_CHARS)}  {row['width']}x{row['height']}")


def _write(found: "Duplicates", path: Path) -> None:
    import pyarrow.parquet as pq

    from pipeline.near_duplicates import MEMBERS
    from pipeline.result_file import written_whole

    with (
        written_whole(path, "--parquet") as part,
        pq.ParquetWriter(part, MEMBERS, compression="zstd") as writer,
    ):
        for table in found.tables():
            writer.write_table(table)


def _draw(source: sheets.Input, sheet: Path, title: str, found: "Duplicates") -> None:
    from jobs.pictures import contact_sheet
    from pipeline.legible import legible
    from pipeline.result_file import written_whole

    groups = found.first(GROUPS_SHOWN, IMAGES_SHOWN)
    shown = source.images([m for group in groups for m in group])
    rows = [[(shown[m.id], f"{m.score:.3f} {legible(m.key)}") for m in group] for group in groups]
    more = f", the first {len(groups)} of {found.count:,} groups" if len(groups) < found.count else ""
    with written_whole(sheet, "--sheet") as part:
        contact_sheet(rows, part, title=f"{title}{more}", heads=("first", "the others of its group"))
