"""KL(original || routed) of each token, from a part of each distribution of `original`; and what it comes to. Knows numbers only.

Of the distribution p of `original` at a position are kept: the tokens with p above FLOOR, and DRAWS of the others, drawn in
proportion to p. With r = q / p, the sum of p (r - 1) over the others follows from the mass of the kept tokens, so only the mean
of r - 1 - log r, which is small and never negative, comes from the drawn ones (k3 of Schulman, "Approximating KL Divergence",
2020). So the KL is never negative, and exact where no token is below FLOOR. Drawing is systematic: there are no random numbers.

Measured on the demo model (49152 tokens, perplexity 40, 1020 positions) against whole distributions: the mean KL differs by 0.2%
at most, its 99th percentile by 0.6%, that of one token by 2.7% of the mean (one standard deviation). 2.4 KB are kept of a
position. The likeliest 256 tokens with the mass of the rest as one token give a mean that is 10% too small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cacheroute.evals import paired

FLOOR = 3e-4
DRAWS = 128

Floats = npt.NDArray[np.float64]
LogP = npt.NDArray[np.float32]


class Position(NamedTuple):
    """What is kept of a distribution: its likeliest token, the tokens above FLOOR (`n_top` of them) and then the drawn ones, with
    their log p in nats."""

    likeliest: int
    n_top: int
    tokens: npt.NDArray[np.uint32]
    log_p: LogP

    def kl(self, log_q: LogP) -> float:
        """KL(p || q) in nats, of `log_q` [n_vocab]."""
        log_p, other = self.log_p.astype(np.float64), log_q[self.tokens].astype(np.float64)
        difference = other - log_p
        p, q = np.exp(log_p[: self.n_top]), np.exp(other[: self.n_top])
        rest, drawn = 1 - p.sum(), difference[self.n_top :]
        of_rest = max(rest, 0) * float((np.expm1(drawn) - drawn).mean()) if len(drawn) else 0.0
        return max(of_rest + float(q.sum() - p.sum() - np.dot(p, difference[: self.n_top])), 0.0)


def keep(log_p: LogP) -> Position:
    """Of a distribution, `log_p` [n_vocab] in nats."""
    p = np.exp(log_p)
    top = np.flatnonzero(p > FLOOR)
    p[top] = 0
    upto = np.cumsum(p, dtype=np.float64)
    drawn = np.searchsorted(upto, (np.arange(DRAWS) + 0.5) / DRAWS * upto[-1]) if upto[-1] > 0 else top[:0]
    tokens = np.concatenate([top, drawn])
    return Position(int(log_p.argmax()), len(top), tokens.astype(np.uint32), log_p[tokens])


@dataclass(frozen=True)
class Divergence:
    """KL(original || routed) in nats per token: its mean with the 95% interval of resampled chunks (None with one chunk), the
    99th percentile over tokens; `top1`: share of tokens for which both have the same likeliest one, with its standard error.

    llama-perplexity's Mean KLD, 99.0% KLD and Same top p, the error of the latter as it computes it (tokens taken as
    independent).
    """

    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_p99: float
    top1: float
    top1_se: float


def summary(kl: Sequence[Floats], same: Sequence[int], *, seed: int = 0) -> Divergence:
    """`kl`: nats of each token of each chunk; `same`: tokens of the chunk with the same likeliest token."""
    n = [len(part) for part in kl]
    mean = difference(kl, seed=seed)
    top1 = sum(same) / sum(n)
    return Divergence(
        kl=mean.delta_nll,
        kl_low=None if mean.low is None else max(mean.low, 0.0),
        kl_high=mean.high,
        kl_p99=float(np.quantile(np.concatenate(kl), 0.99)),
        top1=top1,
        top1_se=math.sqrt(top1 * (1 - top1) / max(sum(n) - 1, 1)),
    )


def difference(kl: Sequence[Floats], *, seed: int = 0) -> paired.Difference:
    """The mean KL as a difference from none: resampled as the paired differences are."""
    return paired.compare([0.0] * len(kl), [float(part.sum()) for part in kl], [len(part) for part in kl], seed=seed)
