"""`--config job.yaml` → the same flags on the command line, where what the user typed wins."""

from collections.abc import Sequence

import yaml

from pipeline.errors import StorageError, UsageError
from pipeline.retries import said
from pipeline.storage import read_bytes, redact

REPEATABLE = {"input", "allow-url"}
ON, OFF = ("true", "True", "yes", "on"), ("false", "False", "no", "off", "null", "~", "")


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config URL` replaced by the flags that the file holds and the command line does not.

    Keys are flag names, with `-` or `_`. true is a bare flag, false leaves it out, a list repeats `input` and
    `allow-url`, and is joined by commas elsewhere. Raises `UsageError` for a file that cannot be read or is no mapping.
    """
    rest, url = _split(list(argv))
    if url is None:
        return rest
    typed = {arg.partition("=")[0] for arg in rest if arg.startswith("--")}
    flags: list[str] = []
    for key, value in _read(url).items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in typed and value not in OFF:
            flags += _arguments(flag, value)
    return [*rest, *flags]


def _split(argv: list[str]) -> tuple[list[str], str | None]:
    for i, arg in enumerate(argv):
        if arg.startswith("--config="):
            return argv[:i] + argv[i + 1 :], arg.partition("=")[2]
        if arg == "--config":
            if i + 1 == len(argv):
                raise UsageError("--config needs the URL of a YAML file")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
    return argv, None


def _read(url: str) -> dict[str, object]:
    try:
        # All scalars stay text: YAML would make 62 of `actors: 1:2`, and 8 of 010.
        content = yaml.load(read_bytes(url), Loader=yaml.BaseLoader)
    except (OSError, StorageError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise UsageError(f"--config {redact(url)} cannot be read: {_why(e)}") from e
    if not isinstance(content, dict):
        raise UsageError(f"--config {redact(url)} must be a mapping of flag names to values")
    return content


def _why(e: Exception) -> str:
    """YAML's own messages quote the line, which may hold a signed URL."""
    if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark is not None:
        return f"{e.problem}, in line {e.problem_mark.line + 1}"
    if isinstance(e, yaml.reader.ReaderError):
        return f"{e.reason}, at position {e.position}"
    return said(e)


def _arguments(flag: str, value: object) -> list[str]:
    if value in ON:
        return [flag]
    values = value if isinstance(value, list) else [value]
    if flag.removeprefix("--") in REPEATABLE:
        return [part for v in values for part in (flag, str(v))]
    return [flag, ",".join(map(str, values))]
