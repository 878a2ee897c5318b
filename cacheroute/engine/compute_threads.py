"""How many threads compute: fewer while other work on the machine keeps them from being scheduled.

A thread of llama.cpp waits for all the others after every matrix multiplication, so one that is not on a processor holds up all
of them: beside two busy processes on two cores, one thread is faster than two (scripts/RESULTS.md). Linux says for how long a
thread was ready to run and did not (Documentation/scheduler/sched-stats.rst); where it does not say, nothing changes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TASKS = Path("/proc/self/task")
_PERIOD = 0.2  # seconds between two looks
_LEAST = 0.05  # seconds that the threads must have wanted to run between them
_LOST = 0.5  # threads' worth of waiting from which there are too many of them
_FREE = 0.15  # and below which there may be a processor for one more
_PATIENCE = 1.0, 32.0  # seconds of freedom before one more is tried: at first, and at most, after tries that failed
_TRIAL = 2.0  # seconds after which a try has not failed


@dataclass(frozen=True)
class Schedule:
    """Seconds that the threads of this process have run, and that they have waited for a processor, all together."""

    ran: float
    waited: float


def own_schedule() -> Schedule | None:
    """Of all threads of this process; None where the system does not tell."""
    ran = waited = 0
    try:
        for task in os.listdir(_TASKS):
            try:
                words = (_TASKS / task / "schedstat").read_bytes().split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            ran, waited = ran + int(words[0]), waited + int(words[1])
    except (OSError, ValueError, IndexError):
        return None
    return Schedule(ran / 1e9, waited / 1e9) if ran else None


class ComputeThreads:
    """Decides on a number of threads, at most `most`, between two tokens.

    Lowered to the processors that the threads together get. Raised by one after a second of freedom, and where that had to be
    taken back, after twice as long.
    """

    def __init__(
        self, most: int, schedule: Callable[[], Schedule | None] = own_schedule, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.n = self._most = most
        self._schedule, self._clock = schedule, clock
        self._seen, self._looked = (schedule() if most > 1 else None), clock()
        self._patience, self._free_since = _PATIENCE[0], clock()
        self._trial_since: float | None = None

    def look(self) -> int:
        """The number of threads for the next token; takes 0.1 ms five times a second."""
        now, before = self._clock(), self._seen
        if before is None or now - self._looked < _PERIOD:
            return self.n
        seen = self._schedule()
        if seen is None:
            return self.n
        ran, waited = seen.ran - before.ran, seen.waited - before.waited
        if ran >= 0 and waited >= 0 and ran + waited < _LEAST:
            return self.n
        self._seen, self._looked = seen, now
        if ran >= 0 and waited >= 0:  # else a thread has ended, and its part with it
            self._decide(now, ran / (ran + waited))
        return self.n

    def _decide(self, now: float, share: float) -> None:
        lost = self.n * (1 - share)
        if lost >= _FREE:
            self._free_since = now
        if lost >= _LOST and self.n > 1:
            if self._trial_since is not None:
                self._patience = min(2 * self._patience, _PATIENCE[1])
            self.n, self._trial_since = max(1, int(self.n * share + 0.25)), None
        elif self._trial_since is not None and now - self._trial_since >= _TRIAL:
            self._patience, self._trial_since = _PATIENCE[0], None
        elif self._trial_since is None and self.n < self._most and now - self._free_since >= self._patience:
            self.n, self._trial_since, self._free_since = self.n + 1, now, now
