"""What a process that embeds does first, each in a process of its own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import torch
from pipeline.process import keep_memory

torch.set_num_threads(1)
assert keep_memory()
for n in range(6):
    if n == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(int(megabytes) * 2**18) for megabytes in sys.argv[1:]]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()

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
@pytest.mark.parametrize(
    "megabytes",
    [
        (3, 20, 7),
        pytest.param((60,), marks=pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this kernel has no huge pages")),
    ],
)
def test_a_pass_finds_the_memory_of_the_pass_before(megabytes: tuple[int, ...]) -> None:
    """Four passes, each over as many pages of 4 KiB: a tenth of these are faults at most.

    Blocks of less than 32 MB are kept; larger ones come in pages of 2 MiB.
    """
    assert int(of(FAULTS, *map(str, megabytes))) < 4 * sum(megabytes) * 256 / 10


def test_pyarrow_leaves_pandas_alone_and_nobody_else_has_to() -> None:
    """A worker's first table imports no pandas; who wants it later has it, and imports are found as before."""
    total, _, finders = of(PANDAS).partition(" ")
    assert total == "1" and "pipeline.process" not in finders
