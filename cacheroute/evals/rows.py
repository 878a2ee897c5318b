"""One routing scored on a text, as `eval perplexity` and `frontier` report it and `plot` draws it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cacheroute.errors import UsageError
from cacheroute.evals import divergence, paired
from cacheroute.evals.loading import Source
from cacheroute.evals.perplexity import summary
from cacheroute.evals.runner import Cell, Request
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned


@dataclass(frozen=True)
class Arm:
    """One combination of settings, as typed, and the experts per layer that the budget comes to."""

    routing: str
    eviction: str
    budget: str
    budget_experts: int

    def requests(self, n_chunks: int, *, kl: bool = True) -> list[Request]:
        """The cells that this arm is the sum of."""
        routing = strategies.parse(self.routing)
        return [Request(routing, self.budget_experts, self.eviction, i, kl) for i in range(n_chunks)]


def arm(layout: ExpertLayout, routing: str, eviction: str, budget: str) -> Arm:
    """Raises UsageError for a routing or a budget that does not fit the model."""
    parsed, resolved = strategies.parse(routing), budgets.parse(budget, layout)
    parsed.check(layout.n_expert, layout.n_used, layout.indices, layout.model)
    strategies.capacities(parsed, resolved, layout)
    return Arm(routing, eviction, budget, resolved.capacity)


def arms(model: Path, layout: ExpertLayout, budget: Sequence[str], eviction: Sequence[str], routing: Sequence[str]) -> list[Arm]:
    """All combinations, at each budget and eviction `original` first, with which the others are compared. `tuned` is the routing
    that was tuned for the budget, with the eviction that it was tuned with.

    Raises UsageError for what does not fit the model, and when there is no combination.
    """
    names = [name if name == tuned.NAME else str(strategies.parse(name)) for name in routing]
    found = [
        arm(layout, *tuned.resolve(model, b, r, e), b)
        for b, e, r in itertools.product(budget, eviction, dict.fromkeys(["original", *names]))
    ]
    if not found:
        raise UsageError("There is nothing to score; give at least one budget and eviction.")
    return list(dict.fromkeys(found))


class _Set(Protocol):
    """A row with the settings of an Arm."""

    @property
    def routing(self) -> str: ...
    @property
    def eviction(self) -> str: ...
    @property
    def budget(self) -> str: ...
    @property
    def budget_experts(self) -> int: ...


def in_common(found: Sequence[_Set]) -> tuple[bool, list[str], str]:
    """For a table of rows: (whether all are of one budget, the name of each, what they share, to stand above). The name has the
    eviction where there are several."""
    one_budget, one_eviction = len({r.budget for r in found}) == 1, len({r.eviction for r in found}) == 1
    names = [tuned.short(r.routing) + ("" if one_eviction else f", {r.eviction}") for r in found]
    budget = f", {found[0].budget_experts} experts of each layer ({found[0].budget})" if one_budget else ""
    return one_budget, names, budget + (f", {found[0].eviction}" if one_eviction else "")


@dataclass(frozen=True, kw_only=True)
class PerplexityRow:
    """One routing on all chunks. `delta_nll` in nats per token against `original` on the same tokens, with its 95% interval;
    `ppl_increase` the same in % of the perplexity; null where there is nothing to compare, or one chunk only.
    `missed_mib_per_token` = misses x bytes of an expert. `seconds` of decoding as measured when the chunks were scored. The last
    six are those of divergence.Divergence; null where no KL was wanted, because only `original` was scored."""

    model: str
    text: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    chunk: int
    stride: int
    carry: bool
    n_chunks: int
    n_tokens: int
    ppl: float
    ppl_se: float
    nll: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    ppl_increase: float
    ppl_increase_low: float | None
    ppl_increase_high: float | None
    miss_rate: float
    swap_rate: float
    drop_rate: float
    missed_mib_per_token: float
    seconds: float
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    top1_se: float | None = None


def perplexity_row(
    model: str,
    source: Source,
    arm: Arm,
    base: Sequence[float],
    scores: Sequence[Cell],
    *,
    carry: bool = False,
    seed: int = 0,
) -> PerplexityRow:
    """`base`: nats of `original` on each of the same chunks. Raises UsageError when nothing was scored."""
    sums = summary(scores)
    measured = all(s.kl32 is not None for s in scores)
    kl = divergence.summary([s.kl for s in scores], [s.same_top or 0 for s in scores], seed=seed) if measured else None
    return PerplexityRow(
        model=model,
        text=source.name,
        chunk=source.chunk,
        stride=source.stride or source.chunk,
        carry=carry,
        n_chunks=len(scores),
        **_differences(paired.compare(base, [s.nll_sum for s in scores], [s.n for s in scores], seed=seed)),
        **asdict(arm),
        **asdict(sums),
        **(asdict(kl) if kl else {}),
    )


def _differences(d: paired.Difference) -> dict[str, Any]:
    return {
        "delta_nll": d.delta_nll,
        "delta_nll_low": d.low,
        "delta_nll_high": d.high,
        "ppl_increase": d.ppl_increase,
        "ppl_increase_low": d.ppl_increase_low,
        "ppl_increase_high": d.ppl_increase_high,
    }
