"""McNemar's test: exact, and honest about what a run could have seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cacheroute.evals import mcnemar


def test_only_questions_that_one_answers_right_count() -> None:
    base = [True] * 40 + [False] * 30 + [True] * 9 + [False]
    other = [True] * 40 + [False] * 30 + [False] * 9 + [True]
    c = mcnemar.compare(base, other)
    assert (c.n, c.gained, c.lost) == (80, 1, 9) and c.difference == pytest.approx(-0.1)
    assert c.p == pytest.approx(2 * 11 / 1024)  # of 10 coins at most one, twice
    assert mcnemar.compare(other, base).p == c.p


def test_the_same_answers_are_no_difference() -> None:
    c = mcnemar.compare([True, False, True], [True, False, True])
    assert (c.gained, c.lost, c.p, c.difference) == (0, 0, 1.0, 0.0)
    assert mcnemar.p_value(5, 5) == 1.0


def test_answers_to_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="same questions"):
        mcnemar.compare([True], [True, False])
    with pytest.raises(ValueError, match="same questions"):
        mcnemar.compare([], [])


@pytest.mark.parametrize(("n", "share"), [(200, 0.1), (500, 0.3), (1000, 0.05)])
def test_a_visible_difference_is_seen_four_times_of_five(n: int, share: float) -> None:
    least = mcnemar.visible(n, round(share * (n + 2)) - 1)
    assert least is not None and 0 < least < share
    rng = np.random.default_rng(1)
    found = rng.multinomial(n, [(share + least) / 2, (share - least) / 2, 1 - share], 2000)
    seen = np.mean([mcnemar.p_value(int(gained), int(lost)) < mcnemar.LEVEL for gained, lost, _ in found])
    assert 0.7 <= seen <= 0.86  # the exact test is a little more cautious than the formula


def test_more_questions_see_more_and_few_see_nothing() -> None:
    seen = [mcnemar.visible(n, n // 10) for n in (10, 100, 1000, 10000)]
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(seen))
    assert mcnemar.visible(3, 0) is None
    none_differ = mcnemar.visible(100, 0)
    assert none_differ is not None and none_differ > 0.05
