"""`compare`: how far two sets, or two versions, tell the same of the same images."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs import exits

if TYPE_CHECKING:
    from pipeline.compare import Drift

MEANING = {
    "overlap_at_10": "of ten nearest neighbours in both",
    "mean_cosine": "of an image's two vectors",
    "norm_shift": "of the mean norm",
    "top1_agreement": "of images with the same first class",
    "class_shift": "of images in another class's bar of the histogram",
}


def compare(
    output: Annotated[str, typer.Argument(help="The dataset's root")],
    a: Annotated[str, typer.Argument(help="A version's number, or a set's name")],
    b: Annotated[str, typer.Argument(help="Another one")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Measure the drift from A to B, on the ids that both have.

    Example: shard2vec compare out 1 2
    """

    def body() -> int:
        from pipeline import versions
        from pipeline.compare import compare as measure

        found = measure(versions.existing_output(output), a, b)
        if json:
            exits.print_json(found.as_dict())
        else:
            _show(found)
        return 0

    exits.run(body, json)


def _show(found: "Drift") -> None:
    from pipeline.legible import legible

    print(f"A  {found.a} · set {found.set_a}")
    print(f"B  {found.b} · set {found.set_b}")
    whole = "all" if found.vectors == found.ids and found.shards == found.shards_read else "drawn from"
    print(f"{found.vectors:,} ids, {whole} {found.ids:,} in {found.shards_read:,} of {found.shards:,} common shards")
    for name, meaning in MEANING.items():
        value = getattr(found, name)
        if value is None:
            print(f"  {name:<15} {'–':>9}  {found.unmeasured[name]}")
            continue
        if name == "overlap_at_10":
            meaning += f"; by chance {found.overlap_by_chance:.4f}"
        elif name == "mean_cosine" and not found.same_weights:
            meaning += "; the weights differ"
        sign = "+" if name == "norm_shift" else ""
        print(f"  {name:<15} {value:>{sign}9.4f}  {meaning}")
    for move in found.moved:
        name = f"{legible(move.name)} ({move.index})" if move.name else f"class {move.index}"
        print(f"    {move.share_a:>7.2%} → {move.share_b:>7.2%}  {name}")
