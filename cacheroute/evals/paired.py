"""Paired differences: two routings on the same tokens, with an interval by block bootstrap. Knows numbers only.

Tokens of one text are not independent, and the loss at one token depends on the cache after the tokens before it; so whole
chunks are resampled (Kuensch 1989), never tokens. The percentile interval is widened for few chunks by t(n-1)/z * sqrt(n/(n-1))
(Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FEW_BLOCKS = 10  # below this the interval is rough, and the commands print that


@dataclass(frozen=True)
class Difference:
    """Mean difference in nats per token, its interval (None with one block), and the same as a change of the perplexity in %."""

    delta_nll: float
    low: float | None
    high: float | None
    n_tokens: int
    n_blocks: int

    @property
    def ppl_increase(self) -> float:
        """Change of the perplexity in %."""
        return percent(self.delta_nll)

    @property
    def ppl_increase_low(self) -> float | None:
        return None if self.low is None else percent(self.low)

    @property
    def ppl_increase_high(self) -> float | None:
        return None if self.high is None else percent(self.high)


def percent(delta_nll: float) -> float:
    """The change of a perplexity in % that a difference in nats per token makes."""
    return 100 * math.expm1(delta_nll)


def nats(ppl_increase: float) -> float:
    """The inverse of percent(): % of perplexity to nats per token."""
    return math.log1p(ppl_increase / 100)


def compare(
    base: Sequence[float],
    other: Sequence[float],
    n_tokens: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Difference:
    """other - base, from sums of nll over each block and the tokens in it. Equal blocks give the same result for every seed."""
    a, b, n = (np.asarray(v, dtype=np.float64) for v in (base, other, n_tokens))
    if not len(a) == len(b) == len(n) > 0:
        raise ValueError(f"pairs of equal length are compared, not {len(a)}, {len(b)} and {len(n)}")
    difference, blocks = b - a, len(a)
    mean = float(difference.sum() / n.sum())
    if blocks < 2:
        return Difference(mean, None, None, int(n.sum()), blocks)
    pick = np.random.default_rng(seed).integers(0, blocks, (resamples, blocks))
    means: npt.NDArray[np.float64] = difference[pick].sum(axis=1) / n[pick].sum(axis=1)
    tail = (1 - confidence) / 2
    widen = _t_over_z(1 - tail, blocks - 1) * math.sqrt(blocks / (blocks - 1))
    low, high = (mean + widen * (float(q) - mean) for q in np.quantile(means, [tail, 1 - tail]))
    return Difference(mean, low, high, int(n.sum()), blocks)


def _t_over_z(p: float, df: int) -> float:
    """Student's quantile over the normal one (Cornish-Fisher; within 1% from 5 degrees of freedom on, too small below)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4 / df,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / df**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / df**3,
    )
    return (z + sum(terms)) / z
