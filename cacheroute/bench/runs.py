"""One measured run: a prompt or a stretch of decoded tokens, its time and its counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cacheroute.bench import conditions
from cacheroute.bench.conditions import Conditions
from cacheroute.engine.stats import kernel_counters
from cacheroute.native.counters import Counters

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


@dataclass(frozen=True)
class Run:
    """One phase of one run. Bytes and seconds; `device_bytes` None where the kernel does not report it. `cpu_seconds` of all
    threads of the process, user and system. `conditions`: what else the machine did."""

    tokens: int
    seconds: float
    device_bytes: int | None
    major_faults: int
    cpu_seconds: float = 0.0
    counters: Counters = field(default_factory=Counters)
    resident_bytes: int | None = None
    counted_bytes: int = 0
    foreign_bytes: int | None = None
    conditions: Conditions = field(default_factory=Conditions)

    @property
    def ts(self) -> float:
        return self.tokens / self.seconds


def warm_up(llm: Any, tokens: Sequence[int]) -> None:
    """The first evaluation allocates and faults in the dense weights; it is not measured."""
    llm.eval(tokens[:8])
    decode(llm, tokens[8:10])


def decode(llm: Any, tokens: Sequence[int]) -> None:
    """One token at a time."""
    for token in tokens:
        llm.eval([token])


def timed(llm: Any, work: Callable[[], None]) -> Run:
    """Times `work` on any llama_cpp.Llama, without counters."""
    looked, before, n_before = conditions.look(), kernel_counters(), llm.n_tokens
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = kernel_counters()
    device = None
    if after.device_bytes is not None and before.device_bytes is not None:
        device = after.device_bytes - before.device_bytes
    during = conditions.between(looked, conditions.look(), cpu)
    return Run(llm.n_tokens - n_before, seconds, device, after.major_faults - before.major_faults, cpu, conditions=during)


def both_phases(llm: Llama, tokens: Sequence[int], n_prompt: int, n_gen: int) -> tuple[Run | None, Run | None]:
    """The prompt as one batch, then `n_gen` tokens one by one; None for a phase without tokens."""
    measured = llm.measure_resident()
    foreign = None if measured is None else max(measured - llm.stats().resident_bytes, 0)
    prompt = _phase(llm, lambda: llm.eval(tokens[:n_prompt]), foreign, decoded=False) if n_prompt else None
    if not n_gen:
        return prompt, None
    with llm.decoding():
        return prompt, _phase(llm, lambda: decode(llm, tokens[n_prompt : n_prompt + n_gen]), foreign, decoded=True)


def _phase(llm: Llama, work: Callable[[], None], foreign: int | None, *, decoded: bool) -> Run:
    before = llm.stats()
    run = timed(llm, work)
    after = llm.stats()
    return replace(
        run,
        counters=after.decode - before.decode if decoded else after.prefill - before.prefill,
        resident_bytes=llm.measure_resident(),
        counted_bytes=after.resident_bytes,
        foreign_bytes=foreign,
    )
