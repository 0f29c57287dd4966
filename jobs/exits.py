"""How a verb ends: exceptions → exit codes and one sentence on stderr, `--json` last on stdout."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from pipeline.errors import AGAIN, FAILED, INTERRUPTED, USAGE, NoRoom, StorageError, UsageError


def say(text: str) -> None:
    """A line for a person; stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def run(verb: Callable[[], int], as_json: bool) -> None:
    """Runs the verb's body, which returns its exit code, and exits. Our own defects keep their traceback.

    `as_json`: what ends the verb before its own result goes to stdout as an object with `error` and `exit_code`.
    """
    try:
        code = verb()
    except BrokenPipeError:
        code = FAILED  # the reader of our output has left, as `| head` does
    except (UsageError, StorageError, NoRoom, OSError, KeyboardInterrupt) as e:
        code, message = ending(e)
        code = _failed(code, message, as_json)
    raise typer.Exit(code)


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of a verb that ends so, and a sentence."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {str(error) or AGAIN}"
    return USAGE if isinstance(error, UsageError) else FAILED, str(error)


def _failed(code: int, message: str, as_json: bool) -> int:
    message = " ".join(message.split("\n"))  # names may hold line breaks
    say(f"shard2vec: {message}")
    if as_json:
        print_json({"error": message, "exit_code": code})
    return code
