"""Figures with their 95% intervals, as tables and sentences write them: +0.63 [-0.22, +1.54], or +0.63 where there is none.

`tight` is for lines of 80 columns: no space inside the brackets, and one digit less of a KL.
"""

from __future__ import annotations

from typing import Protocol

from cacheroute.cli import table


class Change(Protocol):
    """What has a change of the perplexity, in percent."""

    @property
    def ppl_increase(self) -> float | None: ...
    @property
    def ppl_increase_low(self) -> float | None: ...
    @property
    def ppl_increase_high(self) -> float | None: ...


class Kl(Protocol):
    """What has a mean KL, in nats per token."""

    @property
    def kl(self) -> float | None: ...
    @property
    def kl_low(self) -> float | None: ...
    @property
    def kl_high(self) -> float | None: ...


def figure(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    factor: float = 1,
    digits: int = 2,
    sign: bool = True,
    tight: bool = False,
) -> str:
    """`value` x `factor` and its interval; ? for a value that is unknown."""

    def text(x: float | None) -> str:
        scaled = None if x is None else factor * x
        return table.signed(scaled, digits) if sign else table.number(scaled, digits=digits)

    ends = "" if low is None and high is None else f" [{text(low)}{',' if tight else ', '}{text(high)}]"
    return text(value) + ends


def ppl_change(of: Change, *, tight: bool = False) -> str:
    """In percent."""
    return figure(of.ppl_increase, of.ppl_increase_low, of.ppl_increase_high, tight=tight)


def mean_kl(of: Kl, *, tight: bool = False) -> str:
    """In millinats."""
    return figure(of.kl, of.kl_low, of.kl_high, factor=1000, digits=1 if tight else 2, sign=False, tight=tight)
