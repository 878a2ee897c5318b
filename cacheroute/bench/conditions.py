"""What else the machine did while something was timed: other programs, a host that took the processors, heat, a limit.

As Linux tells it; elsewhere nothing is known. Knows no model.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cacheroute.install.machine import held_seconds, own_cores, processor_ticks

_ROOT = Path("/")


@dataclass(frozen=True)
class Conditions:
    """Of a stretch of time, on the cores that this process may use.

    other_seconds: processor seconds that other programs took; None where the system does not tell. stolen_seconds: those that the
    host of a virtual machine gave to others. held_seconds: how long a limit on processor time (a container's) made threads wait.
    throttled: whether a core was slowed down by heat or for lack of power.
    """

    other_seconds: float | None = None
    stolen_seconds: float = 0.0
    held_seconds: float = 0.0
    throttled: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The kernel's counters at one moment: seconds of all programs, stolen and held, slow-downs, and whether one is going on."""

    busy: float | None
    stolen: float
    held: float
    throttles: int
    cooling: bool


def look(root: Path = _ROOT) -> Snapshot:
    """The counters now. `root`: where proc and sys are, for tests."""
    busy, stolen = _processor_seconds(root)
    return Snapshot(busy, stolen, held_seconds(root), _throttles(root), any(_cooling(root)))


def between(before: Snapshot, after: Snapshot, own_seconds: float) -> Conditions:
    """What happened between two looks, of which `own_seconds` of processor time were this process's."""
    other = None
    if before.busy is not None and after.busy is not None:
        other = max(after.busy - before.busy - own_seconds, 0.0)
    return Conditions(
        other,
        max(after.stolen - before.stolen, 0.0),
        max(after.held - before.held, 0.0),
        after.throttles > before.throttles or after.cooling,
    )


def read_ahead_kib(path: Path, root: Path = _ROOT) -> int | None:
    """How much the kernel reads around a missing page of a mapped file, in KiB; None where it does not tell."""
    try:
        return int(read_ahead_setting(path, root).read_text("ascii"))
    except (OSError, ValueError):
        return None


def read_ahead_setting(path: Path, root: Path = _ROOT) -> Path:
    """The kernel's file with that number, for the device that holds `path`. Raises OSError."""
    device = path.stat().st_dev
    return root / f"sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"


def _processor_seconds(root: Path) -> tuple[float | None, float]:
    """Seconds that programs have run on this process's cores, interrupts left out, as reads cause them; and stolen ones."""
    try:
        tick, counts = os.sysconf("SC_CLK_TCK"), processor_ticks(root / "proc/stat")
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(sum(n[:3]) for n in counts) / tick if counts else None, sum(n[7] for n in counts if len(n) > 7) / tick
    except (OSError, ValueError):
        return None, 0.0


def _throttles(root: Path) -> int:
    """How often x86 processors have been slowed down; 0 where that is not counted."""
    cores, packages = 0, 0
    for folder in (root / f"sys/devices/system/cpu/cpu{i}/thermal_throttle" for i in own_cores()):
        with contextlib.suppress(OSError, ValueError):
            cores += int((folder / "core_throttle_count").read_text("ascii"))
            packages = max(packages, int((folder / "package_throttle_count").read_text("ascii")))
    return cores + packages


def _cooling(root: Path) -> Iterator[bool]:
    """Whether each of the kernel's ways to slow down a processor is in use, as on ARM."""
    for device in sorted(root.glob("sys/class/thermal/cooling_device*")):
        with contextlib.suppress(OSError, ValueError):
            if (device / "type").read_text("ascii").startswith(("cpufreq", "thermal-cpufreq", "Processor")):
                yield int((device / "cur_state").read_text("ascii")) > 0
