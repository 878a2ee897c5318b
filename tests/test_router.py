"""The C++ router and cache against the numpy oracle, and what every strategy must keep for any scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheroute.errors import CacherouteError
from support import oracle
from support.native_router import NativeLayer, native_layer
from support.oracle import Event, Routing, Vector

KINDS = ("smooth", "ties", "constant", "groups", "few")
MAX_LOSS = (None, 0.0, 1 / 64, 1 / 8, 0.5, 1.0)
HUGE = 1e6  # no swap is too dear for this lambda


@dataclass(frozen=True)
class Trial:
    """One layer and the tokens that pass it."""

    n_expert: int
    n_used: int
    capacity: int
    kind: str
    n_tokens: int
    n_prompt: int
    seed: int

    def tokens(self) -> Iterator[tuple[Vector, Vector, bool]]:
        """Scores, router mass, and whether it is a prompt token; now and then a prompt token comes later, as in a chat."""
        rng = np.random.default_rng(self.seed)
        habit = rng.normal(0, 2, self.n_expert)  # drifts, so that neighbours share experts
        for t in range(self.n_tokens):
            habit = 0.95 * habit + rng.normal(0, 0.6, self.n_expert)
            z, mass = self._scores(rng, habit + rng.normal(0, 1, self.n_expert))
            yield z, mass, t < self.n_prompt or rng.random() < 0.1

    def predictions(self) -> Iterator[Vector | None]:
        """For `speculate`, one for each token: none, or scores of another scale than z, often tied."""
        rng = np.random.default_rng([self.seed, 1])
        for _ in range(self.n_tokens):
            predicted = 8 * rng.normal(0, 1, self.n_expert)
            yield None if rng.random() < 0.1 else np.round(predicted) if rng.random() < 0.5 else predicted

    def _scores(self, rng: np.random.Generator, z: Vector) -> tuple[Vector, Vector]:
        # Sums of sixteenths and masses of 1/64 are exact in any order: what ties here, ties in every implementation.
        if self.kind in ("smooth", "groups"):
            mass = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            z = np.log(mass)
        else:
            z = np.zeros_like(z) if self.kind == "constant" else np.round(2 * z) / 2
            mass = rng.integers(0, 6, self.n_expert) / 64
        if self.kind == "groups" or (self.kind == "ties" and rng.random() < 0.3):
            group = max(self.n_expert // 4, 1)
            closed = rng.permutation(-(-self.n_expert // group))[:2]
            z[np.isin(np.arange(self.n_expert) // group, closed)] = -math.inf
        if self.kind == "few":  # fewer choices than K
            z[rng.permutation(self.n_expert)[self.n_used // 2 :]] = -math.inf
        return z, mass


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    n_expert = draw(st.integers(4, 64))
    n_used = draw(st.integers(1, min(n_expert, 9)))
    return Trial(
        n_expert=n_expert,
        n_used=n_used,
        capacity=draw(st.integers(n_used, n_expert)),
        kind=draw(st.sampled_from(KINDS)),
        n_tokens=draw(st.integers(1, 60)),
        n_prompt=draw(st.integers(0, 12)),
        seed=draw(st.integers(0, 2**32)),
    )


@st.composite
def routed_trials(draw: st.DrawFn, strategy: str | None = None) -> tuple[Trial, Routing, str]:
    """A trial with a routing that fits it and an eviction."""
    trial = draw(trials())
    routing = Routing(
        strategy=strategy or draw(st.sampled_from(oracle.STRATEGIES)),
        k=draw(st.integers(1, trial.n_used)),
        m=draw(st.integers(trial.n_used, trial.n_expert)),
        j=draw(st.integers(0, trial.n_used)),
        # not a fraction that sums of equal probabilities could hit exactly
        p=draw(st.sampled_from((0.0, 1.0, 0.1234567, 0.5432109, 0.8765432, 0.9876543))),
        lam=draw(st.sampled_from((0.0, 0.05, 0.3, 1.0, HUGE))),
        f=draw(st.sampled_from((0.0, 0.3, 0.7, 1.0, 2.5))),
        max_loss=draw(st.sampled_from(MAX_LOSS)),
    )
    return trial, routing, draw(st.sampled_from(oracle.EVICTIONS))


def run_native(trial: Trial, routing: Routing, eviction: str = "lru") -> list[Event]:
    """All events of a trial by the C++ core."""
    with native_layer(trial.n_expert, trial.n_used, trial.capacity, routing, eviction) as layer:
        return list(steps(layer, trial))


def steps(layer: NativeLayer, trial: Trial) -> Iterator[Event]:
    for (z, mass, prefill), predicted in zip(trial.tokens(), trial.predictions(), strict=True):
        yield layer.step(z, mass, prefill=prefill, predicted=predicted)


@given(routed_trials())
@settings(max_examples=200)
def test_every_event_matches_the_oracle(case: tuple[Trial, Routing, str]) -> None:
    trial, routing, eviction = case
    expected = oracle.Layer(trial.n_expert, trial.n_used, trial.capacity, routing, eviction)
    with native_layer(trial.n_expert, trial.n_used, trial.capacity, routing, eviction) as layer:
        slots = {True: 0, False: 0}
        for (z, mass, prefill), predicted in zip(trial.tokens(), trial.predictions(), strict=True):
            want, got = (x.step(z, mass, prefill=prefill, predicted=predicted) for x in (expected, layer))
            assert replace(got, lost_mass=0) == replace(want, lost_mass=0)
            assert got.lost_mass == pytest.approx(want.lost_mass, abs=1e-9)
            assert layer.resident == expected.cache.resident
            assert layer.mean_range == expected.mean_range
            slots[prefill] += trial.n_used
        for prefill, examined in slots.items():
            counters = layer.counters(prefill)
            assert counters.examined == examined == trial.n_used * counters.tokens
            assert counters.hits + counters.misses + counters.dropped == examined


def limits(trial: Trial) -> list[Routing]:
    """Every strategy at the end of its range where it must do nothing."""
    k, e = trial.n_used, trial.n_expert
    nothing = [Routing("cache-prior", lam=0.0, j=j) for j in (0, 1, k)]
    nothing += [Routing("max-rank", m=k, j=j) for j in (0, 1, k)]
    nothing += [Routing("cumsum", p=p) for p in (0.0, 1e-12, 1 / e)]  # the best expert alone has at least 1/E
    nothing += [Routing("pruning", k=k), Routing("drop-cold", f=0.0), Routing("dynamic-k", k=k), Routing("speculate", j=k)]
    harsh = Routing(k=1, m=e, j=0, p=1.0, lam=HUGE, f=HUGE, max_loss=0.0)
    return nothing + [replace(harsh, strategy=s) for s in oracle.STRATEGIES]


@given(trials(), st.sampled_from(oracle.EVICTIONS))
@settings(max_examples=25)
def test_parameters_at_their_limits_give_original(trial: Trial, eviction: str) -> None:
    if trial.kind == "few":
        trial = replace(trial, kind="ties")  # 1/E is a share of the experts that may be chosen
    original = run_native(trial, Routing(), eviction)
    for routing in limits(trial):
        assert run_native(trial, routing, eviction) == original, routing


@given(trials())
def test_original_is_the_top_k_best_first(trial: Trial) -> None:
    for (z, _, _), event in zip(trial.tokens(), run_native(trial, Routing()), strict=True):
        assert event.run == [int(e) for e in np.lexsort((np.arange(trial.n_expert), -z))[: trial.n_used]]


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_ties_go_to_the_lower_index(strategy: str) -> None:
    routing = Routing(strategy, k=3, m=3, p=0.0)
    with native_layer(8, 3, 4, routing) as layer:
        for _ in range(3):
            assert layer.step(np.zeros(8), np.full(8, 0.125)).run == [0, 1, 2]


@given(routed_trials())
def test_the_top_j_always_run(case: tuple[Trial, Routing, str]) -> None:
    trial, routing, eviction = case
    if routing.strategy in ("pruning", "drop-cold", "dynamic-k"):
        routing = replace(routing, strategy="cache-prior")
    for (z, _, _), event in zip(trial.tokens(), run_native(trial, routing, eviction), strict=True):
        assert set(oracle.ranked(z)[: routing.j]) <= set(event.run)


def test_the_top_j_run_although_the_bonus_rounds_their_lead_away() -> None:
    with native_layer(4, 1, 2, Routing("cache-prior", lam=1.0, j=1)) as layer:
        layer.step(np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0, 0, 0]))  # expert 0 is cached, the mean range is 1
        assert layer.step(np.array([0.0, 1e-30, -1.0, -1.0]), np.array([0.5, 0.5, 0, 0])).run == [1]


@given(routed_trials())
def test_a_masked_expert_runs_only_where_the_model_itself_runs_it(case: tuple[Trial, Routing, str]) -> None:
    trial, routing, eviction = case
    if trial.kind != "few":
        trial = replace(trial, kind="groups")
    for (z, _, _), event in zip(trial.tokens(), run_native(trial, routing, eviction), strict=True):
        masked = {e for e in event.run if z[e] == -math.inf}
        assert masked <= set(oracle.ranked(z)[: trial.n_used])


@given(routed_trials(), st.sampled_from([m for m in MAX_LOSS if m is not None]))
def test_the_guard_holds_for_every_token(case: tuple[Trial, Routing, str], max_loss: float) -> None:
    trial, routing, eviction = case
    routing = replace(routing, max_loss=max_loss, lam=HUGE, m=trial.n_expert, p=1.0, k=1)
    for (z, mass, _), event in zip(trial.tokens(), run_native(trial, routing, eviction), strict=True):
        top = mass[oracle.ranked(z)[: trial.n_used]].sum()
        assert top - mass[event.run].sum() <= max_loss * top + 1e-12


@given(routed_trials())
def test_no_token_evicts_its_own_experts_and_the_budget_holds(case: tuple[Trial, Routing, str]) -> None:
    trial, routing, eviction = case
    routing = replace(routing, lam=HUGE, m=trial.n_expert)
    with native_layer(trial.n_expert, trial.n_used, trial.capacity, routing, eviction) as layer:
        for event in steps(layer, trial):
            assert len(set(event.run)) == len(event.run)
            assert set(event.run) <= layer.resident
            assert not set(event.run) & set(event.evicted)
            assert len(layer.resident) <= trial.capacity


@given(routed_trials())
def test_a_run_after_a_reset_repeats_exactly(case: tuple[Trial, Routing, str]) -> None:
    trial, routing, eviction = case
    with native_layer(trial.n_expert, trial.n_used, trial.capacity, routing, eviction) as layer:
        runs = []
        for _ in range(2):
            runs.append([replace(event, lost_mass=0) for event in steps(layer, trial)])
            layer.reset()
            assert not layer.resident and layer.mean_range == 0
        assert runs[0] == runs[1]


def test_the_bonus_swaps_and_the_mass_orders_recency() -> None:
    """One small sequence: the order of events within a token."""
    with native_layer(4, 2, 2, Routing("cache-prior", lam=1.0, j=1)) as layer:
        first = layer.step(np.array([3.0, 2.0, 1.0, 0.0]), np.array([0.6, 0.3, 0.1, 0.0]))
        assert (first.run, first.missed, first.evicted, first.swapped) == ([0, 1], [0, 1], [], 0)
        # 2 and 3 lead; 3 is kept as the best, 0 beats 2 by its bonus of 3; 1 is the older of the two in the cache
        second = layer.step(np.array([0.0, -1.0, 1.0, 2.0]), np.array([0.2, 0.1, 0.3, 0.4]))
        assert (second.run, second.missed, second.evicted, second.swapped) == ([3, 0], [3], [1], 1)
        assert second.lost_mass == pytest.approx(1 - 0.6 / 0.7)
        assert layer.resident == {0, 3} and layer.mean_range == 3.0


@pytest.mark.parametrize("capacity", [0, 3, 9])
def test_a_capacity_that_does_not_fit_is_an_error(capacity: int) -> None:
    with pytest.raises(CacherouteError, match=rf"^a cache of {capacity} experts per layer is not within 4\.\.8\.$"):
        native_layer(8, 4, capacity, Routing()).__enter__()
