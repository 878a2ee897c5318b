"""How many threads compute: no more than the processors that other programs leave.

A thread of llama.cpp waits for all the others after every matrix multiplication, so one that is not on a processor holds up all
of them: beside two busy processes on two cores, one thread is faster than two (scripts/RESULTS.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_PERIOD = 0.25  # seconds between two looks: a tick of the kernel's count is 0.01
_SMOOTH = 0.6  # the weight of the last look
_TOO_MANY, _ROOM = 0.6, 0.75  # processors that must be lacking, or free, before the number changes


@dataclass(frozen=True)
class Busy:
    """Seconds of processors since some time: of this process, and of all on the processors that it may use."""

    own: float
    all: float


def busy() -> Busy | None:
    """None where the system does not tell (Android, macOS)."""
    try:
        own = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        lines = [line.split() for line in _STAT.read_text("ascii").splitlines()]
        # user, nice, system, irq and softirq; not idle, iowait, and what another machine takes
        ticks = sum(sum(int(words[i]) for i in (1, 2, 3, 6, 7)) for words in lines if words and words[0] in own)
        return Busy(time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return None


class ComputeThreads:
    """Decides on a number of threads, at most `most`, between two tokens. `cores`: processors that this process may use."""

    def __init__(
        self,
        most: int,
        cores: int,
        looks: Callable[[], Busy | None] = busy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = self._most = most
        self._cores, self._look, self._clock = cores, looks, clock
        self._seen, self._at = (looks() if most > 1 else None), clock()
        self._others = 0.0  # processors that other programs take

    def look(self) -> int:
        """The number of threads for the next token; takes 0.1 ms four times a second."""
        now, before = self._clock(), self._seen
        passed = now - self._at
        if before is None or passed < _PERIOD:
            return self.n
        seen = self._look()
        if seen is None:
            return self.n
        self._seen, self._at = seen, now
        others = min(max((seen.all - before.all - (seen.own - before.own)) / passed, 0.0), self._cores)
        self._others += _SMOOTH * (others - self._others)
        left = self._cores - self._others
        if left < self.n - _TOO_MANY or left >= self.n + _ROOM:
            self.n = min(max(int(left + 1 - _ROOM), 1), self._most)
        return self.n
