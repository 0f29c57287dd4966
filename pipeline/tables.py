"""A Parquet file as rows of key, label and image (or its address).

A page or row group that cannot be read costs its own rows: their number is known from the footer, so each becomes a
row with a `Reject`, and the next row group goes on. Only a footer that cannot be read costs the file, one row `#end`.
Errors of the store below pass through as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.columns import Columns, Found, find_columns
from pipeline.errors import Reason, Reject, UsageError

BATCH_ROWS = 1  # as fast as 32 (9 us a row of 20 kB); and a dictionary's one large image is not there 32 times
READ_BYTES = 2**20  # of a large column at a time: its row group is never held whole …
# … but one up to this size is: there pyarrow refuses a damaged page that claims 2 GB, and takes them in a stream.
GROUP_BYTES = 64 * 2**20
LIST_ENTRIES, TEXT_BYTES = 10**6, 10**8  # in a footer: pyarrow's own limits
ROWS_A_BYTE = 64  # more rows than that are no images, but a damaged count
MAGIC = b"PAR1"
INT32 = range(-(2**31), 2**31)  # what the output's label column holds


@dataclass(slots=True)
class Row:
    key: str
    image: bytes | None = None
    url: str | None = None
    label: int | None = None
    reject: Reject | None = None


def read_schema(raw: BinaryIO) -> pa.Schema | None:
    """The columns as the footer names them; None where there is no footer to read."""
    source = _Source(raw)
    try:
        return _open(source, 0).schema_arrow
    except (pa.ArrowException, OSError, ValueError):
        source.raise_own()
        return None


def read_rows(raw: BinaryIO, size: int, columns: Columns, images: bool = True) -> Iterator[Row]:
    """Every row in order. Without `images` only their keys are read: the same ones."""
    source = _Source(raw)
    try:
        file = _open(source, 0)
        schema, groups = file.schema_arrow, [file.metadata.row_group(g) for g in range(file.num_row_groups)]
        _check_counts(file.metadata.num_rows, [group.num_rows for group in groups], size)
    except (pa.ArrowException, OSError, ValueError) as e:
        source.raise_own()
        yield Row("#end", reject=_unreadable(raw, size, e))
        return
    try:
        found, refused = find_columns(schema, columns), None
    except UsageError as e:  # the first shard had them: this one is the odd one out
        found, refused = Found(None, None, None, None), Reject("missing_image", "read", str(e))
    start = 0
    for g, group in enumerate(groups):
        keys = _column(source, file, g, found.key)
        rows = (Row(_key(found.key, keys, i, start + i), reject=refused) for i in range(group.num_rows))
        if images and refused is None:
            yield from _with_images(source, file, g, found, rows)
        else:
            yield from rows
        start += group.num_rows


def _open(source: "_Source", buffer_bytes: int, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    return pq.ParquetFile(
        cast(IO[Any], source),
        metadata=metadata,
        # A list has no more entries than the file has bytes: pyarrow's own limit of 10^6 row groups takes 320 MB.
        thrift_container_size_limit=max(1, min(LIST_ENTRIES, source.size)),
        thrift_string_size_limit=max(1, min(TEXT_BYTES, source.size)),
        pre_buffer=False,
        buffer_size=buffer_bytes,
        page_checksum_verification=True,
    )


def _check_counts(rows: int, counts: list[int], size: int) -> None:
    """A damaged footer may promise any number of rows, and each would become a reject."""
    # Not by the columns' own counts: `group.column(i)` ends the process on some damage (a C++ exception, pyarrow 26).
    if sum(counts) != rows or min(counts, default=0) < 0 or rows > ROWS_A_BYTE * size:
        raise pa.ArrowInvalid(f"the footer's counts of rows contradict each other: {rows} rows in {size} bytes")


def _unreadable(raw: BinaryIO, size: int, e: Exception) -> Reject:
    if size == 0:
        return Reject("empty", "read", "the file holds no bytes, not even Parquet's footer")
    ends = []
    for at in (0, max(0, size - len(MAGIC))):
        raw.seek(at)
        ends.append(raw.read(len(MAGIC)))
    if ends[0] == MAGIC and ends[1] != MAGIC:
        return Reject("truncated", "read", f"the file ends at byte {size} without Parquet's footer: all rows lost")
    return Reject("corrupt", "read", f"no Parquet footer that can be read: all rows lost ({_line(e)})")


def _line(e: Exception) -> str:
    return " ".join(str(e).split())


def _column(source: "_Source", file: pq.ParquetFile, group: int, name: str | None) -> pa.ChunkedArray | None:
    """A small column of a row group as Arrow holds it; None where it cannot be read."""
    if name is None:
        return None
    try:
        column = file.read_row_group(group, columns=[name], use_threads=False).column(name)
    except (pa.ArrowException, OSError):
        source.raise_own()
        return None
    return column if len(column) == file.metadata.row_group(group).num_rows else None


def _value(column: pa.ChunkedArray | None, i: int) -> Any:
    return None if column is None else _plain(column[i])


def _plain(value: pa.Scalar) -> Any:
    """None too for a text that is no UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _key(name: str | None, keys: pa.ChunkedArray | None, i: int, row: int) -> str:
    if name is None:
        return str(row)
    key = _value(keys, i)
    return f"#{row}" if key in (None, "") else str(key)


def _with_images(
    source: "_Source", file: pq.ParquetFile, group: int, found: Found, rows: Iterator[Row]
) -> Iterator[Row]:
    labels = _column(source, file, group, found.label)
    values = _urls(source, file, group, found.uri) if found.uri else _images(source, file, group, found.image or "")
    i, problem = 0, "fewer values than rows"
    reason: Reason = "corrupt"
    try:
        # The values first: zip takes from its second only where the first had one.
        for (value, lack), row in zip(values, rows, strict=False):
            label = _value(labels, i)
            row.label = label if label is not None and label in INT32 else None
            if lack:
                row.reject = Reject("missing_image", "read", lack)
            elif found.uri:
                row.url = value
            else:
                row.image = value
            yield row
            i += 1
    except (pa.ArrowException, OSError) as e:
        source.raise_own()
        problem = _line(e)
        if isinstance(e, pa.ArrowNotImplementedError) or "not supported" in problem:  # LZO's is a plain OSError
            reason = "unsupported"
    for row in rows:
        row.reject = Reject(reason, "read", f"row group {group} cannot be read from its row {i} on ({problem})")
        yield row


def _urls(source: "_Source", file: pq.ParquetFile, group: int, name: str) -> Iterator[tuple[Any, str]]:
    column = _column(source, file, group, name)
    if column is None:
        raise pa.ArrowInvalid(f"column {name}")
    for i in range(len(column)):
        url = (_value(column, i) or "").strip()
        yield url, "" if url else f"column {name} holds no URL"


def _images(source: "_Source", file: pq.ParquetFile, group: int, name: str) -> Iterator[tuple[Any, str]]:
    if file.metadata.row_group(group).total_byte_size > GROUP_BYTES:
        file = _open(source, READ_BYTES, file.metadata)
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[name], use_threads=False):
        for value in batch.column(name):
            path = None
            if isinstance(value, pa.StructScalar) and value.is_valid:
                path = _plain(value["path"]) if "path" in value else None
                value = value["bytes"]
            lack = "" if value.is_valid else f"column {name} is null"
            if lack and path:
                lack = f"column {name} names {path!r} and does not hold its bytes"
            yield value.as_py(), lack


class _Source:
    """`raw` as pyarrow wants it, noting the store's errors: pyarrow's own are OSErrors as well.

    A raw stream may give less than it was asked for; to pyarrow that would be the end of the file.
    """

    closed = False

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self.size = raw.seek(0, 2)
        self._error: Exception | None = None

    def raise_own(self) -> None:
        if self._error is not None:
            raise self._error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def read(self, count: int = -1) -> bytes:
        parts, left = list[bytes](), max(0, self.size - self._raw.tell())
        count = min(count, left) if count >= 0 else left  # damaged lengths are no reason to allocate them
        try:
            while count and (part := self._raw.read(count)):
                parts.append(part)
                count -= len(part)
        except Exception as e:
            self._error = e
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self.closed = True
