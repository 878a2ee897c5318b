"""Whether other programs took the processors while something was measured."""

from __future__ import annotations

import time

from cacheroute.engine import compute_threads

_CROWDED = 0.3  # processors that others take, from which on a measurement is not kept


class Look:
    """Begins to look when it is made."""

    def __init__(self) -> None:
        self._before, self._began = compute_threads.busy(), time.monotonic()

    @property
    def crowded(self) -> bool:
        """So far; False where the system does not tell."""
        before, after = self._before, compute_threads.busy()
        if before is None or after is None:
            return False
        others = after.all - before.all - (after.own - before.own)
        return others >= _CROWDED * (time.monotonic() - self._began)
