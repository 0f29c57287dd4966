"""`describe`: the numbers of a model's card, without its weights."""

from typing import Annotated, Any

import typer

from jobs import exits

BETWEEN = {int: "×", list: " · ", float: ", "}  # by the type of a list's parts: sides of a shape, shapes, channels


def describe(
    model: Annotated[str, typer.Argument(help="Any timm name, hf-hub:… or local-dir:…")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout")] = False,
) -> None:
    """Show a model's size, cost, preprocessing and output shapes, without loading weights.

    Example: shard2vec describe pit_b_224
    """

    def body() -> int:
        from pipeline.describe import describe as look

        card = look(model)
        if json:
            exits.print_json(card)
        else:
            _print(card)
        return 0

    exits.run(body, json)


def _print(card: dict[str, Any]) -> None:
    """A line per number, names to the right; then a line per note."""
    numbers = {name: value for name, value in card.items() if name != "notes"}
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:>{width}}  {_text(value)}")
    if card["notes"]:
        print("", *card["notes"], sep="\n")


def _text(value: Any) -> str:
    """One line: 4.364, bicubic, 3×256×256, 64×27×27 · 128×14×14; `none` for nothing."""
    if value in (None, []):
        return "none"
    if isinstance(value, list):
        return BETWEEN[type(value[0])].join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
