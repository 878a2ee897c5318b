"""Rows of bench as bars: tok/s of every arm, in groups of arms that differ in routing, eviction and prefetch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.errors import UsageError
from cacheroute.plot import style, words
from cacheroute.plot.chart import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = "floor: what compute and device allow"
_INCHES_PER_BAR = 0.22  # with its part of the gap between groups


@dataclass(frozen=True)
class Bar:
    """One arm; `group` and `typed` as they were typed, `place` and `arm` the same in words. Tokens per second, and their
    ratio to `original` with lru (None: there was none)."""

    model: str
    group: str
    place: str
    arm: str
    typed: str
    control: bool
    ts: float
    sd: float
    ratio: float | None
    ratio_sd: float | None
    floor_ts: float | None
    floor_share: float | None

    @property
    def gain(self) -> str:
        if self.ratio is None:
            return ""
        return f"{self.ratio:.2f}" + (f" ± {self.ratio_sd:.2f}" if self.ratio_sd else "") + " x"


def is_row(raw: dict[str, Any]) -> bool:
    """Whether bench wrote it."""
    return "avg_ts" in raw


def bars(raws: Sequence[dict[str, Any]]) -> Chart:
    """The decoded tokens of every arm; of prompts when nothing else was run. Raises UsageError for rows that are not bench's."""
    own = [raw for raw in raws if is_row(raw)]
    own = [raw for raw in own if str(raw.get("n_gen")) != "0"] or own
    if not own:
        raise UsageError("These are not rows of bench, which `cacheroute bench -o jsonl` writes.")
    try:
        found = [_bar(raw) for raw in own]
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise UsageError(f"These rows of bench lack something, or are of another version ({e}).") from None
    cells = [["model", "budget, reading", "arm", "tok/s", "vs original, lru", "floor tok/s", "of floor"]]
    for bar in found:
        floor = "" if bar.floor_ts is None else f"{bar.floor_ts:.2f}"
        share = "" if bar.floor_share is None else f"{100 * bar.floor_share:.0f}%"
        cells.append([bar.model, bar.group, bar.typed, f"{bar.ts:.2f} ± {bar.sd:.2f}", bar.gain, floor, share])
    models = list(dict.fromkeys(bar.model for bar in found))
    groups = [list(dict.fromkeys(bar.group for bar in found if bar.model == model)) for model in models]
    beside = len(models) == 2 and groups[0] == groups[1]  # in one row, with the names of the groups once
    bars_of = [sum(bar.model == model for bar in found) for model in models]
    height = 1.8 + _INCHES_PER_BAR * ((max if beside else sum)(bars_of) + 0.8 * sum(map(len, groups)) / (1 + beside))
    return Chart(cells, _drawing(found, models, beside), _alt(found), height=height)


def _alt(found: Sequence[Bar]) -> str:
    """How much there is to see, and the greatest gain."""
    models = words.listed(list(dict.fromkeys(bar.model for bar in found)))
    said = f"Bars of decoded tokens per second of {len(found)} runs, {models}"
    gains = [bar for bar in found if bar.ratio is not None and not bar.control]
    if not gains:
        return f"{said}: {min(bar.ts for bar in found):.1f} to {max(bar.ts for bar in found):.1f}."
    best = max(gains, key=lambda bar: bar.ratio or 0.0)
    return f"{said}: at most {best.ratio:.1f} times as many as the model's own routing with LRU, by {best.arm} ({best.place})."


def _bar(raw: dict[str, Any]) -> Bar:
    def number(name: str) -> float | None:
        return None if raw.get(name) is None else float(raw[name])

    control, pace = str(raw["control"]) == "True", number("flash_mbps")
    prefetch = int(raw.get("prefetch") or 0)
    if control:
        typed = arm = "llama.cpp's mmap, same memory" + ", repacked" * (str(raw["repack"]) == "True")
    else:
        more = f", prefetch {prefetch}" * bool(prefetch)
        routing = words.short(str(raw["routing"]))
        typed = f"{routing}, {raw['eviction']}{more}"
        arm = f"{words.routing(routing)}, {words.eviction(str(raw['eviction']))}{more}"
    group = [str(raw["budget"]), str(raw["io"]), f"{pace:g} MB/s" if pace else "unpaced"]
    place = [words.budget(group[0]), f"{group[1]} reads" if group[1] != "mmap" else "mmap", *group[2:] * bool(pace)]
    return Bar(
        model=str(raw["model"]),
        group=" ".join(group),
        place=", ".join(place),
        arm=arm,
        typed=typed,
        control=control,
        ts=float(raw["avg_ts"]),
        sd=float(raw["stddev_ts"]),
        ratio=number("vs_lru"),
        ratio_sd=number("vs_lru_sd"),
        floor_ts=number("floor_ts"),
        floor_share=number("floor_share"),
    )


def _drawing(found: Sequence[Bar], models: Sequence[str], beside: bool) -> Callable[[Figure], None]:
    arms = list(dict.fromkeys(bar.arm for bar in found))
    floor = any(bar.floor_ts is not None for bar in found)
    edge = max(max(bar.ts + bar.sd, bar.floor_ts or 0.0) for bar in found)
    # more than a legend can hold are named beside each bar
    looks = {arm: n for n, arm in enumerate(arms)} if len(arms) <= style.MOST - 1 else {}

    def draw(figure: Figure) -> None:
        shape = (1, len(models)) if beside else (len(models), 1)
        heights = None if beside else [sum(bar.model == model for bar in found) + 1 for model in models]
        panels = figure.subplots(*shape, squeeze=False, sharex=not beside, sharey=beside, height_ratios=heights).flat
        handles: list[Any] = []
        for axes, model in zip(panels, models, strict=True):
            handles += _panel(axes, [bar for bar in found if bar.model == model], looks, edge)
            axes.set_title(model, fontsize=10 if beside else 11)
        if looks or floor:
            handles.sort(key=lambda handle: handle.get_label() == _FLOOR)
            style.legend(figure, handles, [handle.get_label() for handle in handles])

    return draw


def _panel(axes: Axes, found: Sequence[Bar], looks: dict[str, int], edge: float) -> list[Any]:
    """Bars from the top down, a gap between the groups, the floor of each as a stroke. Returns what the legend names."""
    y, ticks, handles = 0.0, list[tuple[float, str]](), list[Any]()
    for group in dict.fromkeys(bar.group for bar in found):
        own = [bar for bar in found if bar.group == group]
        if looks:
            ticks.append((y + (len(own) - 1) / 2, own[0].place))
        else:
            axes.annotate(
                own[0].place, (0, y), xytext=(4, 0), textcoords="offset points", va="center", fontweight="bold", fontsize=9
            )
            y += 1
        for bar in own:
            if not looks:
                ticks.append((y, bar.arm))
            handles += _one(axes, bar, y, looks.get(bar.arm, 0))
            if bar.gain and bar.ratio != 1:
                end = max(bar.ts + bar.sd, bar.floor_ts or 0.0)
                axes.annotate(bar.gain, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=style.SMALL)
            y += 1
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.set_xlim(0, 1.3 * edge)  # room for the gains
    axes.set_ylim(y - 0.5, -0.8)
    axes.set_xlabel("tok/s" + "; behind a bar: times original with LRU" * any(bar.gain for bar in found))
    axes.xaxis.set_tick_params(labelbottom=True)  # where panels share it, too
    axes.grid(axis="x", alpha=0.3)
    return handles


def _one(axes: Axes, bar: Bar, y: float, look: int) -> list[Any]:
    colour, hatch = style.COLOURS[look % 7], style.HATCHES[look % 7]
    drawn = axes.barh(
        y,
        bar.ts,
        xerr=bar.sd,
        height=0.9,
        facecolor=colour if not hatch else "white",
        edgecolor=colour,
        hatch=hatch,
        label=bar.arm,
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    if bar.floor_ts is None:
        return [drawn]
    return [drawn, axes.vlines(bar.floor_ts, y - 0.45, y + 0.45, color="black", linewidth=2, label=_FLOOR)]
