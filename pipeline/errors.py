"""The three kinds of failure: the sample's, the caller's and the store's; and what a command exits with.

A `Reject` costs one row in `rejects`. A `UsageError` ends the run with 2 before any work. A `StorageError`
has already been retried; it leaves its shard uncommitted. `Stalled` and `NoRoom` are what the machines could not give.
Anything else is our own defect and is raised as it is.
"""

from typing import Literal, get_args

COMMITTED, FAILED, USAGE, REFUSED, STALLED, INTERRUPTED = 0, 1, 2, 3, 4, 130  # exit codes
AGAIN = "run the same command to go on"

Reason = Literal[
    "corrupt", "truncated", "unsupported", "too_large", "empty", "duplicate_key", "missing_image", "fetch_failed"
]
Stage = Literal["read", "fetch", "decode"]
REASONS: tuple[str, ...] = get_args(Reason)


class Reject(Exception):
    """One sample that can give no vector: where it was found out, which kind, and a sentence."""

    def __init__(self, reason: Reason, stage: Stage, message: str):
        super().__init__(reason, stage, message)
        self.reason, self.stage, self.message = reason, stage, message


class UsageError(Exception):
    """Wrong flags, input, model, weights or output, found before any work: exit code 2 and this one sentence."""


class NoRoom(RuntimeError):
    """A device, or this machine for its sake, lacks memory; the message tells the figures: exit code 1."""


class Stalled(Exception):
    """No image and no shard was finished for the stall timeout; the message names the stage: exit code 4."""


class StorageError(Exception):
    """The store did not give or take an object, after bounded retries."""
