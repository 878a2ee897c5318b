"""What this machine has to offer: processors and free memory. Knows nothing of models."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def is_android(root: Path = Path("/")) -> bool:
    """Whether this is Android, as in Termux, whose Python calls itself linux before 3.13 and android since. `root`: for tests."""
    return sys.platform == "android" or hasattr(sys, "getandroidapilevel") or (root / "system/bin/app_process").exists()


def cores() -> int:
    """Cores that this process may use."""
    return len(own_cores())


def own_cores() -> list[int]:
    """Their numbers, where the system limits a process to some; else as many as there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def processor_ticks(stat: Path = Path("/proc/stat")) -> list[list[int]]:
    """What the kernel has counted for each core that this process may use, in ticks (SC_CLK_TCK): user, nice, system, idle,
    iowait, irq, softirq, steal, and what newer kernels add. Raises OSError or ValueError where it does not tell."""
    own = {f"cpu{i}" for i in own_cores()}
    lines = [line.split() for line in stat.read_text("ascii").splitlines()]
    return [[int(n) for n in words[1:]] for words in lines if words and words[0] in own]


def big_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use and that are at least half as fast as the fastest: a thread on a slow one holds up others.

    As Linux ranks them (cpu_capacity, or the highest frequency); all of them where it does not. `root`: where sys is, for tests.
    """
    own = own_cores()
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with contextlib.suppress(OSError, ValueError):
            speeds = [int((root / f"sys/devices/system/cpu/cpu{i}" / name).read_text("ascii")) for i in own]
            return sum(2 * speed >= max(speeds) for speed in speeds)
    return len(own)


def memory(root: Path = Path("/")) -> dict[str, int]:
    """What the kernel says of memory, in bytes: MemTotal, MemAvailable and others; {} where it does not tell, as on macOS."""
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    except (OSError, ValueError, IndexError):
        return {}


def available_memory(root: Path = Path("/"), *, ulimits: bool = True) -> int | None:
    """Bytes of memory that a new program may use without pushing others out; None where the system does not tell.

    Linux and Android: MemAvailable, or less where a limit leaves less: one of any cgroup that this process is in, v1 or v2, or,
    with `ulimits`, of `ulimit`, which counts address space, used or not. macOS: all of the memory. `root`: where proc and sys
    are, for tests.
    """
    free = memory(root).get("MemAvailable")
    if free is None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    limits = [*_group_limits(root), *(ulimit_room(root) if ulimits else [])]
    return min([free, *limits])


def _group_limits(root: Path) -> Iterator[int]:
    """What each cgroup leaves this process."""
    for group in _groups(root):
        room = _group_room(group)
        if room is not None:
            yield room


def held_seconds(root: Path = Path("/")) -> float:
    """Seconds for which a limit on processor time, of any cgroup that this process is in, has made threads wait."""
    held = 0.0
    for group in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            stat = dict(line.split() for line in (group / "cpu.stat").read_text("ascii").splitlines())
            held = max(held, int(stat.get("throttled_usec", 0)) / 1e6, int(stat.get("throttled_time", 0)) / 1e9)
    return held


def _groups(root: Path, controller: str = "memory") -> Iterator[Path]:
    """The folders of the cgroups of this process, v1 (of that controller) and v2, each with all that enclose it."""
    try:
        mounts = (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
        own = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    # ID:CONTROLLERS:PATH; v2 has no controllers
    paths = {
        controller: p for _, cs, p in (line.split(":", 2) for line in own if line.count(":") > 1) for controller in cs.split(",")
    }
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        name = controller if kind[0] == "cgroup" else ""
        if name not in paths or (name and name not in kind[2].split(",")):
            continue
        top = root / unescaped(fields[4]).lstrip("/")
        group = top / _below(paths[name], unescaped(fields[3]))
        while group != top:
            yield group
            group = group.parent
        yield top


def _below(path: str, mounted: str) -> str:
    """Where a group is below a mount of the group `mounted`; "" where the mount does not show it (a container's)."""
    mounted = mounted.rstrip("/")
    inside = path == mounted or path.startswith(mounted + "/")
    return path[len(mounted) :].strip("/") if inside and ".." not in path.split("/") else ""


def unescaped(path: str) -> str:
    """A path as mountinfo writes it, without the escapes."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, char)
    return path


def _group_room(group: Path) -> int | None:
    """What the limits of one cgroup leave: its page cache can be taken back. None without a limit."""
    try:
        stat = {key: int(n) for key, n in (line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())}
    except (OSError, ValueError):
        return None
    v2 = (group / "memory.current").exists()
    cache = (
        stat.get("file", 0) - stat.get("shmem", 0)
        if v2
        else stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
    )
    rooms = []
    for limit in ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            used = int((group / ("memory.current" if v2 else "memory.usage_in_bytes")).read_text("ascii"))
            rooms.append(max(int((group / limit).read_text("ascii")) - used + cache, 0))
    return min(rooms, default=None)


def ulimit_room(root: Path = Path("/")) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave this process; mapped files count for the first."""
    try:
        import resource

        statm = [int(n) * os.sysconf("SC_PAGE_SIZE") for n in (root / "proc/self/statm").read_text("ascii").split()]
        for limit, used in ((resource.RLIMIT_AS, statm[0]), (resource.RLIMIT_DATA, statm[5])):
            soft, _ = resource.getrlimit(limit)
            if soft != resource.RLIM_INFINITY:
                yield max(soft - used, 0)
    except (ImportError, OSError, ValueError, IndexError):
        return
