"""Eviction policies: names, their numbers in native/cache.h, and the default."""

BELADY = "belady"
"""The offline optimum: it needs the future, so only `simulate` has it."""

ALL = {"lru": 0, "lfu": 1, "score": 2, "soft-lfu": 4, BELADY: 3}
ONLINE = {name: number for name, number in ALL.items() if name != BELADY}

DEFAULT = "soft-lfu"
"""Misses least on held-out traces of two models (`scripts/strategy_table.py`, scripts/RESULTS.md)."""
