"""Text that strangers wrote → text that may be shown: no signed URLs, no control characters, no endless lines."""

import re

from pipeline.retries import redact_all

MOST_CHARS = 200
MOST_ID_CHARS = 2000  # of an id that somebody may want to copy: shards' names have 800 bytes at most, keys fewer
# C0 and C1, line separators, and marks that turn the direction of what follows: a key could rewrite its neighbours.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def legible(text: str, most: int = MOST_CHARS) -> str:
    """At most so many characters, the middle left out; what cannot be seen is spelled out as in `\\x1b`."""
    shown = UNSEEN.sub(lambda c: c[0].encode("unicode_escape").decode(), redact_all(text[: 20 * most]))
    return shorten(shown, most)


def first_synonym(name: str, most: int) -> str:
    """Legible; of a class with several, as ImageNet's have them, the first where all are too long for `most`."""
    shown = legible(name, 20 * most)
    return shorten(shown if len(shown) <= most else shown.split(",")[0], most)


def shorten(text: str, most: int) -> str:
    """Both ends, where names differ, and an ellipsis between them."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
