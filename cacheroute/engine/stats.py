"""What a run reports: small frozen records, printed by the commands and by `-o json` as they are; and the kernel's counters."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cacheroute.native.counters import Counters as Counters  # a part of Stats, for those who print it

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


@dataclass(frozen=True)
class Stats:
    """The state of a loaded model. Bytes; `resident_bytes` as the store counts, whole pages; with io "load" those of the file."""

    routing: str
    prompt_routing: str
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

    @staticmethod
    def of(llm: Llama) -> Stats:
        """As they are now."""
        hook = llm._hook
        return Stats(
            routing=str(llm.routing) if llm.routing else "none",
            prompt_routing=str(llm.prompt_routing),
            eviction=llm.eviction,
            io=llm.io,
            n_expert=llm.layout.n_expert,
            n_used=llm.layout.n_used,
            n_layers=len(llm.layout.layers),
            capacity=llm.budget.capacity,
            budget_bytes=llm.budget.nbytes,
            resident_bytes=llm.resident_bytes,
            prefill=hook.counters(prefill=True) if hook else Counters(),
            decode=hook.counters(prefill=False) if hook else Counters(),
        )


@dataclass(frozen=True)
class KernelCounters:
    """The kernel's counters of this process: bytes fetched from storage (None where there is none), major page faults."""

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
