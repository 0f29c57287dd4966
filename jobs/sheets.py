"""Contact sheets of a version's images, whose thumbnails are read from the input's shards."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.listing import Shard
    from pipeline.output import Root
    from pipeline.versions import Version

SIDE = 480  # pixels of an image's longer side: enough for a tile on a dense screen
Sheet = Annotated[Path | None, typer.Option(help="Draw it: a PNG; needs --input")]
Inputs = Annotated[list[str] | None, typer.Option("--input", help="For --sheet: the input, as for embed; repeatable")]


class Shown(Protocol):
    """What has an image in a shard."""

    @property
    def id(self) -> str: ...
    @property
    def shard(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """Where the images of a sheet lie, as `embed` was told."""

    input: list[str] | None
    format: str | None
    image_column: str | None
    key_column: str | None
    uri_column: str | None
    allow_url: list[str] | None

    def check(self, sheet: Path | None) -> None:
        """Refuses, before any work, what would fail after it."""
        if sheet is None:
            return
        if not self.input:
            raise UsageError(f"--sheet {sheet}: where the images lie is not kept: name it with --input, as for embed")
        if not sheet.absolute().parent.is_dir():
            raise UsageError(f"--sheet {sheet}: there is no folder {sheet.parent}")

    def shards(self, root: "Root") -> "list[Shard]":
        from pipeline.listing import Columns, list_shards

        allowed = tuple(self.allow_url or ())
        columns = Columns(image=self.image_column, key=self.key_column, uri=self.uri_column, allow_urls=allowed)
        return list_shards(self.input or [], format=self.format, columns=columns, exclude=root.url)


def images(root: "Root", version: "Version", source: Source, shown: Sequence[Shown]) -> dict[str, Any]:
    """Id → image, a grey tile where it cannot be had."""
    from PIL import Image

    from jobs.pictures import placeholder
    from pipeline.originals import originals
    from pipeline.versions import read_list

    files = read_list(root, version)
    etags = dict(zip(files.column("shard").to_pylist(), files.column("etag").to_pylist(), strict=True))
    found = originals(source.shards(root), etags, {one.id: one.shard for one in shown}, SIDE).pictures
    return {
        one.id: Image.open(io.BytesIO(found[one.id]))
        if one.id in found
        else placeholder("not in the input\nas it is now")
        for one in shown
    }
