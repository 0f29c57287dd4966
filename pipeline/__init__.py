"""Image shards → embeddings and classes in Parquet, every image exactly once.

`run.embed` is the whole flow: list the input as shards, see which have output already, embed the rest on Ray (each
actor streams shards through `embed.Embedder`: read, decode, forward, write), collect the files, commit a version.
`open_dataset` and `files` are how to read what was committed.
"""

from typing import Any

from pipeline.imports import defer_compiler

__version__ = "0.1.0"
__all__ = ["files", "open_dataset"]

defer_compiler()


def __getattr__(name: str) -> Any:
    # Resolved when first used: importing the package loads neither torch nor Ray.
    if name in ("files", "open_dataset"):
        from pipeline import readers

        return getattr(readers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
