"""How a verb ends: exceptions → exit codes and one sentence on stderr, `--json` last on stdout."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from pipeline.errors import StorageError, UsageError

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def say(text: str) -> None:
    """A line for a person; stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def run(verb: Callable[[], int]) -> None:
    """Runs the verb's body, which returns its exit code, and exits. Our own defects keep their traceback."""
    try:
        code = verb()
    except UsageError as e:
        say(f"shard2vec: {e}")
        code = USAGE
    except StorageError as e:
        say(f"shard2vec: {e}")
        code = FAILED
    except KeyboardInterrupt:
        say("shard2vec: interrupted; run the same command to go on")
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as `| head` does
        code = FAILED
    raise typer.Exit(code)
