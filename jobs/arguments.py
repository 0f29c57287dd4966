"""A verb's arguments as another machine must get them: checked here, local paths spelled out, local lists sent."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.shipment import Shipment

# The parameters of all verbs that name a file or a folder, by a URL or a path.
PLACES = {"input", "output", "model", "weights", "labels", "image", "vector", "sheet", "html", "parquet"}
NOT_SENT = {"config", "help"}  # a job file is part of the command line by now
NO_PATHS = ("pretrained", "random:")


def parse(command: Any, verb: str, arguments: list[str], parent: Any) -> tuple[Shipment, list[str], dict[str, Any]]:
    """The shipment, the local paths that it names, and the verb's parameters by name.

    Leaves as the verb itself would where the arguments are none of its own, and on `--help`.
    """
    with command.make_context(verb, list(arguments), parent=parent) as context:
        params = dict(context.params)
        given = {name for name in params if context.get_parameter_source(name).name != "DEFAULT"}
    places = _Places()
    options, positional = [verb], list[str]()
    for parameter in command.params:
        value = params.get(parameter.name)
        # 0 equals False, and is a value.
        if value is None or value is False or value in ((), []) or parameter.name in NOT_SENT:
            continue
        texts = [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        sent = [places.spelled(parameter.name, text) for text in texts] if parameter.name in PLACES else texts
        if parameter.name not in given and sent == texts:
            continue
        if parameter.param_type_name == "argument":
            positional += sent
        elif value is True:
            options.append(parameter.opts[-1])
        else:
            options += [f"{parameter.opts[-1]}={text}" for text in sent]
    arguments = [*options, *(["--", *positional] if positional else [])]
    return Shipment(verb, arguments, places.lists), places.local, params


class _Places:
    """What places are called on other machines; gathers the local ones and the lists to take along."""

    def __init__(self) -> None:
        self.local, self.lists = list[str](), dict[str, str]()

    def spelled(self, name: str, text: str) -> str:
        if name == "model":
            return f"local-dir:{self._path(text[10:])}" if text.startswith("local-dir:") else text
        if name == "weights" and text.startswith(NO_PATHS):
            return text
        if name == "input" and text.startswith("@") and _is_local(text[1:]):
            return f"@{self._taken_along(text[1:])}"
        return self._path(text)

    def _path(self, text: str) -> str:
        if not _is_local(text):
            return text
        path = os.path.abspath(Path(text.removeprefix("file://")).expanduser())
        self.local.append(path)
        return path

    def _taken_along(self, path: str) -> str:
        try:
            text = Path(path.removeprefix("file://")).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"input @{path}: the list cannot be read: {e}") from e
        name = f"lists/{len(self.lists)}.txt"
        self.lists[name] = "".join(f"{line}\n" for line in self._lines(text.splitlines()))
        return name

    def _lines(self, lines: Iterable[str]) -> Iterable[str]:
        for line in map(str.strip, lines):
            yield line if not line or line.startswith("#") else self._path(line)


def _is_local(text: str) -> bool:
    return "://" not in text or text.startswith("file://")
