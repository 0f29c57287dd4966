"""What a process that embeds does first, each in a process of its own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from pipeline.process import keep_memory

torch.set_num_threads(1)
assert keep_memory() if sys.argv[1] == "kept" else True
# A forward pass: some blocks below the greatest that glibc keeps, and one above it.
sizes = [3 * 2**20, 20 * 2**20, 7 * 2**20, 60 * 2**20]
for n in range(6):
    if n == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(size // 4) for size in sizes]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PANDAS = """
import sys
import pyarrow as pa
from pipeline.process import leave_pandas_out

leave_pandas_out()
table = pa.Table.from_pylist([{"id": "a", "row": 1}])
assert "pandas" not in sys.modules, "pyarrow has imported it"
import pandas
leave_pandas_out()
print(pandas.Series(table["row"].to_pylist()).sum(), [type(finder).__module__ for finder in sys.meta_path])
"""


def of(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the wish is glibc's")
def test_a_pass_finds_the_memory_of_the_pass_before() -> None:
    """Page faults of four passes over 90 MB each, 92,160 pages of 4 KiB: at least ten times fewer."""
    assert int(of(FAULTS, "kept")) * 10 < int(of(FAULTS, "as it is"))


def test_pyarrow_leaves_pandas_alone_and_nobody_else_has_to() -> None:
    """A worker's first table imports no pandas; who wants it later has it, and imports are found as before."""
    total, _, finders = of(PANDAS).partition(" ")
    assert total == "1" and "pipeline.process" not in finders
