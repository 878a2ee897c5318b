"""Two routings on the same questions, each answered right or wrong: McNemar's test, and what it could have seen. Numbers only.

Only questions that one answers right and the other wrong say anything (McNemar 1947, exact by the binomial distribution). What a
run of n questions sees with a power of 80% at the level of 5% follows from n and the share of such questions (Connor, "Sample
size for testing differences in proportions for the paired-sample design", 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Comparison:
    """Of `n` questions the other routing answers `gained` right that the first does not, and `lost` the other way round.

    `p`: of McNemar's exact two-sided test. `visible`: the least difference of the shares of right answers that n questions, as
    many of them answered differently as here, show with a power of 80%; None where not even a difference of all would be seen.
    """

    n: int
    gained: int
    lost: int
    p: float
    visible: float | None

    @property
    def difference(self) -> float:
        """Of the shares of right answers, -1 to 1."""
        return (self.gained - self.lost) / self.n


def compare(base: Sequence[bool], other: Sequence[bool]) -> Comparison:
    """`base` and `other`: whether each question was answered right, in the same order."""
    if not len(base) == len(other) > 0:
        raise ValueError(f"answers to the same questions are compared, not {len(base)} and {len(other)}")
    gained = sum(b and not a for a, b in zip(base, other, strict=True))
    lost = sum(a and not b for a, b in zip(base, other, strict=True))
    return Comparison(len(base), gained, lost, p_value(gained, lost), visible(len(base), gained + lost))


def p_value(gained: int, lost: int) -> float:
    """Of McNemar's exact two-sided test."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(2 * tail / (1 << n), 1.0)


def visible(n: int, n_different: int) -> float | None:
    """The least difference that n questions show, where n_different of them are answered differently.

    Their true share is taken as (n_different + 1) / (n + 2), so that no difference seen is not taken for none that can be; a
    difference is never larger than that share, so where it has to be, the share is as large. Solved by bisection.
    """
    share = (n_different + 1) / (n + 2)
    if _needed(1.0, share) > n:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _needed(middle, share) <= n else (middle, high)
    return high


def _needed(difference: float, share: float) -> float:
    """Questions for that difference of the shares of right answers, where `share` of the answers differ."""
    share = max(share, difference)
    z, z_power = NormalDist().inv_cdf(1 - LEVEL / 2), NormalDist().inv_cdf(POWER)
    return (z * math.sqrt(share) + z_power * math.sqrt(share - difference**2)) ** 2 / difference**2 if difference else math.inf
