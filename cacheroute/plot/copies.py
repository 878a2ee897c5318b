"""Several quantisations of one model at equal memory: KL against speed, a panel for each memory, with its Pareto front.

The colour and mark of a point are its file's; a file that is whole in memory is a star. Points are numbered, and beside the panel
stands what each number is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.errors import UsageError
from cacheroute.plot import style, words
from cacheroute.plot.chart import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEEDED = ("file", "reference", "memory_mib", "kl", "missed_mib_per_token", "whole")
_PANEL = 3.4  # inches
_FILLS = ("full", "none", "bottom", "left")  # of marks, by eviction
_LINE = 0.15  # inches of a name beside the panel
_SPREAD = 5.0  # largest over smallest speed from which on the axis is logarithmic


@dataclass(frozen=True)
class _Point:
    """One file with one routing: x is tok/s, or MiB a token; y is the KL in millinats."""

    file: str
    name: str
    budget: str
    memory: float
    eviction: str
    whole: bool
    lossy: bool
    x: float
    y: float
    low: float | None
    high: float | None
    top1: float | None


def is_row(raw: Mapping[str, Any]) -> bool:
    """Whether it is one of `frontier --files`."""
    return all(raw.get(name) is not None for name in _NEEDED)


def chart(raws: Sequence[Mapping[str, Any]]) -> Chart:
    """Raises UsageError where there is no such row, or rows were compared with several files or are for several drives."""
    own = [raw for raw in raws if is_row(raw)]
    if not own:
        raise UsageError("These rows are not of several files; `cacheroute frontier --files` writes such.")
    for field, what in (("reference", "compared with"), ("model", "of"), ("flash_mbps", "forecast for")):
        several = sorted({str(raw.get(field)) for raw in own})
        if len(several) > 1:
            raise UsageError(f"These rows are {what} several ({', '.join(several)}); plot them apart.")
    predicted = all(raw.get("predicted_ts") is not None for raw in own)
    try:
        points = sorted({_point(raw, predicted) for raw in own}, key=lambda p: (p.memory, p.file, p.y))
    except (TypeError, ValueError) as e:
        raise UsageError(f"These rows have a value that cannot be drawn ({e}).") from None
    pace = own[0].get("flash_mbps")
    behind = f" behind {float(pace):g} MB/s" if pace else ""
    x = f"tokens per second{behind} (forecast)" if predicted else "MiB missed per token"
    y = f"KL against {own[0]['reference']}, millinats"
    memories = list(dict.fromkeys((p.memory, p.budget) for p in points))
    fronts = {memory: _front([p for p in points if (p.memory, p.budget) == memory], predicted) for memory in memories}
    cells = [["memory", "MiB", "file and routing", "eviction", x, y, "front"]]
    for p in points:
        mark = "*" * (p in fronts[p.memory, p.budget])
        cells.append([p.budget, f"{p.memory:.1f}", _name(p), "" if p.whole else p.eviction, f"{p.x:.2f}", f"{p.y:.2f}", mark])
    title = str(own[0].get("model", ""))
    draw = _drawing(points, fronts, x, y, title)
    return Chart(cells, draw, _alt(points, fronts, x, y, title), height=_panel_height(points) * len(memories) + 1)


def _point(raw: Mapping[str, Any], predicted: bool) -> _Point:
    def millinats(field: str) -> float | None:
        value = raw.get(field)
        return None if value is None else 1000 * float(value)

    whole, routing = str(raw["whole"]) in ("True", "true", "1"), words.short(str(raw["routing"]))
    return _Point(
        file=str(raw["file"]),
        name="" if whole else words.routing(routing) if routing != "original" else "original",
        budget=str(raw.get("budget", "")),
        memory=float(raw["memory_mib"]),
        eviction=str(raw.get("eviction", "")),
        whole=whole,
        lossy=not whole and routing != "original",
        x=float(raw["predicted_ts"] if predicted else raw["missed_mib_per_token"]),
        y=1000 * float(raw["kl"]),
        low=millinats("kl_low"),
        high=millinats("kl_high"),
        top1=None if raw.get("top1") is None else float(raw["top1"]),
    )


def _name(p: _Point) -> str:
    return f"{p.file}, all in memory" if p.whole else f"{p.file} {p.name}"


def _front(points: Sequence[_Point], predicted: bool) -> list[_Point]:
    """Those than which no other is as fast and has less KL, the fastest first."""
    ordered = sorted(points, key=lambda p: (-p.x if predicted else p.x, p.y))
    return [p for i, p in enumerate(ordered) if all(p.y < before.y for before in ordered[:i])]


def _alt(points: Sequence[_Point], fronts: Mapping[tuple[float, str], Sequence[_Point]], x: str, y: str, title: str) -> str:
    """What there is to see: the files, and the ends of each front."""
    files = words.listed(list(dict.fromkeys(p.file for p in points)))
    said = [f"{y} against {x}, {title or 'one model'}: {files} in equal memory, a panel for each."]
    for (memory, budget), front in fronts.items():
        first, last = front[0], front[-1]
        ends = f"from {_name(first)} ({_short(first.x)}; {_short(first.y)} millinats)"
        if first is not last:
            ends += f" to {_name(last)} ({_short(last.x)}; {_short(last.y)})"
        said.append(f"In {memory:.1f} MiB ({budget}) the front goes {ends}.")
    return " ".join(said)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _panel_height(points: Sequence[_Point]) -> float:
    """Inches: enough for the names of the fullest panel."""
    most = max(sum(q.memory == p.memory and q.budget == p.budget for q in points) for p in points)
    return max(_PANEL, _LINE * most + 0.6)


def _drawing(
    points: Sequence[_Point], fronts: Mapping[tuple[float, str], Sequence[_Point]], x: str, y: str, title: str
) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(fronts), 1, squeeze=False)[:, 0]
        files = list(dict.fromkeys(p.file for p in points))
        looks = {
            f: (style.COLOURS[i % len(style.COLOURS)], style.MARKERS[i % (len(style.MARKERS) - 1)]) for i, f in enumerate(files)
        }
        evictions = list(dict.fromkeys(p.eviction for p in points if not p.whole))
        fills = {e: _FILLS[min(i, len(_FILLS) - 1)] for i, e in enumerate(evictions)}
        for axes, ((memory, budget), front) in zip(panels, fronts.items(), strict=True):
            own = [p for p in points if (p.memory, p.budget) == (memory, budget)]
            _panel(axes, sorted(own, key=lambda p: (p.x, p.y)), front, looks, fills)
            axes.set_title(f"{budget}: {memory:.1f} MiB for experts", fontsize=10)
            axes.set_ylabel(y.replace(", millinats", ",\nmillinats"))
            axes.grid(alpha=0.3)
        panels[-1].set_xlabel(x)
        figure.suptitle(title, fontsize=11)
        handles, labels = _legend(panels[0], looks, fills, any(p.whole for p in points))
        style.legend(figure, handles, labels)

    return draw


def _panel(
    axes: Axes,
    points: Sequence[_Point],
    front: Sequence[_Point],
    looks: Mapping[str, tuple[str, str]],
    fills: Mapping[str, Any],
) -> None:
    ordered = sorted(front, key=lambda p: p.x)
    axes.plot([p.x for p in ordered], [p.y for p in ordered], color="black", linestyle="--", linewidth=1)
    for p in points:
        colour, marker = looks[p.file]
        fill = "full" if p.whole else fills[p.eviction]
        axes.plot([p.x], [p.y], color=colour, marker="*" if p.whole else marker, markersize=11 if p.whole else 6, fillstyle=fill)
        if p.low is not None and p.high is not None:
            axes.vlines(p.x, p.low, p.high, color=colour, linewidth=1, alpha=0.7)
    _scale(axes, points)
    _names(axes, points, front, several=len(fills) > 1)


def _names(axes: Axes, points: Sequence[_Point], front: Sequence[_Point], *, several: bool) -> None:
    """A number at each point, and beside the axes what each number is, from left to right; * for those on the front."""
    lines = []
    for n, p in enumerate(points, 1):
        axes.annotate(str(n), (p.x, p.y), xytext=(4, 4), textcoords="offset points", fontsize=style.SMALL)
        eviction = f", {words.eviction(p.eviction)}" if several and not p.whole else ""
        lines.append(f"{n} {_name(p)}{eviction}" + " *" * (p in front))
    axes.text(1.02, 1.0, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=style.SMALL, linespacing=1.25)


def _scale(axes: Axes, points: Sequence[_Point]) -> None:
    """Logarithmic axes where a few values far above the others would flatten them; near zero the KL's stays linear."""
    from matplotlib.ticker import LogLocator

    xs, ys = [p.x for p in points], [p.y for p in points]
    if min(xs) > 0 and max(xs) > _SPREAD * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="minor", labelsize=style.SMALL - 1)
    if style.limit(ys) is not None:
        axes.set_yscale("symlog", linthresh=max(min((y for y in ys if y > 0), default=1.0), 1.0))
        axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(0.1)


def _legend(
    axes: Axes, looks: Mapping[str, tuple[str, str]], fills: Mapping[str, Any], stars: bool
) -> tuple[list[Any], list[str]]:
    found: list[tuple[Any, str]] = []
    for file, (colour, marker) in looks.items():
        found.append((axes.plot([], [], color=colour, marker=marker, linestyle="none", markersize=6)[0], file))
    if len(fills) > 1:
        for eviction, fill in fills.items():
            handle = axes.plot([], [], "ko", markersize=6, fillstyle=fill, linestyle="none")[0]
            found.append((handle, words.eviction(eviction)))
    if stars:
        found.append((axes.plot([], [], "k*", markersize=11)[0], "all in memory"))
    found.append((axes.plot([], [], color="black", linestyle="--", linewidth=1)[0], "Pareto front"))
    return [handle for handle, _ in found], [label for _, label in found]
