"""`shard2vec VERB …`, also `python -m jobs VERB …`."""

import logging
import os
import sys
import warnings
from contextlib import suppress

import stamina
import typer

from jobs import (
    bench,
    compare,
    demo,
    describe,
    embed,
    exits,
    files,
    gc,
    index,
    job_file,
    near_duplicates,
    reembed,
    report,
    rollback,
    search,
    status,
    submit,
    verify,
)
from pipeline import signals
from pipeline.errors import UsageError

app = typer.Typer(
    name="shard2vec",
    help="Image shards to classified, embedded, verified Parquet: any timm backbone, every image exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS = (
    *(demo, embed, reembed, status, files, verify, describe, index, search, near_duplicates, compare),
    *(report, submit, bench, rollback, gc),
)
for verb in VERBS:
    name = verb.__name__.rpartition(".")[2]
    settings = getattr(verb, "SETTINGS", None)
    app.command(name.replace("_", "-"), context_settings=settings)(getattr(verb, name))


def main() -> None:
    """The console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # timm's and torch's hints to their own callers; `python -W` shows them
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are told once, by our own message
    logging.basicConfig(level=os.environ.get("SHARD2VEC_LOG", "ERROR"))
    stamina.instrumentation.set_on_retry_hooks([])  # its default prints a bare line for every retry
    with signals.interruptible():
        try:
            app(job_file.expand(sys.argv[1:]))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else exits.FAILED
        except (UsageError, KeyboardInterrupt) as e:
            code, message = exits.ending(e)
            exits.say(f"shard2vec: {message}")
        # Straight out: an exit after `import torch` has aborted in the interpreter's own teardown ("terminate called
        # without an active exception", seen once in some thirty), which would make a committed run end with 134.
        with suppress(OSError, ValueError):  # the reader of our output has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
