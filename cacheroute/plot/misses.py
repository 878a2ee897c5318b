"""Miss rates against the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cacheroute.plot import style, words
from cacheroute.plot.chart import Chart
from cacheroute.plot.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = {"qwen1.5-moe-a2.7b": (35, 16), "deepseek-v2-lite": (28, 7), "phi-3.5-moe": (22, 9), "mixtral-8x7b": (40, 21)}
"""Model -> % missed with half of the experts in memory, by LRU and with cache-prior (arXiv 2412.00099)."""
_AT = "50%"


def chart(rows: Sequence[Row]) -> Chart:
    """A line for each routing and eviction; beside them what the paper has for the same model."""
    series = list(dict.fromkeys((name(row), row.eviction) for row in rows))
    budgets = sorted({row.budget_experts for row in rows})
    rate = {(name(row), row.eviction, row.budget_experts): 100 * row.miss_rate for row in rows}
    cells = [["routing", "eviction", *(f"{b} experts" for b in budgets)]]
    for routing, eviction in series:
        values = [rate.get((routing, eviction, b)) for b in budgets]
        cells.append([routing, eviction, *("" if v is None else f"{v:.1f}%" for v in values)])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        paper = _paper(rows)
        most = style.MOST - len(paper)
        alone, grouped = style.kept(series if len(series) <= most else _ranked(series, rate), most)
        for n, (routing, eviction) in enumerate([*alone, *grouped]):
            own = [b for b in budgets if (routing, eviction, b) in rate]
            ys = [rate[routing, eviction, b] for b in own]
            if n < len(alone):
                axes.plot(own, ys, color=style.COLOURS[n % 7], linestyle=style.LINES[n % 7], marker=style.MARKERS[n % 7],
                          markersize=6, label=_label(routing, eviction))  # fmt: skip
            else:
                axes.plot(own, ys, color=style.GREY, linewidth=0.8, zorder=1, label=style.others(len(grouped)))
        for n, (label, x, y) in enumerate(paper):
            axes.plot([x], [y], "k" + "1+"[n], markersize=13, markeredgewidth=2, label=label)
        style.finish(axes, "experts of each layer in memory", "chosen experts that had to be read, %", rows[0].model)
        _ticks(axes, rows)
        axes.set_ylim(bottom=0)

    chosen = [row for row in rows if row.choosable] or rows
    best = min(chosen, key=lambda row: (row.miss_rate, row.budget_experts))
    alt = (
        f"Share of the chosen experts that had to be read against the experts in memory, {rows[0].model}: {len(series)} lines; "
        f"the fewest, {100 * best.miss_rate:.1f}%, with {_label(name(best), best.eviction)} at {words.budget(best.budget)}."
    )
    return Chart(cells, draw, alt)


def _ranked(series: Sequence[tuple[str, str]], rate: Mapping[tuple[str, str, int], float]) -> list[tuple[str, str]]:
    """Those with a name first where not all can have one: what the others are compared with, then the fewest misses."""

    def rank(own: tuple[str, str]) -> tuple[bool, float]:
        values = [v for (routing, eviction, _), v in rate.items() if (routing, eviction) == own]
        return not own[0].startswith("original"), sum(values) / len(values)

    return sorted(series, key=rank)


def name(row: Row) -> str:
    """A routing, and whether its tokens were shuffled."""
    return row.routing + (" (shuffled)" if row.shuffled else "")


def _label(routing: str, eviction: str) -> str:
    return ", ".join(part for part in (words.routing(routing), words.eviction(eviction)) if part)


def _ticks(axes: Axes, rows: Sequence[Row]) -> None:
    """The budgets as they were given, below their experts."""
    typed = {row.budget_experts: row.budget for row in rows}
    labels = [str(b) if typed[b] in ("", str(b)) else f"{b}\n({typed[b]})" for b in sorted(typed)]
    axes.set_xticks(sorted(typed), labels)


def _paper(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """(label, experts, % missed) of the paper where it has the rows' model, and they have its budget. Not of random weights."""
    model = rows[0].model.lower().replace(" ", "-").replace("_", "-")
    found = next((figures for title, figures in PAPER.items() if title in model and "random" not in model), None)
    at = next((row.budget_experts for row in rows if row.budget == _AT), None)
    if found is None or at is None:
        return []
    return [("the paper: original, LRU", at, found[0]), ("the paper: cache prior", at, found[1])]
