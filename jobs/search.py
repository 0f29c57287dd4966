"""`search`: the images of a version that are nearest to one of its own, to an image file or to a vector."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import exits, sheets
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain
from pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pipeline.search import Answer, Hit


@takes_flags
def search(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    id: Annotated[str | None, typer.Option(help="An id of the version; it is no hit of its own")] = None,
    image: Annotated[str | None, typer.Option(help="An image file, embedded with the set's own model")] = None,
    vector: Annotated[str | None, typer.Option(help="A .npy file of one vector of floats")] = None,
    top: Annotated[int, typer.Option(help="Hits")] = 10,
    sheet: sheets.Sheet = None,
    weights: Annotated[
        str | None, typer.Option(help="For --image: the set's own weights, as for embed [this node's, or pretrained]")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every vector, index or not")] = False,
    source: InputAgain = InputAgain(),
    version: Annotated[int | None, typer.Option(help="[the current one]")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
    config: Annotated[str | None, typer.Option(help="A YAML file of these flags; the command line wins")] = None,
) -> None:
    """Find the nearest images by cosine, through the version's index where it has one.

    Example: shard2vec search out --id photos/cat --sheet hits.png --input 'shards/*.tar'
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.search import Searcher, check_top, read_vector

        started = time.monotonic()
        if sum(what is not None for what in (id, image, vector)) != 1:
            raise UsageError("name one of --id, --image and --vector")
        if weights is not None and image is None:
            raise UsageError(f"--weights {weights}: only --image is embedded")
        check_top(top)
        sheets.check(sheet, source)
        root = versions.existing_output(output)
        committed = versions.current(root, version)
        content = _read(image) if image is not None else b""
        query = read_vector(vector) if vector is not None else None
        shown = sheets.listed(root, committed, source) if sheet is not None else None
        searcher = Searcher(root, committed, exact=exact)
        if id is not None:
            query = searcher.vector_of(id)
        elif query is None:
            from pipeline.own_backbone import embed_image

            query = embed_image(root, committed, content, weights)
        answer = searcher(query, top=top, without=id)
        if sheet is not None and shown is not None:
            own = searcher.own_hit(id) if id is not None else None
            title = f"Nearest images in version {committed.version}, by cosine"
            _draw(shown, sheet, title, own, content, answer)
        exits.say(f"shard2vec: {answer.how}; {time.monotonic() - started:.1f} s")
        if json:
            result = {"set": committed.set, "version": committed.version, "how": answer.how}
            hits = [hit.as_dict() for hit in answer.hits]
            exits.print_json(result | {"recall_at_10": answer.recall, "hits": hits})
        else:
            _show(answer)
        return 0

    exits.run(body, json)


def _read(image: str) -> bytes:
    from pipeline.retries import said
    from pipeline.storage import read_bytes, redact

    try:
        return read_bytes(image)
    except (OSError, StorageError) as e:
        raise UsageError(f"--image {redact(image)} cannot be read: {said(e)}") from e


def _show(answer: "Answer") -> None:
    from pipeline.legible import MOST_ID_CHARS, legible

    ids = [legible(hit.id, MOST_ID_CHARS) for hit in answer.hits]
    width = max(map(len, ids), default=0)
    for hit, shown in zip(answer.hits, ids, strict=True):
        name = legible(hit.class_name or (f"class {hit.class_index}" if hit.class_index is not None else ""))
        first = f"  {name} {hit.class_score:.2f}" if hit.class_score is not None else ""
        print(f"{hit.score:8.4f}  {shown:{width}}  {f'{hit.width}x{hit.height}':>11}{first}")


def _draw(source: sheets.Input, sheet: Path, title: str, own: "Hit | None", content: bytes, answer: "Answer") -> None:
    import io

    from PIL import Image, ImageOps

    from jobs.pictures import contact_sheet, placeholder
    from pipeline.legible import legible
    from pipeline.result_file import written_whole

    shown = source.images([*answer.hits, *([own] if own else [])])
    if own is not None:
        query = (shown[own.id], legible(own.key))
    elif content:
        query = (ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"), "the image")
    else:
        query = (placeholder("a vector"), "the vector")
    hits = [(shown[hit.id], f"{hit.score:.3f} {legible(hit.key)}") for hit in answer.hits]
    what = "exact search" if answer.is_exact else f"recall@10 {answer.recall:.2f}"
    with written_whole(sheet, "--sheet") as part:
        contact_sheet([[query, *hits]], part, title=f"{title} ({what})")
