"""How much a text repeats itself. Knows tokens only."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over all n-grams, 1 where none comes twice (distinct-n of Li et al., "A Diversity-Promoting Objective
    Function for Neural Conversation Models", 2016); 1 for a text shorter than n."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest piece that comes at two places, which may overlap: a text that loops with period p from its token s
    on has one of n - s - p."""
    low, high = 0, len(tokens)  # a piece of `low` comes twice, none of `high` does
    while high - low > 1:
        middle = (low + high) // 2
        grams = _grams(tokens, middle)
        low, high = (middle, high) if len(set(grams)) < len(grams) else (low, middle)
    return low


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
