"""Contact sheets of a version's images, whose thumbnails are read from the input's shards."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from jobs.input_flags import InputAgain
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.listing import Shard
    from pipeline.output import Root
    from pipeline.versions import Version

SIDE = 480  # pixels of an image's longer side: enough for a tile on a dense screen
Sheet = Annotated[Path | None, typer.Option(help="Draw it: a PNG; needs --input")]


class Shown(Protocol):
    """What has an image in a shard."""

    @property
    def id(self) -> str: ...
    @property
    def shard(self) -> str: ...


class Input:
    """The input's shards as they are now, and the etags of the version's; made before any work."""

    def __init__(self, shards: "Sequence[Shard]", etags: dict[str, str]):
        self._shards, self._etags = shards, etags

    def images(self, shown: Sequence[Shown]) -> dict[str, Any]:
        """Id → image, a grey tile where it cannot be had."""
        from PIL import Image

        from jobs.pictures import placeholder
        from pipeline.originals import originals

        found = originals(self._shards, self._etags, {one.id: one.shard for one in shown}, SIDE).pictures
        return {
            one.id: Image.open(io.BytesIO(found[one.id]))
            if one.id in found
            else placeholder("not in the input\nas it is now")
            for one in shown
        }


def check(sheet: Path | None, source: InputAgain) -> None:
    """Refuses flags that would fail after the work."""
    from pipeline.result_file import check_place

    if sheet is None:
        return
    if not source.input:
        raise UsageError(f"--sheet {sheet}: where the images lie is not kept: name it with --input, as for embed")
    check_place(sheet, "--sheet")


def listed(root: "Root", version: "Version", source: InputAgain) -> Input:
    """Lists the input. Raises `UsageError` where nothing is there, or nothing of the version's."""
    from pipeline.originals import check_input
    from pipeline.versions import read_list

    files = read_list(root, version)
    etags = dict(zip(files.column("shard").to_pylist(), files.column("etag").to_pylist(), strict=True))
    shards = source.shards(root.url) or []
    check_input(shards, etags)
    return Input(shards, etags)
