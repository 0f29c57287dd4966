"""Flags that several verbs take, declared once: a dataclass of them stands for them among a verb's parameters."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True)
class FlagGroup:
    """What was typed, or stood in the job file. Each field is a flag, and its annotation is typer's."""

    def check(self, verb: str) -> None:
        """Raises `UsageError` where the verb would before any work: `submit` asks for it."""


def takes_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb(…own, asked: FlagGroup, …own)` → the function for typer, which takes a group's fields in its place.

    Its `check` takes the same, does nothing, and raises what the groups' own do.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if inspect.isclass(hint) and issubclass(hint, FlagGroup)}
    taken: list[inspect.Parameter] = []
    for name, own in inspect.signature(verb).parameters.items():
        taken += _fields(groups[name]) if name in groups else [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    def grouped(given: dict[str, Any]) -> dict[str, Any]:
        return {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        verb(**grouped(given), **given)

    def check(**given: Any) -> None:
        for group in grouped(given).values():
            group.check(verb.__name__)

    command.check = check  # type: ignore[attr-defined]
    command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in taken}
    return command


def _fields(group: type[FlagGroup]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]
