"""Why a row of `bench` is not to be trusted: something else computed, the processor was slow, misses were not reads, or the
kernel reads more than elsewhere for llama.cpp's mapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cacheroute.bench.conditions import read_ahead_kib, read_ahead_setting
from cacheroute.bench.runs import Run
from cacheroute.engine import stores
from cacheroute.files import size

_SHARE = 0.1  # of the threads' time, from which on something else counts
_READ_AHEAD_KIB = 512  # Linux has 128; with several MiB a mapping larger than memory fetches itself many times over
_TICKS_PER_CORE = 0.02  # seconds by which the kernel's count of a run may be wrong on each core


def of(runs: Sequence[Run], n_threads: int, n_cores: int, *, io: str, hooked: bool) -> tuple[str, ...]:
    """The reasons, each part of a sentence; none for a row that can be trusted. `hooked`: cacheroute has counted the reads, by
    `io`."""
    kept = (stores.NOT_DROPPED,) if hooked and io == stores.BUFFERED and not stores.drops_cached() else ()
    return (*_busy(runs, n_threads, n_cores), *_slowed(runs), *(_unread(runs) if hooked else ()), *kept)


def of_mapping(path: Path) -> tuple[str, ...]:
    """The reasons that the device of a model gives against the control, which maps it."""
    kib = read_ahead_kib(path)
    if kib is None or kib <= _READ_AHEAD_KIB:
        return ()
    return (
        f"the kernel fetches {kib} KiB around a missing page here, 128 elsewhere (root: echo 128 >{read_ahead_setting(path)})",
    )


def other_cores(runs: Sequence[Run]) -> float | None:
    """Cores that other programs and the host of a virtual machine kept busy, on average; None where the system does not tell."""
    during = [run.conditions for run in runs]
    taken = [c.other_seconds + c.stolen_seconds for c in during if c.other_seconds is not None]
    return sum(taken) / sum(run.seconds for run in runs) if runs and len(taken) == len(runs) else None


def _busy(runs: Sequence[Run], n_threads: int, n_cores: int) -> Iterator[str]:
    """Cores that these threads leave free may be used by others."""
    taken = other_cores(runs)
    if taken is None:
        return
    seconds = sum(run.seconds for run in runs)
    missing = taken - max(n_cores - n_threads, 0) - _TICKS_PER_CORE * n_cores * len(runs) / seconds
    if missing > _SHARE * min(n_threads, n_cores):
        yield f"other programs kept {taken:.1f} of {n_cores} cores busy"


def _slowed(runs: Sequence[Run]) -> Iterator[str]:
    held, seconds = sum(run.conditions.held_seconds for run in runs), sum(run.seconds for run in runs)
    if held > _SHARE * seconds:
        yield f"a limit on processor time (cgroup) made it wait {held:.1f} s"
    if any(run.conditions.throttled for run in runs):
        yield "the processor was slowed down by heat or for lack of power"


def _unread(runs: Sequence[Run]) -> Iterator[str]:
    """Experts that others keep in memory, and misses that no device has answered."""
    held = max((max(run.foreign_bytes or 0, (run.resident_bytes or 0) - run.counted_bytes) for run in runs), default=0)
    if held > 0:
        yield f"{size(held)} of experts stayed in memory, as another process maps the file"
    asked = sum(run.counters.read_bytes for run in runs)
    delivered = [run.device_bytes for run in runs if run.device_bytes is not None]
    if delivered and len(delivered) == len(runs) and sum(delivered) < asked / 2:
        yield (
            f"the device delivered {size(sum(delivered))} of {size(asked)}: "
            "the rest was in a cache, or this system does not count"
        )
