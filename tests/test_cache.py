"""Evictions, on sequences of ids that the model prescribes: what is evicted, what stays, and how far from the offline optimum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import oracle
from support.native_router import native_layer
from support.oracle import Routing


@dataclass(frozen=True)
class Trace:
    """The ids of each token, by one rule of repetition or another."""

    n_expert: int
    n_used: int
    capacity: int
    kind: str
    n_tokens: int
    seed: int

    def ids(self) -> list[list[int]]:
        rng = np.random.default_rng(self.seed)
        e, k = self.n_expert, self.n_used
        if self.kind == "cycle":  # the worst of LRU
            return [[(t * k + i) % e for i in range(k)] for t in range(self.n_tokens)]
        skew = np.ones(e) if self.kind == "uniform" else 1 / np.arange(1, e + 1) ** 1.2
        return [[int(x) for x in rng.choice(e, k, replace=False, p=skew / skew.sum())] for _ in range(self.n_tokens)]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    n_expert = draw(st.integers(4, 32))
    n_used = draw(st.integers(1, min(n_expert, 6)))
    return Trace(
        n_expert=n_expert,
        n_used=n_used,
        capacity=draw(st.integers(n_used, n_expert)),
        kind=draw(st.sampled_from(("uniform", "skewed", "cycle"))),
        n_tokens=draw(st.integers(1, 80)),
        seed=draw(st.integers(0, 2**32)),
    )


def online_misses(trace: Trace, eviction: str) -> int:
    """Misses of the C++ cache on a fixed sequence, with random scores."""
    rng = np.random.default_rng(trace.seed + 1)
    with native_layer(trace.n_expert, trace.n_used, trace.capacity, Routing(), eviction) as layer:
        for ids in trace.ids():
            z = rng.normal(size=trace.n_expert)
            layer.step(z, np.exp(z), prescribed=ids)
        counters = layer.counters()
        assert counters.hits + counters.misses == trace.n_tokens * trace.n_used
        return int(counters.misses)


@given(traces())
@settings(deadline=None, max_examples=60)
def test_belady_misses_least(trace: Trace) -> None:
    least = oracle.belady_misses(trace.ids(), trace.capacity)
    assert least >= len({e for ids in trace.ids() for e in ids})
    for eviction in oracle.EVICTIONS:
        assert least <= online_misses(trace, eviction)


def test_belady_on_a_small_example() -> None:
    # 0 and 1 come back, 2 does not: one miss less than LRU, which drops 0 for 2
    assert oracle.belady_misses([[0], [1], [2], [0], [1]], 2) == 4
    assert oracle.belady_misses([[0, 1], [1, 2], [0, 2]], 3) == 3


@given(traces(), st.sampled_from(oracle.EVICTIONS), st.booleans())
@settings(deadline=None, max_examples=60)
def test_prescribed_ids_run_and_evict_as_in_the_oracle(trace: Trace, eviction: str, prefill: bool) -> None:
    rng = np.random.default_rng(trace.seed + 1)
    expected = oracle.Layer(trace.n_expert, trace.n_used, trace.capacity, Routing(), eviction)
    with native_layer(trace.n_expert, trace.n_used, trace.capacity, Routing(), eviction) as layer:
        for ids in trace.ids():
            z, mass = np.round(rng.normal(size=trace.n_expert)), rng.integers(0, 4, trace.n_expert) / 4
            want = expected.step(z, mass, prefill=prefill, prescribed=ids)
            got = layer.step(z, mass, prefill=prefill, prescribed=ids)
            assert (got.run, got.missed, got.evicted) == (ids, want.missed, want.evicted)
            assert got.swapped == got.lost_mass == 0
            assert layer.resident == expected.cache.resident


@given(traces(), st.sampled_from(oracle.EVICTIONS))
@settings(deadline=None, max_examples=60)
def test_a_prompt_leaves_its_last_distinct_experts(trace: Trace, eviction: str) -> None:
    mass = np.random.default_rng(trace.seed).random(trace.n_expert)
    used: list[int] = []
    with native_layer(trace.n_expert, trace.n_used, trace.capacity, Routing(), eviction) as layer:
        for ids in trace.ids():
            layer.step(mass, mass, prefill=True, prescribed=ids)
            used += sorted(ids, key=lambda e: float(mass[e]))  # the strongest is the most recent
            assert layer.resident == oracle.last_distinct(used, trace.capacity)


@pytest.mark.parametrize(
    "eviction, victim",
    [
        ("lru", 0),  # used longest ago
        ("lfu", 1),  # used once, as 2 was, but before it
        ("score", 2),  # of the least score all along
        ("soft-lfu", 2),  # furthest from being used all along
    ],
)
def test_each_eviction_on_a_small_example(eviction: str, victim: int) -> None:
    score = np.array([3.0, 2.0, 1.0, 4.0])
    with native_layer(4, 1, 3, Routing(), eviction) as layer:
        for e in (0, 0, 1, 2):
            layer.step(score, score, prescribed=[e])
        assert layer.step(score, score, prescribed=[3]).evicted == [victim]


@pytest.mark.parametrize("eviction, victim", [("score", 1), ("soft-lfu", 0)])
def test_soft_lfu_counts_near_misses_not_mean_scores(eviction: str, victim: int) -> None:
    # 0 scores well and is never near the best; 1 is nearly the best at every other token and the worst between
    tokens = [np.array([0.8, 0.999, 0.9, 1.0, 0.0]), np.array([0.8, 0.0, 0.9, 1.0, 0.0])] * 3
    with native_layer(5, 1, 3, Routing(), eviction) as layer:
        for z, e in zip(tokens, (0, 1, 2, 2, 1, 0), strict=True):
            layer.step(z, z, prescribed=[e])
        assert layer.step(tokens[0], tokens[0], prescribed=[3]).evicted == [victim]
