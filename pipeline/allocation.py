"""Memory of a process that computes on the CPU: kept when it is freed, and had in pages of 2 MiB.

A forward pass asks for the same megabytes again and again. By default glibc gives them back to the kernel in between,
which zeroes each of their pages of 4 KiB anew: 450 page faults an image of pit_ti, 5,000 of pit_b.
"""

import ctypes
import os
from contextlib import suppress

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
