"""Eviction policies: names, their numbers in native/cache.h, and the default."""

from __future__ import annotations

from collections.abc import Iterable

from cacheroute.errors import UsageError, did_you_mean

BELADY = "belady"
"""The offline optimum: it needs the future, so only `simulate` has it."""

ALL = {"lru": 0, "lfu": 1, "score": 2, "soft-lfu": 4, BELADY: 3}
ONLINE = {name: number for name, number in ALL.items() if name != BELADY}

DEFAULT = "soft-lfu"
"""Misses least on held-out traces of two models (`scripts/strategy_table.py`, scripts/RESULTS.md)."""


def check(name: str, known: Iterable[str] = ONLINE) -> None:
    """Raises UsageError for a name that is none of the known ones: it names the nearest, or all."""
    known = list(known)
    if name not in known:
        meant = did_you_mean(name, known, f"there are {', '.join(known)}.")
        raise UsageError(f"There is no eviction {name!r}; {meant}")
