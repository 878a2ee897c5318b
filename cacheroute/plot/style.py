"""How figures look: readable at 800 pixels and on black-and-white paper, so no series differs from another by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0
"""Inches of every figure; letters of 10 points are then 14 pixels high on a screen of 800."""
SMALL = 8
"""Points of the smallest letters."""
MOST = 8
"""Entries in a legend."""
SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "cacheroute",
    "svg.fonttype": "none",
}
# Okabe and Ito: told apart with every kind of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "osD^vP*"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 1)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "----", "++++")
GREY = "#999999"

_T = TypeVar("_T")


def kept(series: Sequence[_T], most: int) -> tuple[list[_T], list[_T]]:
    """(those with a style and a name of their own, the others), so that a legend has at most `most` entries."""
    alone = len(series) if len(series) <= most else most - 1
    return list(series[:alone]), list(series[alone:])


def others(n: int) -> str:
    """The legend's entry of those that kept() has grouped."""
    return f"{n} others"


def finish(axes: Axes, x: str, y: str, title: str) -> None:
    """Names of the axes, a title, a grid, and a legend below without covering anything."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    legend(axes.figure, *axes.get_legend_handles_labels())  # type: ignore[arg-type]


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, in as many columns as the labels leave room for; each label once."""
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = list(dict.fromkeys(labels))
    if not names:
        return
    columns = max(1, min(4, len(names), 100 // (max(map(len, names)) + 8)))
    figure.legend([first[name] for name in names], names, loc="outside lower center", ncols=columns, handlelength=3.2)


def limit(values: Sequence[float]) -> float | None:
    """Where an axis is cut, so that a few values far above the others do not flatten them; None where none is far above."""
    ranked = sorted(values)
    if len(ranked) < 5:
        return None
    usual = ranked[(3 * (len(ranked) - 1)) // 4]
    return 2 * usual if usual > 0 and ranked[-1] > 4 * usual else None
