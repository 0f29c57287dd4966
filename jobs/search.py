"""`search`: the images of a version that are nearest to one of its own, to an image file or to a vector."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import exits, sheets
from jobs.flag_groups import takes_flags
from jobs.input_flags import InputAgain
from pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from pipeline.search import Answer


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
        from pipeline.search import read_vector, vector_of
        from pipeline.search import search as find

        started = time.monotonic()
        if sum(what is not None for what in (id, image, vector)) != 1:
            raise UsageError("name one of --id, --image and --vector")
        if weights is not None and image is None:
            raise UsageError(f"--weights {weights}: only --image is embedded")
        sheets.check(sheet, source)
        root = versions.existing_output(output)
        committed = versions.current(root, version)
        content = b""
        if id is not None:
            query = vector_of(root, committed, id)
        elif vector is not None:
            query = read_vector(vector)
        else:
            from pipeline.own_backbone import embed_image

            content = _read(image or "")
            query = embed_image(root, committed, content, weights)
        answer = find(root, committed, query, top=top, without=id, exact=exact)
        if sheet is not None:
            _draw(root, committed, source, sheet, id, content, answer)
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
    width = max((len(hit.id) for hit in answer.hits), default=0)
    for hit in answer.hits:
        name = hit.class_name or (f"class {hit.class_index}" if hit.class_index is not None else "")
        first = f"  {name} {hit.class_score:.2f}" if hit.class_score is not None else ""
        print(f"{hit.score:8.4f}  {hit.id:{width}}  {f'{hit.width}x{hit.height}':>11}{first}")


def _draw(root: Any, version: Any, source: InputAgain, sheet: Any, id: str | None, content: bytes, answer: Any) -> None:
    import io

    from PIL import Image, ImageOps

    from jobs.pictures import contact_sheet, placeholder
    from pipeline.search import own_hit

    own = own_hit(root, version, id) if id is not None else None
    shown = sheets.images(root, version, source, [*answer.hits, *([own] if own else [])])
    if own is not None:
        query = (shown[own.id], own.key)
    elif content:
        query = (ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"), "the image")
    else:
        query = (placeholder("a vector"), "the vector")
    hits = [(shown[hit.id], f"{hit.score:.3f} {hit.key}") for hit in answer.hits]
    what = "exact search" if answer.recall == 1 else f"recall@10 {answer.recall:.2f}"
    contact_sheet([[query, *hits]], sheet, title=f"Nearest images in version {version.version}, by cosine ({what})")
