"""Measures arms against each other: the same tokens, interleaved, each run from the same cold start.

Knows a loaded model and its statistics; knows no command line.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.bench import control, doubts, floor
from cacheroute.bench.runs import Run, both_phases, warm_up
from cacheroute.engine.asked import Asked
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB
from cacheroute.install.machine import cores
from cacheroute.trace.forced_scores import ForcedScores

if TYPE_CHECKING:
    from cacheroute.bench.memory_limit import MemoryLimit
    from cacheroute.engine.llama import Llama


@dataclass(frozen=True)
class Arm:
    """One combination of settings. `routing` and `budget` as they were typed.

    A `control` is the engine without hook over a plain mapping, in the memory of an arm of that budget (control.py);
    `repack` lets it copy weights into another layout.
    """

    budget: str
    routing: str
    eviction: str
    io: str
    prefetch: int = 0
    control: bool = False
    repack: bool = False
    prompt_routing: str = "original"


def control_arm(budget: str, *, repack: bool) -> Arm:
    return Arm(budget, "none", "none", "mmap", control=True, repack=repack)


@dataclass(frozen=True)
class Row:
    """One line of a report. Names that llama-bench also uses have the same meaning; MiB are 2^20 bytes.

    `resident_mib` is the largest amount of experts in memory after a run, by the kernel's count (mincore; of slots alone for a
    file of another user), `counted_mib` the store's own count, `foreign_mib` what was in memory before a run
    and could not be dropped, as another process has mapped it; `read_mib_per_token` is what was asked
    of the device, `device_mib_per_token` what the kernel fetched. `hook_ms_per_token` is the time of routing,
    `cpu_s_per_token` the processor time of all threads. `vs_lru` is
    the mean over repetitions of tok/s against `original` with lru at the same budget and io (a control: at the same budget, with
    the first io), paired within each repetition, `vs_lru_sd` its standard deviation; null when that arm was not in the run.

    A control has no hook, so what the hook counts is null there. `memory_limit_mib` is the control's memory in its last run.
    `floor_ts` is the mean tok/s of max(compute with everything resident, bytes missed / bandwidth), `floor_share` the mean of
    tok/s against it, paired as `vs_lru`; null when not measured.

    `prefetch` is the most experts of a layer that were prefetched, `prefetch_used` the share of prefetched experts that was then
    chosen; null where none was.

    `replay` is the source of the scores (forced_scores.py) when they were not the model's own: a trace as it was typed, or
    `synthetic` with all its parameters; null for the model's own, and for a control, on which none can be forced.

    `ttft_s` is the mean time to the first token after the prompt of the arm's runs, in both of its rows; null without a prompt.
    `lossy`: other experts than the model's may have run. `other_cores`: how many cores other programs, and the host of a virtual
    machine, kept busy on average; null where the system does not tell. `doubts`: the reasons why the row is not to be trusted.
    """

    model: str
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int
    routing: str
    prompt_routing: str
    eviction: str
    io: str
    prefetch: int
    prefetch_used: float | None
    flash_mbps: float | None
    budget: str
    budget_experts: int
    budget_mib: float
    resident_mib: float | None
    foreign_mib: float | None
    counted_mib: float | None
    miss_rate: float | None
    swap_rate: float | None
    drop_rate: float | None
    read_mib_per_token: float | None
    device_mib_per_token: float | None
    hook_ms_per_token: float | None
    cpu_s_per_token: float
    major_faults: float
    avg_ts: float
    stddev_ts: float
    samples_ts: tuple[float, ...]
    vs_lru: float | None
    vs_lru_sd: float | None
    control: bool
    repack: bool
    memory_limit_mib: float | None
    floor_ts: float | None
    floor_share: float | None
    replay: str | None
    ttft_s: float | None
    lossy: bool
    other_cores: float | None
    doubts: tuple[str, ...]


class Stopped(KeyboardInterrupt):
    """Ctrl-C after some runs were finished, with the rows of these."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class _Settings:
    """What a model had of an arm's settings while it ran."""

    io: str
    flash_mbps: float | None
    budget_experts: int
    budget_bytes: int
    lossy: bool
    replay: str | None

    @staticmethod
    def of(llm: Llama) -> _Settings:
        lossy = llm.prompt_routing.lossy or bool(llm.routing and llm.routing.lossy)
        replay = llm.forced.name if llm.forced else None
        return _Settings(llm.io, llm.flash_mbps, llm.budget.capacity, llm.budget.nbytes, lossy, replay)


def run_arms(
    llm: Llama,
    arms: Sequence[Arm],
    tokens: Sequence[int],
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    progress: Callable[[str], None] = lambda text: None,
    *,
    against_floor: bool = False,
    replay: ForcedScores | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Runs every arm `repetitions` times over the same `tokens` (n_prompt as one prompt, n_gen decoded one by one).

    The order of the arms rotates by one each repetition; the floor is measured in each of them. `replay` is forced on all but the
    controls. A control that cannot be run has no row, and `say` receives the reason. Raises UsageError when there are too few
    tokens, and Stopped for a Ctrl-C after the first run.
    """
    if len(tokens) < n_prompt + n_gen:
        raise UsageError(f"{n_prompt} + {n_gen} tokens are needed and the text has {len(tokens)}; give a longer one with -f.")
    configure(llm, arms[0])
    warm_up(llm, tokens)
    llm.force(replay)
    runs = _Runs(llm, arms, tokens, n_prompt, n_gen)
    try:
        for repetition in range(repetitions):
            if against_floor:
                progress(f"floor, run {repetition + 1} of {repetitions}")
                runs.floors.append(floor.measure(llm, tokens, n_prompt, n_gen))
            for i in range(len(arms)):
                arm = arms[(i + repetition) % len(arms)]
                if arm in runs.of:
                    progress(f"{arm.routing} {arm.budget}, run {repetition + 1} of {repetitions}")
                    runs.run(arm, say)
    except KeyboardInterrupt:
        if rows := runs.rows():
            raise Stopped(rows) from None
        raise
    return runs.rows()


class _Runs:
    """The runs so far of each arm, prompt and decoding, and what their rows need to know of the model."""

    def __init__(self, llm: Llama, arms: Sequence[Arm], tokens: Sequence[int], n_prompt: int, n_gen: int) -> None:
        self.llm, self.arms, self.tokens, self.n_prompt, self.n_gen = llm, arms, tokens, n_prompt, n_gen
        self.of: dict[Arm, list[tuple[Run | None, Run | None]]] = {arm: [] for arm in arms}
        self.floors: list[floor.Floor] = []
        self._limits: dict[Arm, MemoryLimit] = {}
        self._settings: dict[Arm, _Settings] = {}

    def run(self, arm: Arm, say: Callable[[str], None]) -> None:
        """Once; a control that cannot be run is left out from then on."""
        try:
            pair = self._control(arm) if arm.control else self._hooked(arm)
        except CacherouteError as e:
            if not arm.control:
                raise
            say(f"no control{' with repacking' if arm.repack else ''} at {arm.budget}: {e}")
            del self.of[arm]
            return
        self._settings[arm] = _Settings.of(self.llm)
        self.of[arm].append(pair)

    def _hooked(self, arm: Arm) -> tuple[Run | None, Run | None]:
        configure(self.llm, arm)
        return both_phases(self.llm, self.tokens, self.n_prompt, self.n_gen)

    def _control(self, arm: Arm) -> tuple[Run | None, Run | None]:
        if arm not in self._limits:
            self._limits[arm] = control.limit_for(self.llm, arm.budget, self.tokens, self.n_prompt)
        self._limits[arm], pair = control.run(
            self.llm, self._limits[arm], self.tokens, self.n_prompt, self.n_gen, repack=arm.repack
        )
        return pair

    def rows(self) -> list[Row]:
        """Of the runs that were finished, a row for the prompt and one for the decoding."""
        return [
            self._row(arm, phase)
            for arm, pairs in self.of.items()
            for phase, n in enumerate((self.n_prompt, self.n_gen))
            if n and pairs
        ]

    def _row(self, arm: Arm, phase: int) -> Row:
        pairs, baseline = self.of[arm], self.of.get(_baseline(arm, self.arms), [])
        prompts = _of_phase(pairs, 0)
        return _row(
            self.llm,
            arm,
            self._settings[arm],
            _of_phase(pairs, phase),
            _of_phase(baseline, phase),
            self.floors,
            self._limits[arm].nbytes if arm.control else None,
            statistics.fmean(run.seconds for run in prompts) if prompts else None,
            self.n_prompt,
            self.n_gen,
            prompt=phase == 0,
        )


def configure(llm: Llama, arm: Arm) -> None:
    """Gives the model the settings of an arm. Raises UsageError where they do not fit."""
    if arm.control:
        asked = Asked(arm.budget, routing=None)
    else:
        asked = Asked(arm.budget, arm.routing, arm.eviction, arm.io, arm.prefetch, arm.prompt_routing)
    llm.configure_as(asked)


def _baseline(arm: Arm, arms: Sequence[Arm]) -> Arm:
    io = next((a.io for a in arms if not a.control), arm.io) if arm.control else arm.io
    return Arm(arm.budget, "original", "lru", io)


def _of_phase(pairs: Sequence[tuple[Run | None, Run | None]], phase: int) -> list[Run]:
    return [run for pair in pairs if (run := pair[phase]) is not None]


def _row(
    llm: Llama,
    arm: Arm,
    settings: _Settings,
    runs: list[Run],
    baseline: list[Run],
    floors: list[floor.Floor],
    limit: int | None,
    ttft: float | None,
    n_prompt: int,
    n_gen: int,
    *,
    prompt: bool,
) -> Row:
    samples = [run.ts for run in runs]
    # of runs that were stopped, one arm may have one more than another
    ratios = [run.ts / base.ts for run, base in zip(runs, baseline, strict=False)]
    at_floor = [f.ts(run, prompt=prompt) for f, run in zip(floors, runs, strict=False)] if not arm.control else []
    tokens = sum(run.tokens for run in runs)
    c = [run.counters for run in runs]
    selected = max(sum(x.hits + x.misses for x in c), 1)
    examined = max(sum(x.examined for x in c), 1)
    measured = [run.resident_bytes for run in runs if run.resident_bytes is not None]
    foreign = [run.foreign_bytes for run in runs if run.foreign_bytes is not None]
    device = [run.device_bytes for run in runs if run.device_bytes is not None]
    hooked = not arm.control
    against = () if hooked else doubts.of_mapping(llm.layout.paths[0])
    return Row(
        model=llm.metadata.get("general.name", llm.model_path),
        test=f"pp{n_prompt}" if prompt else f"tg{n_gen}" + (f" @ d{n_prompt}" if n_prompt else ""),
        n_prompt=n_prompt if prompt else 0,
        n_gen=0 if prompt else n_gen,
        n_depth=0 if prompt else n_prompt,
        n_threads=llm.n_threads,
        routing=arm.routing,
        prompt_routing=arm.prompt_routing,
        eviction=arm.eviction,
        io=settings.io if hooked else arm.io,
        prefetch=arm.prefetch,
        prefetch_used=sum(x.prefetch_used for x in c) / n_prefetched if (n_prefetched := sum(x.prefetched for x in c)) else None,
        flash_mbps=settings.flash_mbps if hooked else None,
        budget=arm.budget,
        budget_experts=settings.budget_experts,
        budget_mib=settings.budget_bytes / MIB,
        resident_mib=max(measured) / MIB if measured else None,
        foreign_mib=max(foreign) / MIB if foreign else None,
        counted_mib=max(run.counted_bytes for run in runs) / MIB if hooked else None,
        miss_rate=sum(x.misses for x in c) / selected if hooked else None,
        swap_rate=sum(x.swapped for x in c) / examined if hooked else None,
        drop_rate=sum(x.dropped for x in c) / examined if hooked else None,
        read_mib_per_token=sum(x.read_bytes for x in c) / MIB / tokens if hooked else None,
        device_mib_per_token=sum(device) / MIB / tokens if device else None,
        hook_ms_per_token=1000 * sum(x.hook_seconds for x in c) / tokens if hooked else None,
        cpu_s_per_token=sum(run.cpu_seconds for run in runs) / tokens,
        major_faults=statistics.fmean(run.major_faults for run in runs),
        avg_ts=statistics.fmean(samples),
        stddev_ts=_sd(samples),
        samples_ts=tuple(samples),
        vs_lru=statistics.fmean(ratios) if ratios else None,
        vs_lru_sd=_sd(ratios) if ratios else None,
        control=arm.control,
        repack=arm.repack,
        memory_limit_mib=limit / MIB if limit else None,
        floor_ts=statistics.fmean(at_floor) if at_floor else None,
        floor_share=statistics.fmean(ts / most for ts, most in zip(samples, at_floor, strict=False)) if at_floor else None,
        replay=settings.replay if hooked else None,
        ttft_s=ttft,
        lossy=settings.lossy and hooked,
        other_cores=doubts.other_cores(runs),
        doubts=doubts.of(runs, llm.n_threads, cores(), io=settings.io, hooked=hooked) + against,
    )


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
