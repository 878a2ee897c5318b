"""Paired intervals: deterministic, of the right width, and honest about few blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cacheroute.evals import paired


def blocks(n_blocks: int, shift: float, spread: float, seed: int, n: int = 50) -> tuple[list[float], list[float], list[int]]:
    """Sums over blocks of n tokens: the second arm costs `shift` nats a token, blocks differ by `spread`."""
    rng = np.random.default_rng(seed)
    base = rng.normal(3, 1, n_blocks) * n  # differs between blocks far more than the arms do
    other = base + (shift + rng.normal(0, spread, n_blocks)) * n
    return base.tolist(), other.tolist(), [n] * n_blocks


def test_the_same_numbers_give_the_same_interval() -> None:
    a, b, n = blocks(20, 0.01, 0.01, seed=1)
    assert paired.compare(a, b, n, seed=3) == paired.compare(a, b, n, seed=3)
    assert paired.compare(a, b, n, seed=3) != paired.compare(a, b, n, seed=4)


def test_no_difference_is_an_interval_of_nothing() -> None:
    a, _, n = blocks(5, 0, 0, seed=1)
    d = paired.compare(a, a, n)
    assert (d.delta_nll, d.low, d.high, d.ppl_increase, d.n_tokens, d.n_blocks) == (0, 0, 0, 0, 250, 5)


def test_one_block_has_no_interval() -> None:
    d = paired.compare([1.0], [2.0], [10])
    assert d.delta_nll == 0.1 and d.low is None and d.high is None and d.ppl_increase_high is None


@pytest.mark.parametrize("n_blocks", [8, 40])
def test_the_interval_holds_the_truth_19_times_of_20(n_blocks: int) -> None:
    held = 0
    for seed in range(300):
        d = paired.compare(*blocks(n_blocks, 0.01, 0.01, seed), resamples=500)
        assert d.low is not None and d.high is not None
        held += d.low <= 0.01 <= d.high
    assert 0.91 <= held / 300 <= 0.99


def test_blocks_weigh_by_their_tokens() -> None:
    assert paired.compare([0, 0], [1, 3], [10, 30]).delta_nll == pytest.approx(0.1)


def test_nats_and_percent_are_inverse() -> None:
    assert paired.percent(math.log(1.01)) == pytest.approx(1)
    assert paired.nats(paired.percent(0.03)) == pytest.approx(0.03)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equal length"):
        paired.compare([1.0], [1.0, 2.0], [1, 1])
