"""Waits for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(what: Callable[[], bool], seconds: float = 20, *, pause: float = 0.0005) -> float:
    """Waits; returns how long. The pause is short, so that a token is long beside it."""
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(pause)
    return time.monotonic() - start
