"""Small findings that this node keeps for its next runs: a file each in the cache, known by all that they depend on."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cache import cache_folder, clear_old


def recall(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """What `remember` was given. None where nothing is remembered, or the file is damaged."""
    with contextlib.suppress(OSError, ValueError):
        path = _path(kind, key)
        said = json.loads(path.read_bytes())
        if isinstance(said, dict) and said.pop("key", None) == _plain(key):
            os.utime(path)  # what nothing asks for is deleted one day
            return said
    return None


def remember(kind: str, key: dict[str, Any], found: dict[str, Any]) -> None:
    """JSON's types. The file is there whole or not at all; a cache that takes none costs the next run its search."""
    with contextlib.suppress(OSError):
        path = _path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as partial:
            try:
                json.dump({"key": _plain(key), **found}, partial)
                partial.flush()
                os.replace(partial.name, path)
            except OSError:
                os.unlink(partial.name)
                raise
        clear_old(path.parent)


@contextlib.contextmanager
def alone(kind: str, key: dict[str, Any]) -> Iterator[None]:
    """One process of this node at a time; the lock of one that dies is free again."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no such folder, no such lock: then each finds out for itself
            path = _path(kind, key).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _path(kind: str, key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / kind / f"{name}.json"


def _plain(key: dict[str, Any]) -> Any:
    """As it is read back."""
    return json.loads(json.dumps(key))
