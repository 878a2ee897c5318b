"""struct cr_counters of cacheroute.h, mirrored here and nowhere else: what a phase of a run counted."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

from cacheroute.files import MIB


@dataclass(frozen=True)
class Counters:
    """Sums over tokens and layers of one phase, prompt or decode; field by field those of struct cr_counters.

    `tokens` are model tokens; `examined` slots = K x layers x tokens. A slot is a hit or a miss by the cache before its token,
    and `swapped` when it went to an expert outside the router's top-K. `held` sums the experts in the cache after each event.
    `read_bytes` are whole pages asked of the device; `distinct_bytes` those of the experts that prompts ran, each expert of a
    layer once for each prompt, read or resident; 0 for decoded tokens. `prefetched` experts were read, wholly or in part,
    before their layer chose, and `prefetch_used` of them then chosen, which still count as misses. `hook_seconds` of routing,
    without `read_seconds`, of which `evict_seconds` are a part.
    """

    tokens: int = 0
    examined: int = 0
    hits: int = 0
    misses: int = 0
    swapped: int = 0
    dropped: int = 0
    evictions: int = 0
    held: int = 0
    lost_mass: float = 0.0
    reads: int = 0
    read_bytes: int = 0
    distinct_bytes: int = 0
    read_seconds: float = 0.0
    evict_seconds: float = 0.0
    prefetched: int = 0
    prefetch_used: int = 0
    hook_seconds: float = 0.0

    @property
    def miss_rate(self) -> float:
        """Misses per selected expert."""
        return self.misses / max(self.hits + self.misses, 1)

    @property
    def swap_rate(self) -> float:
        """Slots given to an expert outside the top-K, per slot."""
        return self.swapped / max(self.examined, 1)

    @property
    def drop_rate(self) -> float:
        """Slots that did not run, per slot."""
        return self.dropped / max(self.examined, 1)

    @property
    def read_mib(self) -> float:
        return self.read_bytes / MIB

    @property
    def distinct_mib(self) -> float:
        return self.distinct_bytes / MIB

    @property
    def read_mib_per_token(self) -> float:
        return self.read_bytes / MIB / max(self.tokens, 1)

    def __add__(self, other: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})


class CCounters(ctypes.Structure):
    """struct cr_counters"""

    _fields_ = [(f.name, ctypes.c_double if f.type == "float" else ctypes.c_uint64) for f in fields(Counters)]

    @property
    def value(self) -> Counters:
        return Counters(**{f.name: getattr(self, f.name) for f in fields(Counters)})
