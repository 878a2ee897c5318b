"""What this machine has to offer: processors and free memory. Knows nothing of models."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes of memory that a new program may use without pushing others out; None where the system has no such figure.

    Linux and Android: MemAvailable, or less inside a container with a limit. macOS: all of the memory.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    limit = _container_room(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, limit)


def _container_room(group: Path) -> int | None:
    """What the limit of a cgroup (v2) leaves: its page cache can be taken back. None without a limit."""
    try:
        limit = (group / "memory.max").read_text("ascii").strip()
        used = int((group / "memory.current").read_text("ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        return None if limit == "max" else max(int(limit) - used + int(stat.get("file", 0)), 0)
    except (OSError, ValueError):
        return None
