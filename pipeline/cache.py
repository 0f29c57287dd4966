"""This node's cache: what any run here would otherwise fetch or find anew."""

import os
import time
from contextlib import suppress
from pathlib import Path

KEEP_S = 30 * 86400  # what nothing has used for so long is deleted


def cache_folder() -> Path:
    """`$SHARD2VEC_CACHE`, else `shard2vec` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shard2vec"
    return Path(os.environ.get("SHARD2VEC_CACHE", default))


def clear_old(folder: Path) -> None:
    """Deletes the folder's files that nothing has used for `KEEP_S`."""
    for old in folder.iterdir():
        with suppress(FileNotFoundError):  # another run's partial file, just renamed
            if old.is_file() and time.time() - old.stat().st_mtime > KEEP_S:
                old.unlink()
