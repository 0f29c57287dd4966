"""A published Parquet file, opened to read some of it; what is damaged is named."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.output import Root


@contextmanager
def open_parquet(root: Root, name: str, size: int | None = None) -> Iterator[pq.ParquetFile]:
    """`size`: in bytes, where it is known. Whatever is wrong with the file within the context is a `StorageError`."""
    try:
        with root.open(name, size) as f:
            yield pq.ParquetFile(f)
    except (KeyError, ValueError, OSError, pa.ArrowException) as e:  # OSError: gone, or a page that does not unpack
        raise StorageError(f"{name} cannot be read: {' '.join(str(e).split())[:200]}") from e
