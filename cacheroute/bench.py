"""Measures arms against each other: the same tokens, interleaved, each run from the same cold start.

Knows a loaded model and its statistics; knows no command line.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.errors import UsageError
from cacheroute.stats import MIB, Counters, kernel_counters

if TYPE_CHECKING:
    from cacheroute.engine import Llama


@dataclass(frozen=True)
class Arm:
    """One combination of settings. `routing` and `budget` as they were typed."""

    budget: str
    routing: str
    eviction: str
    io: str


@dataclass(frozen=True)
class Run:
    """One phase of one run. Bytes and seconds; `device_bytes` None where the kernel does not say."""

    tokens: int
    seconds: float
    counters: Counters
    device_bytes: int | None
    major_faults: int
    resident_bytes: int | None
    counted_bytes: int

    @property
    def ts(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Row:
    """One line of a report. The names that llama-bench has mean what they mean there; MiB are 2^20 bytes.

    `resident_mib` is the most that the kernel said was in memory of the experts after a run (mincore; null for a file of
    somebody else, of which it does not tell), `counted_mib` what the store had counted; `read_mib_per_token` is what was asked
    of the device, `device_mib_per_token` what the kernel says was fetched. `vs_lru` is the mean over repetitions of tok/s
    against `original` with lru at the same budget and io, paired within each repetition, `vs_lru_sd` its standard
    deviation; null when that arm was not in the run.
    """

    model: str
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int
    routing: str
    eviction: str
    io: str
    flash_mbps: float | None
    budget: str
    budget_experts: int
    budget_mib: float
    resident_mib: float | None
    counted_mib: float
    miss_rate: float
    swap_rate: float
    drop_rate: float
    read_mib_per_token: float
    device_mib_per_token: float | None
    major_faults: float
    avg_ts: float
    stddev_ts: float
    samples_ts: tuple[float, ...]
    vs_lru: float | None
    vs_lru_sd: float | None


def run_arms(
    llm: Llama,
    arms: Sequence[Arm],
    tokens: Sequence[int],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Runs every arm `repetitions` times over the same `tokens` (n_prompt as one prompt, n_gen decoded one by one).

    The order of the arms turns by one each repetition. Raises UsageError when there are too few tokens.
    """
    if len(tokens) < n_prompt + n_gen:
        raise UsageError(f"{n_prompt} + {n_gen} tokens are needed and the text has {len(tokens)}; give a longer one with -f.")
    _warm_up(llm, arms[0], tokens)
    prompts: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    decodes: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    for repetition in range(repetitions):
        for i in range(len(arms)):
            arm = arms[(i + repetition) % len(arms)]
            progress(f"{arm.routing} {arm.budget}, run {repetition + 1} of {repetitions}")
            llm.configure(budget=arm.budget, routing=arm.routing, eviction=arm.eviction, io=arm.io)
            if n_prompt:
                prompts[arm].append(_phase(llm, lambda: llm.eval(tokens[:n_prompt]), decode=False))
            if n_gen:
                with llm.decoding():
                    decodes[arm].append(_phase(llm, lambda: _decode(llm, tokens[n_prompt : n_prompt + n_gen]), decode=True))
    rows = []
    for arm in arms:
        llm.configure(budget=arm.budget, routing=arm.routing, eviction=arm.eviction, io=arm.io)
        baseline = Arm(arm.budget, "original", "lru", arm.io)
        for runs, prompt in ((prompts, True), (decodes, False)):
            if runs[arm]:
                rows.append(_row(llm, arm, runs[arm], runs.get(baseline), n_prompt, n_gen, prompt))
    return rows


def _warm_up(llm: Llama, arm: Arm, tokens: Sequence[int]) -> None:
    """The first evaluation allocates and faults in the dense weights; it belongs to no arm."""
    llm.configure(budget=arm.budget, routing=arm.routing, eviction=arm.eviction, io=arm.io)
    llm.eval(tokens[:8])
    _decode(llm, tokens[8:10])


def _decode(llm: Llama, tokens: Sequence[int]) -> None:
    for token in tokens:
        llm.eval([token])


def _phase(llm: Llama, work: Callable[[], None], *, decode: bool) -> Run:
    before, kernel_before, n_before = llm.stats(), kernel_counters(), llm.n_tokens
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    kernel, after = kernel_counters(), llm.stats()
    device = None
    if kernel.device_bytes is not None and kernel_before.device_bytes is not None:
        device = kernel.device_bytes - kernel_before.device_bytes
    return Run(
        tokens=llm.n_tokens - n_before,
        seconds=seconds,
        counters=after.decode - before.decode if decode else after.prefill - before.prefill,
        device_bytes=device,
        major_faults=kernel.major_faults - kernel_before.major_faults,
        resident_bytes=llm.measure_resident(),
        counted_bytes=after.resident_bytes,
    )


def _row(llm: Llama, arm: Arm, runs: list[Run], baseline: list[Run] | None, n_prompt: int, n_gen: int, prompt: bool) -> Row:
    samples = [run.ts for run in runs]
    ratios = [run.ts / base.ts for run, base in zip(runs, baseline, strict=True)] if baseline else []
    tokens = sum(run.tokens for run in runs)
    c = [run.counters for run in runs]
    selected = max(sum(x.hits + x.misses for x in c), 1)
    examined = max(sum(x.examined for x in c), 1)
    measured = [run.resident_bytes for run in runs if run.resident_bytes is not None]
    device = [run.device_bytes for run in runs if run.device_bytes is not None]
    return Row(
        model=llm.metadata.get("general.name", llm.model_path),
        test=f"pp{n_prompt}" if prompt else f"tg{n_gen}" + (f" @ d{n_prompt}" if n_prompt else ""),
        n_prompt=n_prompt if prompt else 0,
        n_gen=0 if prompt else n_gen,
        n_depth=0 if prompt else n_prompt,
        n_threads=llm.n_threads,
        routing=arm.routing,
        eviction=arm.eviction,
        io=arm.io,
        flash_mbps=llm.flash_mbps,
        budget=arm.budget,
        budget_experts=llm.budget.capacity,
        budget_mib=llm.budget.nbytes / MIB,
        resident_mib=max(measured) / MIB if measured else None,
        counted_mib=max(run.counted_bytes for run in runs) / MIB,
        miss_rate=sum(x.misses for x in c) / selected,
        swap_rate=sum(x.swapped for x in c) / examined,
        drop_rate=sum(x.dropped for x in c) / examined,
        read_mib_per_token=sum(x.read_bytes for x in c) / MIB / tokens,
        device_mib_per_token=sum(device) / MIB / tokens if device else None,
        major_faults=statistics.fmean(run.major_faults for run in runs),
        avg_ts=statistics.fmean(samples),
        stddev_ts=_sd(samples),
        samples_ts=tuple(samples),
        vs_lru=statistics.fmean(ratios) if ratios else None,
        vs_lru_sd=_sd(ratios) if ratios else None,
    )


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
