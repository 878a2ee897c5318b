"""Keeps the budget of a loaded model within the memory that is free: less when other programs take memory, and back again.

Only where the budget was left to cacheroute ("auto"). It changes what is read, and no lossless answer.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from cacheroute.errors import CacherouteError
from cacheroute.install.machine import available_memory
from cacheroute.model import memory_plan
from cacheroute.model.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_BUSY_SECONDS, _IDLE_SECONDS = 0.25, 1.0  # between two looks: while it computes, and else
_CALM_SECONDS = 5.0  # with memory to spare, before the budget grows
_SHORT = 3 / 4  # of the reserve: where less is left, the budget shrinks


def fitting(
    plan: MemoryPlan,
    capacity: int,
    *,
    free: int,
    resident: int,
    upcoming: int = 0,
    swapped: int = 0,
    most: int,
    calm: bool = True,
) -> int:
    """Experts of each layer to keep, `capacity` if that is right as it is.

    Args:
        free: bytes that this process may still take. resident: bytes of experts in memory now.
        upcoming: bytes beside the budget that are surely going to be taken.
        swapped: bytes of this process that have been swapped out since the last look.
        most: the most experts of each layer that this may return.
        calm: whether there has been memory to spare for a while.
    """
    reserve, budget = memory_plan.reserve(free + resident), capacity * plan.resident_bytes
    left = free - max(budget - resident, 0) - upcoming  # when the budget is filled: a disk fills it faster than anyone looks
    if left < reserve * _SHORT or swapped:
        fits = (budget - max(reserve - left, 0) - swapped) // plan.resident_bytes
        return min(max(fits, plan.n_used), capacity)
    # what grows is counted when it has grown: the experts that the budget has room for, and what the next prompt takes
    beside = reserve + plan.compute + plan.prompt_reserve(capacity)
    spare = (free + resident - capacity * plan.resident_bytes - beside) // plan.resident_bytes
    return min(capacity + spare, most) if calm and spare > 0 and capacity < most else capacity


class MemoryWatch:
    """A thread that looks at the free memory, and sets the capacity of the model's hook. Ends with the model."""

    def __init__(self, llm: Llama, plan: MemoryPlan) -> None:
        self._llm, self._plan = weakref.ref(llm), plan
        self._most = llm.budget.capacity
        self._swapped = _swapped_bytes()
        self._calm_since = math.inf
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cacheroute-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when it has ended, and nothing is changed any more."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        wait = _BUSY_SECONDS
        while not self._stopped.wait(wait):
            llm = self._llm()
            if llm is None:
                return
            self._look(llm)
            recent = llm.computing or time.monotonic() - llm.computed_at < 2 * _IDLE_SECONDS
            wait = _BUSY_SECONDS if recent else _IDLE_SECONDS
            del llm  # a model that nobody else holds may go

    def _look(self, llm: Llama) -> None:
        free = available_memory(ulimits=False)
        if free is None:
            return
        before, self._swapped = self._swapped, _swapped_bytes()
        resident, now, capacity = llm.resident_bytes, time.monotonic(), llm.budget.capacity
        wanted = fitting(
            self._plan,
            capacity,
            free=free,
            resident=resident,
            upcoming=0 if llm.computed_at else self._plan.compute + self._plan.prompt_reserve(capacity),
            swapped=max(self._swapped - before, 0),
            most=self._most,
            calm=now - self._calm_since >= _CALM_SECONDS,
        )
        reserve = memory_plan.reserve(free + resident)
        self._calm_since = min(self._calm_since, now) if free > reserve and wanted >= capacity else math.inf
        if wanted != capacity:
            self._calm_since = math.inf
            try:
                llm.set_capacity(wanted)
            except CacherouteError:  # it has been closed
                return
            except Exception:  # of budget_changed: the next look comes all the same
                traceback.print_exc()


def _swapped_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmSwap:"):
                return int(line.split()[1]) * 1024
    return 0
