"""What became of each shard of a run, kept as a Parquet file beside the run's note: what the report draws speed from.

Written once, however the run ended; nothing needs it to go on. Rows wait in one compressed buffer: a million shards
are about 50 MB of it.
"""

from array import array
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embed import PARTS, Receipt
from pipeline.errors import StorageError
from pipeline.output import Root
from pipeline.rows import Counts

ROWS_AT_ONCE = 8192
ERROR_CHARS = 300
NUMBERS = ("started", "ended", "samples", "rows", "bytes_read", "embedded", *(f"{part}_s" for part in PARTS))
RECEIPTS = pa.schema(
    [
        ("shard", pa.string()),
        ("worker", pa.string()),
        ("error", pa.string()),  # null: the shard has its files
        ("started", pa.float64()),  # Unix time
        ("ended", pa.float64()),
        ("samples", pa.int64()),
        ("rows", pa.int64()),
        ("bytes_read", pa.int64()),
        ("embedded", pa.bool_()),  # False: another run's files were already there
        *((f"{part}_s", pa.float32()) for part in PARTS),  # seconds; those of several threads are summed
    ]
)


class Ledger:
    """The receipts of one run, in the order in which they came."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str, str | None]] = []  # shard, worker, error
        self._numbers = array("d")  # the values of `NUMBERS`, row by row: a dict a row takes ten times as long
        self._sink = BytesIO()
        self._writer: pq.ParquetWriter | None = None

    def add(self, receipt: Receipt) -> None:
        self._texts.append((receipt.shard, receipt.worker, receipt.error and receipt.error[:ERROR_CHARS]))
        counts = receipt.files.counts if receipt.files else Counts()
        self._numbers.extend(
            (receipt.started, receipt.ended, counts.samples, counts.rows, receipt.bytes_read, receipt.embedded)
        )
        self._numbers.extend(receipt.seconds.get(part, 0.0) for part in PARTS)
        if len(self._texts) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        numbers = np.frombuffer(self._numbers).reshape(-1, len(NUMBERS))
        columns: dict[str, Any] = dict(zip(("shard", "worker", "error"), zip(*self._texts, strict=True), strict=True))
        columns |= {name: numbers[:, i] for i, name in enumerate(NUMBERS)}
        arrays = [pa.array(columns[f.name]).cast(f.type) for f in RECEIPTS]
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, RECEIPTS, compression="zstd", use_dictionary=["worker"])
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=RECEIPTS))
        self._texts, self._numbers = [], array("d")

    def put(self, root: Root, run: str) -> None:
        """Puts them beside the note of that name, if the store takes them; of a run without any, nothing."""
        if self._texts:
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
    except (OSError, ValueError, pa.ArrowException):  # OSError: it is not there, or a page does not unpack
        return None
    return table if table.schema.equals(RECEIPTS) else None
