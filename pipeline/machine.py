"""What this machine has, of a container what it may use: cores, memory; how many workers it has room for; its names."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
# One thread a worker is fastest on the CPU (two workers gave 1.1 to 1.2 of one worker's images/s on two cores), and
# each has a model and an interpreter of its own; 3 GB leave room beside pit_b's whole run of two, 4.8 GB with the
# driver.
CPU_WORKER_BYTES = 3 * 2**30
WORKERS_SHARE = 0.75  # of the memory; the rest is for whatever else runs


def cores() -> int:
    """Those that this process may run on, and fewer where its container has a smaller share of them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _told(CGROUP / "cpu.max").partition(" ")
    return max(1, min(here, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else here


def memory_bytes() -> int:
    """All that this machine has, or its container may use."""
    limit, there = _told(CGROUP / "memory.max"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(there, int(limit)) if limit.isdecimal() else there


def cpu_workers(cores: int, memory_bytes: float) -> int:
    """How many processes embed on the CPU, unless somebody says so.

    By all memory, not by what is free: a run that is resumed on a busier day has as many workers, with as many threads
    each, so that its vectors have the same bits.
    """
    return max(1, min(cores, int(WORKERS_SHARE * memory_bytes / CPU_WORKER_BYTES)))


def facts(device: str) -> dict[str, Any]:
    """What a report tells of this machine: `cpu`, `cores`, `memory_bytes`, `gpus` (names), `system`, `python`."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "gpus": gpu_names() if device == "cuda" else [],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _told(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """By the driver's own tool: torch would start CUDA in a process that needs none."""
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return [line.strip() for line in told.splitlines() if line.strip()]
    return []


def _told(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another system
        return ""
