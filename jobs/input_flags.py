"""The flags that name the input: of `embed`, and of the verbs that look at it again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.flag_groups import FlagGroup

if TYPE_CHECKING:
    from pipeline.listing import Columns, Shard


@dataclass(frozen=True, kw_only=True)
class InputFlags(FlagGroup):
    """Where the images lie."""

    input: Annotated[list[str] | None, typer.Option(help="A tar, Parquet file, folder, glob or @list; repeatable")] = (
        None
    )
    format: Annotated[str | None, typer.Option(help="webdataset, parquet or folder [from the name]")] = None
    image_column: Annotated[str | None, typer.Option(help="Parquet: bytes, or {bytes, path} [found]")] = None
    key_column: Annotated[str | None, typer.Option(help="Parquet: the id of each row [found, else its number]")] = None
    uri_column: Annotated[str | None, typer.Option(help="Parquet: image URLs to fetch [found]")] = None
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Parquet: beginning of image URLs to fetch though local, private, of other buckets; repeatable"
        ),
    ] = None

    @property
    def columns(self) -> "Columns":
        from pipeline.listing import Columns

        allowed = tuple(self.allow_url or ())
        return Columns(image=self.image_column, key=self.key_column, uri=self.uri_column, allow_urls=allowed)


@dataclass(frozen=True, kw_only=True)
class InputAgain(InputFlags):
    """The input that `embed` had, where a verb can do without."""

    input: Annotated[
        list[str] | None, typer.Option(help="The input, as for embed: ids to compare, thumbnails; repeatable")
    ] = None

    def shards(self, output: str) -> "list[Shard] | None":
        """What it holds now, without the output's own files; None where it was not named."""
        from pipeline.listing import list_shards

        if not self.input:
            return None
        return list_shards(self.input, format=self.format, columns=self.columns, exclude=output)
