"""`describe`: the numbers of a model's card, without its weights."""

from typing import Annotated, Any

import typer

from jobs import exits


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
            for name, value in card.items():
                print(f"{name:>14}  {_text(value)}")
        return 0

    exits.run(body, json)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " · ".join(_text(v) for v in value)
    return (
        "×".join(_text(v) for v in value)
        if isinstance(value, list) and all(isinstance(v, int) for v in value)
        else (", ".join(_text(v) for v in value) if isinstance(value, list) else str(value))
    )
