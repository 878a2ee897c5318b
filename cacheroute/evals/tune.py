"""Finds the routing with the fewest misses within a limit on the loss of quality, by stepped paired scores.

A ladder is a list of routings from nearly lossless to very lossy: one parameter of a strategy (`uniform`), or cache-prior with a
lambda for each layer (evals/pricing.py). Bisection finds the highest rung whose 95% interval of the loss, the perplexity
increase or the KL, ends within the limit; a rung that is clearly too lossy, or clearly not, is left early. The choice is then
validated on text that took no part in it; while it fails there, the next lower rung that fits is validated.

Knows a Scorer; knows no command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cacheroute.errors import UsageError
from cacheroute.evals import divergence, paired, pricing
from cacheroute.evals.divergence import Divergence
from cacheroute.evals.perplexity import miss_rate, missed_mib_per_token
from cacheroute.evals.runner import Cell, Request
from cacheroute.evals.scorer import Scorer
from cacheroute.evals.text import Chunk
from cacheroute.files import VERSION
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing.strategies import Routing
from cacheroute.routing.tuned import TunedRouting

_LAMBDAS: tuple[float, ...] = (
    *(0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2),
    *(0.23, 0.26, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0),
)
_SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)

_LEAST_CHUNKS = 8  # before a rung may be left early
_SURE = 2.5  # standard errors between the forecast and the limit that make leaving early safe
_PROMPT_COST = 0.2  # of a prompt's token, in decoded tokens: for the estimate of time only


def ladder(strategy: str, layout: ExpertLayout) -> list[Routing]:
    """Rungs of a strategy's one parameter, least lossy first. Empty for `original`."""
    k, e = layout.n_used, layout.n_expert
    values: dict[str, tuple[str, Sequence[float]]] = {
        "cache-prior": ("lambda", _LAMBDAS),
        "max-rank": ("m", range(k + 1, e + 1)),
        "cumsum": ("p", _SHARES),
        "drop-cold": ("f", [0.1 * i for i in range(1, 21)]),
        "pruning": ("k", range(k - 1, 0, -1)),
        "dynamic-k": ("p", [p for p in _SHARES[::-1] if 0.5 <= p < 1]),
    }
    if layout.predictable:
        values["speculate"] = ("lambda", (0.0, *_LAMBDAS))
    name, rungs = values.get(strategy, ("", ()))
    return [Routing(strategy, {name: round(float(x), 3)}) for x in rungs]


@dataclass(frozen=True)
class Goal:
    """What to tune: `budget` in experts per layer, and one limit, the other is None: `max_ppl_increase` in %, or `max_kl` in
    nats per token.

    `uniform`: one parameter of `strategy` for all layers; otherwise cache-prior with a lambda and a share of the budget for each
    layer, from prices measured on about `price_tokens` tokens in `price_groups` groups of layers. `seed` of the split and the
    bootstrap.
    """

    budget: int
    eviction: str
    max_ppl_increase: float | None
    uniform: bool = False
    strategy: str = "cache-prior"
    price_tokens: int = 512
    price_groups: int = 15
    seed: int = 0
    max_kl: float | None = None

    @property
    def limit(self) -> float:
        """Nats per token, of nll or of KL."""
        if self.max_kl is not None:
            return self.max_kl
        assert self.max_ppl_increase is not None
        return paired.nats(self.max_ppl_increase)


@dataclass(frozen=True)
class Trial:
    """One rung on some text: the paired difference to `original`, the KL, what both missed, and whether it may pass.

    `complete` is False when it was left early; then `passed` is a forecast. `validates`: on the held-out part, where the estimate
    itself has to be within the limit, not the end of its interval. `within`: what is known of the limit: "yes" where the interval
    ends within it, "perhaps" where only the estimate is, "no".
    """

    routing: Routing
    difference: paired.Difference
    kl: Divergence
    within: str
    missed_mib_per_token: float
    original_missed_mib_per_token: float
    miss_rate: float
    passed: bool
    complete: bool
    validates: bool = False

    @property
    def saves(self) -> bool:
        """Whether it misses fewer bytes than `original`."""
        return self.missed_mib_per_token < self.original_missed_mib_per_token


@dataclass(frozen=True)
class Outcome:
    """`chosen` and its `validation` on unseen chunks are None when nothing fits."""

    chosen: Trial | None
    validation: Trial | None
    trials: tuple[Trial, ...]

    def if_it_saves(self) -> Outcome:
        """Without a choice where that misses no fewer bytes on unseen text than `original`."""
        return replace(self, chosen=None, validation=None) if self.validation and not self.validation.saves else self


@dataclass
class Search:
    """A search for one goal. `fit` and `held_out` are indices of chunks; prices are measured on the first of `fit`.

    `base_nll`: nats of each chunk that the perplexity is compared with, where it is not that of the scorer's own `original`.
    """

    scorer: Scorer
    goal: Goal
    fit: Sequence[int]
    held_out: Sequence[int]
    report: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)
    base_nll: Sequence[float] | None = None

    @property
    def limit(self) -> float:
        """Nats per token, of nll or of KL."""
        return self.goal.limit

    def tune(self) -> Outcome:
        """Makes the ladder of the goal and searches it."""
        goal = self.goal
        if goal.uniform:
            return self.run(ladder(goal.strategy, self.scorer.llm.layout))
        candidates = pricing.candidates(self.scorer, goal.budget, goal.eviction, self._priced(), goal.price_groups)
        return self.run([c.routing() for c in candidates], start_rung([c.cost for c in candidates], self.limit))

    def mass_past_k(self) -> list[float] | None:
        """How flat the router of each layer is (simulate.Replay.mass_past_k), where the prices have traced it."""
        return None if self.goal.uniform else self.scorer.replay(self._priced()).mass_past_k()

    def expected_work(self) -> float:
        """In decoded tokens, about: `original` and four rungs on the fit part, two on the held-out one, the prices."""
        priced = 0 if self.goal.uniform else len(self._priced()) * pricing.n_runs(self.goal.price_groups)
        return (5 * len(self.fit) + 2 * len(self.held_out) + priced) * work(self.scorer.chunks[0])

    def _priced(self) -> Sequence[int]:
        return self.fit[: pricing.n_chunks(self.goal.price_tokens, self.scorer.chunks)]

    def run(self, rungs: Sequence[Routing], start: int | None = None) -> Outcome:
        """Searches `rungs`, beginning at index `start` (the middle by default), and validates the result."""
        best = self.climb(rungs, start)
        validation = None
        while best is not None:
            validation = self.trial(best.routing, self.held_out, validates=True)
            if validation.passed:
                break
            best = self.descend(rungs, rungs.index(best.routing) - 1)
        return Outcome(best, validation if best else None, tuple(self.trials))

    def climb(self, rungs: Sequence[Routing], start: int | None = None) -> Trial | None:
        """The highest rung that passes on the whole fit part, None when none does. Loss is taken to rise along the rungs."""
        low, high = -1, len(rungs)
        middle = start
        while high - low > 1:
            middle = (low + high) // 2 if middle is None else min(max(middle, low + 1), high - 1)
            low, high = (middle, high) if self.trial(rungs[middle], self.fit, early=True).passed else (low, middle)
            middle = None
        return self.descend(rungs, low)

    def descend(self, rungs: Sequence[Routing], index: int) -> Trial | None:
        """The highest rung from `index` down that passes on the whole fit part."""
        for rung in reversed(rungs[: index + 1]):
            trial = self.trial(rung, self.fit)
            if trial.passed:
                return trial
        return None

    def trial(self, routing: Routing, chunks: Sequence[int], *, early: bool = False, validates: bool = False) -> Trial:
        """Scores a rung on `chunks`, with `early` until the verdict is clear."""
        base: list[Cell] = []
        cells: list[Cell] = []
        forecast: bool | None = None
        pair = (Routing("original"), routing)
        settings = (self.goal.budget, self.goal.eviction)
        self.scorer.submit_next(
            [Request(r, *settings, i, True) for r in pair for i in chunks]
        )  # all are compared with `original`
        for i in chunks:
            for scores, r in zip((base, cells), pair, strict=True):
                scores.append(self.scorer.cell(r, *settings, i, kl=True))
            forecast = self._forecast(base, cells, len(chunks)) if early else None
            if forecast is not None:
                break
        d = paired.compare(self._base(base), [c.nll_sum for c in cells], [c.n for c in cells], seed=self.goal.seed)
        kl = divergence.summary([c.kl for c in cells], [c.same_top or 0 for c in cells], seed=self.goal.seed)
        mean, high = (d.delta_nll, d.high) if self.goal.max_kl is None else (kl.kl, kl.kl_high)
        within = "yes" if high is not None and high <= self.limit else "perhaps" if mean <= self.limit else "no"
        trial = Trial(
            routing=routing,
            difference=d,
            kl=kl,
            within=within,
            missed_mib_per_token=missed_mib_per_token(cells),
            original_missed_mib_per_token=missed_mib_per_token(base),
            miss_rate=miss_rate(cells),
            passed=forecast if forecast is not None else within == "yes" or (validates and within == "perhaps"),
            complete=forecast is None,
            validates=validates,
        )
        self.trials.append(trial)
        self.report(trial)
        return trial

    def _base(self, own: Sequence[Cell]) -> list[float]:
        """What the perplexity of those chunks is compared with."""
        return [c.nll_sum if self.base_nll is None else self.base_nll[c.chunk] for c in own]

    def _forecast(self, base: Sequence[Cell], cells: Sequence[Cell], n_all: int) -> bool | None:
        """Where the upper end will lie once all chunks are scored, if that is clear by now."""
        n = len(cells)
        if n < _LEAST_CHUNKS or n == n_all:
            return None
        if self.goal.max_kl is None:
            per_token = np.array([(c.nll_sum - b) / c.n for b, c in zip(self._base(base), cells, strict=True)])
        else:
            per_token = np.array([c.kl.mean() for c in cells])
        mean, sd = float(per_token.mean()), float(per_token.std(ddof=1))
        upper = mean + 2 * sd / math.sqrt(n_all)
        doubt = _SURE * sd * math.sqrt(1 / n - 1 / n_all)
        if upper - doubt > self.limit:
            return False
        return True if upper + doubt < self.limit else None


def split(n_chunks: int, seed: int, share: float = 1 / 3) -> tuple[list[int], list[int]]:
    """(fit, held out): chunks at random, in random order, so that leaving early is fair to all documents.

    Raises UsageError when they are too few for two parts with intervals.
    """
    order = [int(i) for i in np.random.default_rng(seed).permutation(n_chunks)]
    held_out = max(round(n_chunks * share), 1)
    if held_out < 2 or n_chunks - held_out < 2:
        raise UsageError(
            f"{n_chunks} chunks are too few to fit and to validate; give more text, a larger --limit, or a smaller --chunk."
        )
    return order[held_out:], order[:held_out]


def start_rung(costs: Sequence[float], limit: float) -> int:
    """The rung to begin with: the last one with a predicted cost of at most half of the limit."""
    return max(int(np.searchsorted(costs, limit / 2)) - 1, 0)


def work(chunk: Chunk) -> float:
    """The work of scoring a chunk, in decoded tokens."""
    return chunk.n_scored + _PROMPT_COST * chunk.first


def tuned_routing(outcome: Outcome, goal: Goal, layout: ExpertLayout, made_from: dict[str, Any]) -> TunedRouting:
    """The chosen routing as a file keeps it (routing/tuned.py); the notes begin with `made_from`.

    Only for an outcome in which something fits.
    """
    assert outcome.chosen and outcome.validation
    routing, d = outcome.chosen.routing, outcome.validation.difference
    layers = routing.layers or (routing,) * len(layout.layers)
    return TunedRouting(
        model=layout.model,
        architecture=layout.architecture,
        n_expert=layout.n_expert,
        n_used=layout.n_used,
        layers=layout.indices,
        strategy=routing.name,
        parameters=tuple(r.parameters for r in layers),
        notes={
            **made_from,
            "eviction": goal.eviction,
            "budget": goal.budget,
            "max_ppl_increase": goal.max_ppl_increase,
            "max_kl": goal.max_kl,
            "version": VERSION,
            "held_out": asdict(d),
            "held_out_kl": asdict(outcome.validation.kl),
            "ppl_increase": d.ppl_increase,
        },
    )
