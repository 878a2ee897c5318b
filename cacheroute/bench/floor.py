"""The floor of a run's time: the time to compute when nothing is missing, or to read what is missing, whichever is more.

`max(compute with everything resident, bytes missed / device bandwidth)`, both measured on this machine beside the runs that
are compared with it. A run that overlaps all reads with compute, or all compute with reads, reaches it. Experts lie as in the
file, as those do that a miss has read; `--budget all` alone has them repacked, and may compute faster than this.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.bench.runs import Run, both_phases
from cacheroute.engine.asked import Asked
from cacheroute.errors import UsageError

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_SAMPLE_SECONDS = 1.0
_TOGETHER = 8  # experts in one read, enough to keep the device busy


@dataclass(frozen=True)
class Floor:
    """Seconds of compute for the prompt and for all decoded tokens together; bytes per second of the device."""

    prompt_seconds: float | None
    decode_seconds: float | None
    bytes_per_second: float

    def ts(self, run: Run, *, prompt: bool) -> float:
        """Tokens per second that `run` would have had at the floor."""
        compute = self.prompt_seconds if prompt else self.decode_seconds
        return run.tokens / max(compute or 0.0, run.counters.read_bytes / self.bytes_per_second)


def measure(llm: Llama, tokens: Sequence[int], n_prompt: int, n_gen: int) -> Floor:
    """Measures both terms with the model's own routing. All experts must fit into memory.

    Raises UsageError for a model that was loaded with its experts: it has nothing to read.
    """
    if llm.io == "load":
        raise UsageError("A model that was loaded with all of its experts has no floor of reads.")
    pace, llm.flash_mbps = llm.flash_mbps, None
    try:
        llm.configure_as(Asked(budget="all"))
        both_phases(llm, tokens, n_prompt, n_gen)  # reads what these tokens need
        llm.rewind()
        prompt, decoded = both_phases(llm, tokens, n_prompt, n_gen)
        bandwidth = pace * 1e6 if pace else measure_bandwidth(llm)
    finally:
        llm.flash_mbps = pace
    return Floor(prompt.seconds if prompt else None, decoded.seconds if decoded else None, bandwidth)


def measure_bandwidth(llm: Llama, seconds: float = _SAMPLE_SECONDS) -> float:
    """Bytes per second at which experts are read: past the page cache where the filesystem can, layers and experts in random
    order, for `seconds` or until all have been read."""
    llm.configure_as(Asked(budget="all"))
    start = llm.stats().prefill
    order = random.Random(0)
    for layer in order.sample(range(len(llm.layout.layers)), len(llm.layout.layers)):
        experts = order.sample(range(llm.layout.n_expert), llm.layout.n_expert)
        for first in range(0, len(experts), _TOGETHER):
            llm.load_experts(layer, experts[first : first + _TOGETHER])
        read = llm.stats().prefill - start
        if read.read_seconds > seconds:
            break
    return read.read_bytes / read.read_seconds
