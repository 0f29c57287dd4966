"""What became of each shard of a run, kept as a Parquet file beside the run's note: what the report draws speed from.

Written once, however the run ended; nothing needs it to go on. Rows wait in one compressed buffer: a million shards
are about 50 MB of it.
"""

from contextlib import suppress
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embed import PARTS, Receipt
from pipeline.errors import StorageError
from pipeline.output import Root

ROWS_AT_ONCE = 8192  # as Python objects, some 8 MB
ERROR_CHARS = 300
RECEIPTS = pa.schema(
    [
        ("shard", pa.string()),
        ("worker", pa.string()),
        ("started", pa.float64()),  # Unix time
        ("ended", pa.float64()),
        ("samples", pa.int64()),
        ("rows", pa.int64()),
        ("bytes_read", pa.int64()),
        ("embedded", pa.bool_()),  # False: another run's files were already there
        ("error", pa.string()),  # null: the shard has its files
        *((f"{part}_s", pa.float32()) for part in PARTS),  # seconds; those of several threads are summed
    ]
)


class Ledger:
    """The receipts of one run, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._sink = BytesIO()
        self._writer: pq.ParquetWriter | None = None

    def add(self, receipt: Receipt) -> None:
        self._waiting.append(_row(receipt))
        if len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, RECEIPTS, compression="zstd", use_dictionary=["worker"])
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=RECEIPTS))
        self._waiting = []

    def put(self, root: Root, run: str) -> None:
        """Puts them beside the note of that name, if the store takes them; of a run without any, nothing."""
        if self._waiting:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError, StorageError):  # a report without its curve must not end a run that went well
                root.put_new(receipts_name(run), self._sink.getvalue())


def receipts_name(run: str) -> str:
    return f"reports/{run}.receipts.parquet"


def read_receipts(root: Root, run: str) -> pa.Table | None:
    """The columns of `RECEIPTS`, a row a shard; None where there is no such file, or a damaged one."""
    try:
        table = pq.read_table(BytesIO(root.read(receipts_name(run))))
    except (FileNotFoundError, ValueError, pa.ArrowException):
        return None
    return table if table.schema.equals(RECEIPTS) else None


def _row(receipt: Receipt) -> dict[str, Any]:
    counts = receipt.files.counts if receipt.files else None
    return {
        "shard": receipt.shard,
        "worker": receipt.worker,
        "started": receipt.started,
        "ended": receipt.ended,
        "samples": counts.samples if counts else 0,
        "rows": counts.rows if counts else 0,
        "bytes_read": receipt.bytes_read,
        "embedded": receipt.embedded,
        "error": receipt.error[:ERROR_CHARS] if receipt.error else None,
        **{f"{part}_s": receipt.seconds.get(part, 0.0) for part in PARTS},
    }
