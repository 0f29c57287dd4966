"""A local file that the user named for a result: refused before any work where it cannot be, else written whole."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UsageError


def check_place(path: Path, flag: str) -> None:
    """Raises `UsageError`, which names the flag, where no file of that name can be made."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder: name a file in it")


@contextmanager
def written_whole(path: Path, flag: str) -> Iterator[Path]:
    """Gives a path beside it to write to, which then takes its name; what cannot be written is a `UsageError`."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        raise UsageError(f"{flag} {path} cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
