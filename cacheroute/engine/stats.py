"""What a run reports: small frozen records, printed by the commands and by `-o json` as they are; and what the system tells."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from cacheroute.files import MIB

UNKNOWN_BYTES = 2**64 - 1  # UNKNOWN_BYTES of native/store.h


@dataclass(frozen=True)
class Counters:
    """Sums over tokens and layers of one phase, prompt or decode.

    `tokens` are model tokens; `examined` slots = K x layers x tokens. A slot is a hit or a miss by the cache before its token,
    and `swapped` when it went to an expert outside the router's top-K. `read_bytes` are whole pages asked of the device.
    `prefetched` experts were read ahead, wholly or in part, and `prefetch_used` of them then chosen: misses all the same.
    `hook_seconds` is what routing took, without `read_seconds`, of which `evict_seconds` are a part.
    """

    tokens: int = 0
    examined: int = 0
    hits: int = 0
    misses: int = 0
    swapped: int = 0
    dropped: int = 0
    evictions: int = 0
    lost_mass: float = 0.0
    reads: int = 0
    read_bytes: int = 0
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
        return self.swapped / max(self.examined, 1)

    @property
    def read_mib_per_token(self) -> float:
        return self.read_bytes / MIB / max(self.tokens, 1)

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Stats:
    """The state of a loaded model. Bytes; `resident_bytes` as the store counts, whole pages."""

    routing: str
    eviction: str
    io: str
    n_expert: int
    n_used: int
    n_layers: int
    capacity: int
    budget_bytes: int
    resident_bytes: int
    prefill: Counters
    decode: Counters


@dataclass(frozen=True)
class KernelCounters:
    """What the kernel says of this process: bytes fetched from storage (None where it does not say), major page faults."""

    device_bytes: int | None
    major_faults: int


def kernel_counters() -> KernelCounters:
    """Reads /proc/self/io and getrusage for the whole process."""
    device = None
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                device = int(line.split()[1])
    except OSError:  # macOS, hardened kernels
        pass
    return KernelCounters(device, resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
