"""The text of a flag → its value, or a `UsageError` that names both. None stays None: the flag was left out."""

import os
import re

from pipeline.errors import UsageError
from pipeline.retries import redact


def words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(","))


def indices(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(index) for index in text.split(","))
    except ValueError:
        raise UsageError(f"--feature-indices {text}: must be whole numbers, as in 0,2") from None


def size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"([0-9]+)(?:[xX,]([0-9]+))?", text.strip())  # a job file's list comes with a comma
    if sides is None:
        raise UsageError(f"--image-size {text}: must be H or HxW, as in 320 or 256x384")
    return int(sides[1]), int(sides[2] or sides[1])


def batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--batch-size {text}: must be a whole number or auto")
    return int(text)


def pool(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    least, colon, most = text.partition(":")
    if not least.isdecimal() or (colon and not most.isdecimal()):
        raise UsageError(f"--actors {text}: must be N or MIN:MAX")
    return int(least), int(most or least)


def keep(text: str) -> int | None:
    """None: all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"--keep {text}: must be a whole number, or all")
    return int(text)


def ray_address(text: str | None) -> str | None:
    """Where the flag was left out: Ray's own `RAY_ADDRESS`, which a Ray job has. None: a Ray of this machine alone.

    Raises `UsageError` for a variable that only `submit` can use, as `ray job submit` does: Ray's own programs end at
    it too, and to work on this machine alone, unasked, is not what somebody with a cluster expects.
    """
    address = os.environ.get("RAY_ADDRESS", "") if text is None else text
    if text is None and "://" in address:
        raise UsageError(
            f"RAY_ADDRESS is {redact(address)}, which is for `shard2vec submit`: put `submit` before the verb, or say "
            "--ray-address local for this machine alone, host:port on a node of the cluster"
        )
    return None if address in ("", "local") else address
