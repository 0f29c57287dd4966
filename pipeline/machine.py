"""What this machine has, of a container what it may use: cores, memory; and how many workers it has room for."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# One thread a worker is fastest on the CPU (two workers gave 1.1 to 1.2 of one worker's images/s on two cores), and
# each has a model and an interpreter of its own; 3 GB leave room beside pit_b's whole run of two, 4.8 GB with the
# driver.
CPU_WORKER_BYTES = 3 * 2**30


def cores() -> int:
    """Those that this process may run on, and fewer where its container has a smaller share of them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _told(CGROUP / "cpu.max").partition(" ")
    return max(1, min(here, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else here


def free_memory_bytes() -> int:
    """What the kernel would give without swapping, within the container's limit; all of it where it does not tell."""
    lines = dict(line.split(":", 1) for line in _told(Path("/proc/meminfo")).splitlines() if ":" in line)
    available = lines.get("MemAvailable", "").split()
    free = int(available[0]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _told(CGROUP / "memory.max"), _told(CGROUP / "memory.current")
    return min(free, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else free


def cpu_workers(cores: int, memory_bytes: float) -> int:
    """How many processes embed on the CPU, unless somebody says so."""
    return max(1, min(cores, int(memory_bytes / CPU_WORKER_BYTES)))


def _told(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another system
        return ""
