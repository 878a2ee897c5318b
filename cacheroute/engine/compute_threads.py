"""How many threads compute: beside other programs, all of them or as many as there are processors left, whichever is faster.

A thread of llama.cpp waits for all the others after every matrix multiplication, so one that is not on a processor holds up all
of them: beside two busy processes on two cores, one thread is faster than two where experts are small, and slower where they are
large (scripts/RESULTS.md). So both are tried.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cacheroute.install.machine import processor_ticks

_STAT = Path("/proc/stat")
_PERIOD = 0.25  # seconds between two looks: a tick of the kernel's count is 0.01
_SMOOTH = 0.6  # the weight of the last look
_CROWDED, _FREE = 0.6, 0.3  # processors that the threads lack from which fewer are tried, and below which no more
_IDLE = 0.2  # processors of its own below which this process was not computing
_TRIAL_SECONDS, _TRIAL_TOKENS = 0.4, 3  # the least of a trial
_HOLD = 8.0  # seconds until the other number is tried again
_BETTER = 0.95  # so much less time a token must take


@dataclass(frozen=True)
class Busy:
    """Seconds of processors since some time: of this process, and of all on the processors that it may use."""

    own: float
    all: float


def busy() -> Busy | None:
    """None where the system does not tell (Android, macOS)."""
    try:
        # user, nice, system, irq and softirq; not idle, iowait, and what another machine takes
        ticks = sum(sum(counts[i] for i in (0, 1, 2, 5, 6)) for counts in processor_ticks(_STAT))
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
        self._fewer = 0  # what is tried beside `most`; 0: the machine is not crowded
        self._seconds: dict[int, float] = {}  # of a token, by the number of threads
        self._spent, self._tokens, self._trying, self._held_since = 0.0, 0, False, 0.0

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
        if seen.own - before.own < _IDLE * passed:
            return self.n
        others = min(max((seen.all - before.all - (seen.own - before.own)) / passed, 0.0), self._cores)
        self._others += _SMOOTH * (others - self._others)
        left = self._cores - self._others
        if self._most - left <= (_FREE if self._fewer else _CROWDED):
            self.n, self._fewer = self._most, 0
        elif not self._fewer or not self._fewer - 0.5 <= left <= self._fewer + 1.2:
            self._crowd(min(max(int(left + 0.25), 1), self._most - 1))
        return self.n

    def _crowd(self, fewer: int) -> None:
        if not self._fewer:
            self._seconds.clear()
            self._begin_trial(self._most)
        elif self.n == self._fewer != fewer:
            self._begin_trial(fewer)
        self._fewer = fewer

    def took(self, seconds: float) -> None:
        """A decoded token took so long."""
        if not self._fewer:
            return
        self._spent, self._tokens = self._spent + seconds, self._tokens + 1
        if self._spent < _TRIAL_SECONDS or self._tokens < _TRIAL_TOKENS:
            return
        self._seconds[self.n] = self._spent / self._tokens
        other = self._fewer if self.n == self._most else self._most
        if other not in self._seconds:
            self._begin_trial(other)
        elif self._trying:
            better = self._seconds[self.n] < _BETTER * self._seconds[other]
            self._begin_trial(self.n if better else other)
            self._trying, self._held_since = False, self._clock()
        elif self._clock() - self._held_since >= _HOLD:
            self._begin_trial(other)
        else:
            self._spent, self._tokens = 0.0, 0

    def _begin_trial(self, n: int) -> None:
        self.n, self._trying, self._spent, self._tokens = n, True, 0.0, 0
