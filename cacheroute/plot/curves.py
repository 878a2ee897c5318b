"""Quality against bytes, and against speed: a line for each strategy and budget, which begins at `original`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.errors import UsageError
from cacheroute.plot import style, words
from cacheroute.plot.chart import Chart
from cacheroute.plot.misses import name
from cacheroute.plot.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPEEDUPS = (1.25, 1.5, 2.0)  # over `original` at the same budget: where strategies are compared
_NEAR = 0.06  # of an axis: labels of points closer than that would cover each other
_LITTLE = 1.0  # percent of loss
_FEW = 3  # points above the axis that are labelled one by one
_UNCLEAR = "?"  # in place of the mark of the best
_FILLS = ("full", "none", "bottom", "left")  # of marks, by eviction


@dataclass(frozen=True)
class _Quality:
    """What the quality axis can show: the field, its label, how to convert it, and the fields of its interval."""

    field: str
    label: str
    read: Callable[[float], float]
    low: str = ""
    high: str = ""

    @property
    def is_change(self) -> bool:
        """Whether it is what a routing changes, in percent, 0 of `original`."""
        return "%" in self.label


# the most exact first
_QUALITIES = (
    _Quality("delta_nll", "perplexity increase, %", lambda d: 100 * math.expm1(d), "delta_nll_low", "delta_nll_high"),
    _Quality("ppl", "perplexity", float),
    _Quality("lost_mass", "lost router mass, %", lambda m: 100 * m),
)


@dataclass(frozen=True)
class _Point:
    """A row at x, y; `low` and `high` are the ends of its 95% interval, None where it has none."""

    row: Row
    x: float
    y: float
    low: float | None
    high: float | None

    @property
    def variant(self) -> tuple[str, bool]:
        return self.row.eviction, self.row.shuffled

    @property
    def unclear(self) -> bool:
        """Whether its interval includes no change, so that it cannot be called better or worse than `original`."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high and self.row.strategy != "original"


_Better = Callable[[_Point, _Point], bool]
"""Whether the first point's MiB, or tok/s, are better than the second's."""


def have_quality(rows: Sequence[Row]) -> bool:
    """Whether a quality can be shown of any of them."""
    return any(getattr(row, quality.field) is not None for row in rows for quality in _QUALITIES)


def frontier(rows: Sequence[Row]) -> Chart:
    """Quality against MiB a token. Raises UsageError for bytes of two kinds, and for rows without a quality."""
    kinds = {row.mib_kind for row in rows}
    if len(kinds) > 1:
        raise UsageError(
            "Some rows have MiB missed (simulate, eval, frontier) and others MiB read from the device (bench); plot them apart."
        )
    kind = kinds.pop()
    quality, known, note = _qualities(rows)
    points = sorted((_point(row, row.mib_per_token, quality) for row in known), key=lambda p: (p.x, p.y))
    best = _best(points, _fewer)
    cells = [["budget", "routing", "eviction", f"{kind} MiB/token", quality.label, "best"]]
    for p in points:
        mark = _UNCLEAR if quality.is_change and p.unclear else "*" * (p in best)
        cells.append([p.row.budget, name(p.row), p.row.eviction, f"{p.x:.3f}", f"{p.y:.3f}", mark])
    x = f"MiB {kind} per token"
    of = quality.label.replace(", %", "")
    legend = f"*: at its budget nothing that can be chosen has both fewer MiB and less {of.replace(' increase', '')}"
    if not all(p.row.choosable for p in points):
        legend += "; belady needs the future, and shuffled tokens are no text"
    if any(row[-1] == _UNCLEAR for row in cells):
        legend += f"; {_UNCLEAR}: the 95% interval of its change includes 0, so it is not compared"
    return Chart(cells, _drawing(points, best, x, quality.label), _alt(points, quality, x, _fewer), note, legend=f"{legend}.")


def _qualities(rows: Sequence[Row]) -> tuple[_Quality, list[Row], str]:
    """(what is shown, the rows that have it, a note on those that are left out)."""
    found = next((q for q in _QUALITIES if any(getattr(row, q.field) is not None for row in rows)), None)
    if found is None:
        raise UsageError("These rows have no quality; rows of simulate or eval have one, and --kind misses shows these.")
    known = [row for row in rows if getattr(row, found.field) is not None]
    left = len(rows) - len(known)
    return found, known, f"{left} rows without {found.field} are left out." if left else ""


def _point(row: Row, x: float, quality: _Quality) -> _Point:
    def read(field: str) -> float | None:
        value: float | None = getattr(row, field) if field else None
        return None if value is None else quality.read(value)

    return _Point(row, x, quality.read(getattr(row, quality.field)), read(quality.low), read(quality.high))


def _fewer(a: _Point, b: _Point) -> bool:
    """Whether `a` has fewer MiB than `b`."""
    return a.x < b.x


def _faster(a: _Point, b: _Point) -> bool:
    """Whether `a` has more tok/s than `b`."""
    return a.x > b.x


def _best(points: Sequence[_Point], better: _Better) -> list[_Point]:
    """At each budget those that can be chosen, and whose change is clear, that no other such one beats in both figures, or in one
    and equals in the other."""
    known = [p for p in points if p.row.choosable and not p.unclear]

    def beaten(p: _Point) -> bool:
        same = (q for q in known if q.row.budget_experts == p.row.budget_experts)
        return any((better(q, p) and q.y <= p.y) or (q.y < p.y and not better(p, q)) for q in same)

    return [p for p in known if not beaten(p)]


def _alt(points: Sequence[_Point], quality: _Quality, x: str, better: _Better) -> str:
    """What there is to see, and the greatest gain for at most _LITTLE percent of loss."""
    series = dict.fromkeys(words.strategy(p.row.strategy) for p in points)
    budgets = dict.fromkeys(words.budget(p.row.budget) for p in sorted(points, key=lambda p: p.row.budget_experts))
    what = quality.label.replace(", %", " in %")
    said = (
        f"{what[0].upper()}{what[1:]} against {x}, {points[0].row.model or 'one model'}, with {words.listed(list(budgets))} "
        f"of the experts in memory: {words.listed(list(series))}."
    )
    return " ".join([said, *_gain(points, quality, better)]) if quality.is_change else said


def _gain(points: Sequence[_Point], quality: _Quality, better: _Better) -> Iterator[str]:
    """The choice with the greatest gain over `original` of its own budget and eviction. Where there is one whose change is clear,
    it is one that none beats in both figures."""
    own = [p for p in points if p.row.choosable]
    base = {(p.row.budget, p.variant): p for p in own if p.row.strategy == "original"}
    pairs = [(p, base[p.row.budget, p.variant]) for p in own if (p.row.budget, p.variant) in base]
    cheap = [(p, o) for p, o in pairs if p is not o and p.y <= _LITTLE and min(p.x, o.x) > 0 and better(p, o)]
    best = _best(points, better)
    cheap = [(p, o) for p, o in cheap if p in best] or [(p, o) for p, o in cheap if p.unclear]
    if not cheap:
        return
    p, o = max(cheap, key=lambda pair: abs(math.log(pair[0].x / pair[1].x)))
    several = len({q.row.eviction for q in own}) > 1
    routing = words.routing(p.row.routing) + (f" with {words.eviction(p.row.eviction)}" if several else "")
    has = f"{routing} at {words.budget(p.row.budget)} has {p.x:.3g} in place of {o.x:.3g} ({100 * (p.x / o.x - 1):+.0f}%)"
    if p.unclear:
        interval = f"95% interval {p.low:.2g}% to {p.high:.2g}%"
        found = f"{has}, and its {quality.label.replace(', %', '')} is not clear of 0 ({interval})."
    else:
        found = f"for {p.y:.2g}%, {has}."
    budgets = {q.row.budget_experts for q in own}
    yield f"The greatest gain: {found}" if len(budgets) > 1 else found[0].upper() + found[1:]


def speed(rows: Sequence[Row]) -> Chart:
    """Quality against tok/s; the table has what each strategy loses at the same speed. Raises UsageError without a speed."""
    quality, known, _ = _qualities(rows)
    points = sorted((_point(row, row.ts, quality) for row in known if row.ts is not None), key=lambda p: (p.x, p.y))
    if not points:
        raise UsageError("These rows have no tok/s; `cacheroute frontier --io auto` with one worker measures it.")
    cells = [["budget", "strategy", "eviction", *(f"{quality.label} at {s:g} x original's tok/s" for s in _SPEEDUPS)]]
    groups = sorted({(p.row.budget_experts, p.row.budget, p.row.strategy, p.row.eviction) for p in points})
    for experts, budget, strategy, eviction in groups:
        if strategy == "original":
            continue
        same = [p for p in points if (p.row.budget_experts, p.row.eviction) == (experts, eviction)]
        base = next((p for p in same if p.row.strategy == "original"), None)
        own = [p for p in same if p.row.strategy == strategy]
        losses = [_at(s, base, own) if base else None for s in _SPEEDUPS]
        cells.append([budget, strategy, eviction, *("-" if loss is None else f"{loss:.3f}" for loss in losses)])
    left = len(rows) - len(points)
    note = f"{left} rows without tok/s are left out." if left else ""
    best = _best(points, _faster)
    alt = _alt(points, quality, "decoded tokens per second", _faster)
    return Chart(cells, _drawing(points, best, "tok/s", quality.label), alt, note)


def _at(speedup: float, base: _Point, own: Sequence[_Point]) -> float | None:
    """The least quality loss at a speed-up over `base`, between points by interpolation; None where no point is as fast."""
    wanted = speedup * base.x
    reached = [p.y for p in own if p.x >= wanted]
    for slow, fast in itertools.permutations([base, *own], 2):
        if slow.x < wanted < fast.x:
            reached.append(slow.y + (fast.y - slow.y) * (wanted - slow.x) / (fast.x - slow.x))
    return min(reached, default=None)


# ---- drawing ----


def _drawing(points: Sequence[_Point], best: Sequence[_Point], x: str, y: str) -> Callable[[Figure], None]:
    """Draws `points`, with the parameters of the `best`; values far above the others are cut and marked."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        found = list(dict.fromkeys(p.row.strategy for p in points if p.row.strategy != "original"))
        found.sort(key=lambda name: -sum(p.row.strategy == name for p in best))  # those that are best somewhere keep their name
        variants = list(dict.fromkeys(p.variant for p in points if p.row.strategy != "original"))
        several = len(variants) > 1
        alone, grouped = style.kept(found, style.MOST - 1 - len(variants) * several)
        fills = {variant: _FILLS[min(n, len(_FILLS) - 1)] for n, variant in enumerate(variants)}
        for own in grouped:
            look = {"color": style.GREY, "linestyle": "-", "marker": "."}
            _lines(axes, points, own, fills, look, style.others(len(grouped)))
        for n, own in enumerate(alone):
            look = {"color": style.COLOURS[n], "linestyle": style.LINES[n], "marker": style.MARKERS[n]}
            _lines(axes, points, own, fills, look, words.strategy(own))
        if several:
            for (eviction, shuffled), fill in fills.items():
                label = words.eviction(eviction) + ", shuffled" * shuffled
                axes.plot([], [], "ko", markersize=6, fillstyle=fill, label=label)
        top = _frame(axes, points)
        _originals(axes, points)
        _parameters(axes, points, [p for p in best if p.y <= top])
        spread = any(p.low is not None and p.high is not None for p in points)
        style.finish(axes, x, y + " (strokes: 95% interval)" * spread, points[0].row.model)

    return draw


def _lines(
    axes: Axes, points: Sequence[_Point], strategy: str, fills: Mapping[Any, Any], look: Mapping[str, Any], label: str
) -> None:
    """One strategy, a line for each budget and eviction: from `original` on, the intervals as strokes."""
    axes.plot([], [], markersize=6, label=label, **look)
    marks = {"marker": look["marker"], "color": look["color"], "markersize": 6, "linestyle": "none"}
    for variant, fill in fills.items():
        for budget in dict.fromkeys(p.row.budget for p in points if p.row.strategy == strategy):
            same = [p for p in points if (p.variant, p.row.budget) == (variant, budget)]
            through = [p for p in same if p.row.strategy in (strategy, "original")]
            own = [p for p in same if p.row.strategy == strategy]
            if own:
                xs, ys = [p.x for p in through], [p.y for p in through]
                axes.plot(xs, ys, color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
                axes.plot([p.x for p in own], [p.y for p in own], fillstyle=fill, **marks)
            for p in own:
                if p.low is not None and p.high is not None:
                    axes.vlines(p.x, p.low, p.high, color=look["color"], linewidth=1, alpha=0.7)


def _frame(axes: Axes, points: Sequence[_Point]) -> float:
    """Sets the limits of the axes; what is far above the others becomes a mark at the edge. Returns the largest y shown."""
    ceiling = style.limit([p.y for p in points])
    cut = [p for p in points if ceiling is not None and p.y > ceiling]
    shown = [p for p in points if p not in cut]
    top = ceiling if ceiling is not None else max(p.y if p.high is None else p.high for p in points)
    low = min(p.y if p.low is None else p.low for p in shown)
    room = 0.12 * max(top - low, 1e-9)  # below for the names of the budgets
    axes.set_ylim(low - room, top + room)
    axes.margins(x=0.08)
    axes.autoscale_view(scaley=False)
    if not cut:
        return top
    at = top + room / 2
    axes.plot([p.x for p in cut], [at] * len(cut), "k^", markersize=7)
    if len(cut) > _FEW:
        said = f"▲ {len(cut)} points above, up to {max(p.y for p in cut):.3g}"
        axes.annotate(said, (0.99, 0.9), xycoords="axes fraction", ha="right", fontsize=style.SMALL)
    else:
        for p in cut:
            axes.annotate(f"{p.y:.3g}", (p.x, at), xytext=(7, -4), textcoords="offset points", fontsize=style.SMALL)
    return top


def _originals(axes: Axes, points: Sequence[_Point]) -> None:
    """Where the lines of a budget begin, with the budget below it, once."""
    originals = [p for p in points if p.row.strategy == "original"]
    if originals:
        label = words.strategy("original")
        axes.plot([p.x for p in originals], [p.y for p in originals], "kx", markersize=8, markeredgewidth=2, label=label)
    for budget in dict.fromkeys(p.row.budget for p in points):
        own = [p for p in originals or points if p.row.budget == budget]
        at = max(own, key=lambda p: p.x) if own else min((p for p in points if p.row.budget == budget), key=lambda p: p.y)
        text = words.budget(budget)
        _below(axes, at, text)
        for p in own:
            if p.row.eviction == "belady" and not _covered(axes, p, originals, _NEAR):
                _below(axes, p, "Belady")


def _below(axes: Axes, p: _Point, text: str) -> None:
    axes.annotate(text, (p.x, p.y), xytext=(0, -9), textcoords="offset points", ha="center", va="top", fontsize=9)


def _parameters(axes: Axes, points: Sequence[_Point], best: Sequence[_Point]) -> None:
    """Names the parameters of the best points, where there is room to the right of them."""
    for p in best:
        text = words.parameters(p.row.routing)
        if text and not _covered(axes, p, points, 2 * _NEAR):
            axes.annotate(text, (p.x, p.y), xytext=(6, 6), textcoords="offset points", fontsize=style.SMALL)


def _covered(axes: Axes, p: _Point, points: Sequence[_Point], width: float) -> bool:
    """Whether another point lies where the text of `p` would: within `width` of the axis' length, and _NEAR of its height."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    far = [(abs(p.x - q.x) / (right - left), abs(p.y - q.y) / (top - bottom)) for q in points if q is not p]
    return any(x < width and y < _NEAR for x, y in far)
