"""What a process that embeds does first: it keeps its memory, in large pages, and leaves pandas out.

A forward pass on the CPU asks for the same megabytes again and again. By default glibc gives them back to the kernel in
between, which zeroes each of their pages of 4 KiB anew: 450 page faults an image of pit_ti, 5,000 of pit_b.
"""

import ctypes
import os
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder

# Of mallopt(3). Blocks up to the greatest size that it takes come from the heap, instead of from the kernel each; of
# the heap's top nothing goes back below 2 GiB.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 32 * 2**20
KEPT_BYTES = 2**31 - 1
# torch reads it when it allocates for the first time; the kernel has to allow `madvise`, as most do.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def keep_memory() -> bool:
    """For the rest of this process; call it before torch has made a tensor.

    False where the C library knows no such wish, as those of macOS and Alpine: there nothing changes.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    with suppress(AttributeError, OSError, TypeError):  # no `mallopt`, or no C library by that name
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(TRIM_THRESHOLD, KEPT_BYTES))
    return False


class _Hidden(MetaPathFinder):
    """Says that pandas is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out here")


def leave_pandas_out() -> None:
    """pyarrow imports it, where it is installed, to see whether a list is a Series: 0.2 to 0.4 s and 50 MB.

    pyarrow asks once, and pandas is hidden for that moment alone. Its `to_pandas` does not work here afterwards.
    """
    import pyarrow as pa

    sys.meta_path.insert(0, hidden := _Hidden())
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(hidden)
