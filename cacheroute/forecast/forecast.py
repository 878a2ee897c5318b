"""The forecast for one model on one machine, and the settings that it is made for, each with its reason.

Knows no command line; opens no model. Everything that it rests on is an argument, so that tests bring machines of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cacheroute.engine import stores
from cacheroute.engine.flash_attention import LEAST
from cacheroute.engine.micro_batch import UPSTREAM
from cacheroute.files import MIB
from cacheroute.forecast import misses, timing
from cacheroute.forecast.drive import GIVEN, Drive
from cacheroute.forecast.misses import MissRate
from cacheroute.forecast.speed import ComputeSpeed
from cacheroute.forecast.workload import Workload
from cacheroute.model import memory_plan
from cacheroute.model.memory_plan import MemoryPlan
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Routing

ROUTINGS = ("original", "cache-prior:lambda=0.1", "cache-prior:lambda=0.2")
PROMPTS = (512, 2048)
MEASURED, READ, ASSUMED = "measured", "read", "assumed"
_SUGGESTED = "suggested"
_ENOUGH = 0.97  # a smaller budget with so much of the speed does as well
_GAIN = 1.15  # what a lossy routing must gain to be worth naming


@dataclass(frozen=True)
class Machine:
    """What a forecast is for: `drive` None where its speed is not known."""

    speed: ComputeSpeed
    drive: Drive | None
    cores: int


@dataclass(frozen=True)
class Tuned:
    """A routing that `tune` has found for a budget. `loss`: the increase of perplexity in % that it was allowed; where a limit on
    the KL was, `kl`: nats per token of it on unseen text, with the ends of its interval, against `reference`, the name of
    another file, "" for the model itself."""

    routing: Routing
    eviction: str
    loss: float | None
    kl: tuple[float, float | None, float | None] | None = None
    reference: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes. `free` None where the system does not tell; `experts` of the budget, `prompt_reserve` above it."""

    free: int | None
    reserve: int
    dense: int
    context: int
    compute: int
    experts: int
    prompt_reserve: int


@dataclass(frozen=True)
class BudgetForecast:
    """With the routing `original`. `needed`: bytes of memory in all. None where the speed of the drive is not known."""

    name: str
    experts: int
    expert_bytes: int
    needed: int
    fits: bool
    mib_per_token: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class RoutingForecast:
    """At the budget that is given or suggested. Tokens per second with the miss rates of other models or texts: `low` to `high`.

    `miss_from`: "measured" on `miss_tokens` of this model, "assumed", or "read" where all experts are in memory. `loss`, `kl` and
    `reference` as of Tuned.
    """

    routing: str
    lossy: bool
    miss_rate: float
    mib_per_token: float
    tokens_per_s: float | None
    low: float | None
    high: float | None
    miss_from: str
    miss_tokens: int
    loss: float | None = None
    kl: tuple[float, float | None, float | None] | None = None
    reference: str = ""

    @property
    def price(self) -> str:
        """What was measured of the loss, as in "17.9 [16.8, 19.0] millinats of KL against Q8_0"; "" where nothing was."""
        if self.kl is None:
            return "" if self.loss is None else f"{self.loss:g}% of perplexity"
        mean, *ends = (f"{1000 * value:.1f}" if value is not None else "?" for value in self.kl)
        return f"{mean} [{', '.join(ends)}] millinats of KL" + (f" against {self.reference}" if self.reference else "")


@dataclass(frozen=True)
class PromptForecast:
    """Seconds to the first token of a prompt from an empty cache, and what it reads."""

    tokens: int
    passes: int
    seconds: float | None
    read_mib: float


@dataclass(frozen=True)
class Decision:
    """One setting that was picked, as an option takes it, and why."""

    setting: str
    value: str
    reason: str


@dataclass(frozen=True)
class Input:
    """What the forecast rests on. `how`: measured on this machine, read from a header or the catalogue, given, or assumed."""

    name: str
    how: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """`fits` False: no budget does, `refusal` says why, and there are no decisions. `crowded`: other programs computed while this
    machine was measured, so that it is faster than this."""

    model: str
    path: str | None
    n_expert: int
    n_used: int
    n_ctx: int
    fits: bool
    refusal: str | None
    memory: Memory
    budgets: tuple[BudgetForecast, ...]
    routings: tuple[RoutingForecast, ...] = ()
    prompts: tuple[PromptForecast, ...] = ()
    decisions: tuple[Decision, ...] = ()
    inputs: tuple[Input, ...] = ()
    crowded: bool = False

    @property
    def capacity(self) -> int | None:
        """Experts of each layer of the budget that is given or suggested."""
        return next((b.experts for b in self.budgets if b.name in (GIVEN, _SUGGESTED)), None)

    def value(self, setting: str) -> str:
        """What was picked."""
        return next(d.value for d in self.decisions if d.setting == setting)


def of(
    work: Workload,
    plan: MemoryPlan,
    machine: Machine,
    *,
    n_ctx: int,
    path: Path | None = None,
    tuned: Tuned | None = None,
    cores_reason: str = "one for each fast core",
    given_memory: bool = False,
) -> Forecast:
    """`path`: of the model, where it is here. `tuned`: what `tune` has found for the capacity of the plan. `given_memory`: the
    free memory is not this machine's."""
    capacity = plan.capacity
    shown = capacity if capacity is not None else plan.n_used
    memory = Memory(
        plan.free,
        plan.reserve,
        plan.dense + (plan.embedding if shown == plan.n_expert else 0),
        plan.context,
        plan.compute,
        shown * (plan.file_expert_bytes if shown == plan.n_expert else plan.resident_bytes),
        plan.prompt_reserve(shown),
    )
    one = _One(work, plan, machine, path, min(n_ctx, timing.DEPTH))
    own = {} if capacity is None else {_SUGGESTED if plan.given is None else GIVEN: capacity}
    names = {"least": plan.n_used, **own, "full": plan.n_expert}
    budgets = tuple(one.budget(name, c, fits=c <= (plan.most or 0)) for name, c in names.items())
    found = Forecast(
        model=work.name,
        path=None if path is None else str(path),
        n_expert=work.n_expert,
        n_used=work.n_used,
        n_ctx=n_ctx,
        fits=capacity is not None,
        refusal=str(memory_plan.refusal(plan, work.name)) if capacity is None else None,
        memory=memory,
        budgets=budgets,
        crowded=machine.speed.crowded,
    )
    if capacity is None:
        return replace(found, inputs=tuple(_inputs(work, plan, machine, (), given_memory)))
    wanted: list[Tuned] = [Tuned(strategies.parse(name), evictions.DEFAULT, None) for name in ROUTINGS]
    if capacity == plan.n_expert:
        wanted = wanted[:1]  # nothing is missed
    elif tuned:
        wanted.append(tuned)
    routings = tuple(one.routing(t, capacity) for t in wanted)
    return replace(
        found,
        routings=routings,
        prompts=tuple(one.prompt(n, capacity) for n in PROMPTS if n < n_ctx),
        decisions=tuple(_decisions(one, plan, capacity, budgets, routings, cores_reason)),
        inputs=tuple(_inputs(work, plan, machine, routings, given_memory)),
    )


@dataclass(frozen=True)
class _One:
    """The parts of one forecast. `n_kv`: tokens that a decoded one looks back on."""

    work: Workload
    plan: MemoryPlan
    machine: Machine
    path: Path | None
    n_kv: int

    def tokens_per_s(self, miss_rate: float, capacity: int) -> float | None:
        """None where the drive is not known and something is missed."""
        whole = capacity >= self.plan.n_expert
        if not whole and self.machine.drive is None:
            return None
        drive = None if whole else self.machine.drive
        spare = self.machine.cores - self.machine.speed.n_threads
        return 1 / timing.decoding(self.work, self.machine.speed, drive, miss_rate, self.n_kv, spare).seconds

    def missed_mib(self, miss_rate: float) -> float:
        return self.work.n_used * miss_rate * self.work.read_bytes / MIB

    def misses(self, routing: Routing, eviction: str, capacity: int) -> MissRate:
        return misses.expected(self.work.n_expert, self.work.n_used, capacity, routing, eviction, self.path)

    def typical_misses(self, capacity: int) -> float:
        """Of `original`."""
        original, eviction = strategies.parse(ROUTINGS[0]), evictions.DEFAULT
        return misses.typical(self.work.n_expert, self.work.n_used, capacity, original, eviction, self.path)[0]

    def budget(self, name: str, capacity: int, *, fits: bool) -> BudgetForecast:
        rate = self.typical_misses(capacity)
        nbytes = capacity * (self.plan.file_expert_bytes if capacity == self.plan.n_expert else self.plan.resident_bytes)
        return BudgetForecast(
            name, capacity, nbytes, self.plan.needed(capacity), fits, self.missed_mib(rate), self.tokens_per_s(rate, capacity)
        )

    def routing(self, t: Tuned, capacity: int) -> RoutingForecast:
        rate = self.misses(t.routing, t.eviction, capacity)
        return RoutingForecast(
            routing="tuned" if t.routing.tuned else str(t.routing),
            lossy=t.routing.lossy,
            miss_rate=rate.typical,
            mib_per_token=self.missed_mib(rate.typical),
            tokens_per_s=self.tokens_per_s(rate.typical, capacity),
            low=self.tokens_per_s(rate.high, capacity),
            high=self.tokens_per_s(rate.low, capacity),
            miss_from=READ if capacity == self.plan.n_expert else MEASURED if rate.tokens else ASSUMED,
            miss_tokens=rate.tokens,
            loss=t.loss,
            kl=t.kl,
            reference=t.reference,
        )

    def prompt(self, n_tokens: int, capacity: int) -> PromptForecast:
        whole = capacity >= self.plan.n_expert
        drive = None if whole else self.machine.drive
        unread = drive is None and not whole
        # bytes are the same for any drive
        found = timing.prompt(
            self.work,
            self.machine.speed,
            Drive(stores.DIRECT, 1e9, GIVEN) if unread else drive,
            capacity,
            n_tokens,
            self.longest_pass(capacity),
            self.machine.cores - self.machine.speed.n_threads,
        )
        return PromptForecast(n_tokens, found.passes, None if unread else found.seconds, found.read_bytes / MIB)

    def longest_pass(self, capacity: int) -> int:
        """Tokens of a prompt that are computed together: as many as the memory beside the budget has buffers for."""
        plan = self.plan
        if plan.free is None or capacity >= plan.n_expert:
            return UPSTREAM
        each = max(plan.compute // max(plan.pass_tokens, 1), 1)
        left = plan.free - plan.reserve - plan.needed(capacity) + plan.compute
        return max(left // each, LEAST)

    def enough(self, capacity: int, speed: float) -> int:
        """The smallest budget with nearly the speed of a larger one."""
        low, high = self.plan.n_used, capacity
        while low < high:
            middle = (low + high) // 2
            if (self.tokens_per_s(self.typical_misses(middle), middle) or 0) >= _ENOUGH * speed:
                high = middle
            else:
                low = middle + 1
        return high


def _decisions(
    one: _One,
    plan: MemoryPlan,
    capacity: int,
    budgets: Sequence[BudgetForecast],
    routings: Sequence[RoutingForecast],
    cores_reason: str,
) -> list[Decision]:
    """Budget, routing, io and threads for each other: the routing is the one of that budget, io that of its misses."""
    drive, whole = one.machine.drive, capacity == plan.n_expert
    if whole:
        budget = Decision("budget", "all", "all experts fit, so nothing is read after loading, and llama.cpp repacks them")
    else:
        most = f"the most of {plan.n_expert} experts a layer that the free memory has room for"
        reason = most if plan.given is None else "as given"
        speed = one.tokens_per_s(routings[0].miss_rate, capacity)
        enough = one.enough(capacity, speed) if speed else capacity
        reason += f"; {enough} would be nearly as fast" if enough < 0.9 * capacity else ""
        budget = Decision("budget", str(capacity), reason)
    if whole:
        io = Decision("io", stores.LOAD, "all experts are read with the model")
    elif drive is None:
        io = Decision("io", stores.AUTO, "the drive was not measured: the model is not here; --flash-mbps gives its speed")
    else:
        how = "as given" if drive.how == GIVEN else "as measured on this filesystem"
        io = Decision("io", drive.io, f"{drive.bytes_per_s / 1e6:.0f} MB/s, {how}")
    threads = Decision("threads", str(one.machine.speed.n_threads), cores_reason)
    return [budget, _routing_decision(routings), io, threads]


def _routing_decision(routings: Sequence[RoutingForecast]) -> Decision:
    original, others = routings[0], [r for r in routings[1:] if r.tokens_per_s]
    reason = "lossless"
    if len(routings) == 1:
        return Decision("routing", original.routing, f"{reason}, and nothing is missed")
    tuned = next((r for r in others if r.price), None)
    if not original.tokens_per_s or not others:
        return Decision("routing", original.routing, reason)
    best = tuned or max(others, key=lambda r: r.tokens_per_s or 0)
    gain = (best.tokens_per_s or 0) / original.tokens_per_s
    if gain < _GAIN:
        return Decision("routing", original.routing, f"{reason}, and others would gain little here")
    price = f"at {best.price}" if best.price else "lossy; `cacheroute tune` finds the price"
    return Decision("routing", original.routing, f"{reason}; {best.routing} would be {gain:.1f} x as fast ({price})")


def _inputs(
    work: Workload, plan: MemoryPlan, machine: Machine, routings: Sequence[RoutingForecast], given_memory: bool
) -> list[Input]:
    header = "the catalogue" if work.assumed else "the model's header"
    found = [Input("sizes of weights", READ, header)]
    found += [Input(what, ASSUMED, "not in the catalogue; pull the model for its own") for what in work.assumed]
    if given_memory:
        found.append(Input("free memory", GIVEN, "--ram"))
    else:
        known = plan.free is not None
        found.append(Input("free memory", READ if known else ASSUMED, "what is free now" if known else "enough"))
    threads = f"{machine.speed.n_threads} thread" + ("s" if machine.speed.n_threads > 1 else "")
    beside = "; other programs computed, too, so it is too slow" if machine.speed.crowded else ""
    found.append(Input("compute", MEASURED, f"the engine's kernels, {threads}{beside}"))
    drive = machine.drive
    if drive:
        how = GIVEN if drive.how == GIVEN else MEASURED
        found.append(Input("drive", how, f"{drive.bytes_per_s / 1e6:.0f} MB/s, {drive.io}"))
        found.append(Input("how reads lie beside compute", ASSUMED, "as on the machine of scripts/RESULTS.md"))
    for r in routings:
        if r.miss_rate and r.miss_from == MEASURED:
            found.append(Input(f"misses of {r.routing}", MEASURED, f"on {r.miss_tokens} tokens scored by tune, frontier or eval"))
    if any(r.miss_from == ASSUMED for r in routings):
        prior = "scores as local as the demo model's, routed with this model's E and K; range: other models"
        found.append(Input("other misses" if any(r.miss_tokens for r in routings) else "misses", ASSUMED, prior))
    return found
