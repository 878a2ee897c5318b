"""Rows of bench as bars: tok/s of every arm, in groups of arms that differ in routing, eviction and prefetch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.errors import UsageError
from cacheroute.plot.chart import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES_PER_BAR = 0.22  # with its part of the gap between groups


@dataclass(frozen=True)
class Bar:
    """One arm. Tokens per second, and their ratio to `original` with lru (None: there was none)."""

    model: str
    group: str
    arm: str
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
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"These rows of bench lack something, or are of another version ({e}).") from None
    cells = [["model", "budget, reading", "arm", "tok/s", "vs original, lru", "floor tok/s", "of floor"]]
    for bar in found:
        floor = "" if bar.floor_ts is None else f"{bar.floor_ts:.2f}"
        share = "" if bar.floor_share is None else f"{100 * bar.floor_share:.0f}%"
        cells.append([bar.model, bar.group, bar.arm, f"{bar.ts:.2f} ± {bar.sd:.2f}", bar.gain, floor, share])
    models = list(dict.fromkeys(bar.model for bar in found))
    most = max(sum(bar.model == model for bar in found) for model in models)
    return Chart(cells, _drawing(found, models), inches=(5.5 * len(models), 1.5 + _INCHES_PER_BAR * most))


def _bar(raw: dict[str, Any]) -> Bar:
    def number(name: str) -> float | None:
        return None if raw.get(name) is None else float(raw[name])

    control, pace = str(raw["control"]) == "True", number("flash_mbps")
    prefetch = int(raw.get("prefetch") or 0)
    if control:
        arm = "llama.cpp's mmap, same memory" + ", repacked" * (str(raw["repack"]) == "True")
    else:
        arm = f"{raw['routing']}, {raw['eviction']}" + f", prefetch {prefetch}" * bool(prefetch)
    group = [str(raw["budget"]), str(raw["io"]), f"{pace:g} MB/s" if pace else "unpaced"]
    return Bar(
        model=str(raw["model"]),
        group=" ".join(group),
        arm=arm,
        ts=float(raw["avg_ts"]),
        sd=float(raw["stddev_ts"]),
        ratio=number("vs_lru"),
        ratio_sd=number("vs_lru_sd"),
        floor_ts=number("floor_ts"),
        floor_share=number("floor_share"),
    )


def _drawing(found: Sequence[Bar], models: Sequence[str]) -> Callable[[Figure], None]:
    colours = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(bar.arm for bar in found))}

    def draw(figure: Figure) -> None:
        for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            _panel(axes, [bar for bar in found if bar.model == model], colours)
            axes.set_title(model, fontsize=9)
        handles, labels = [], []
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=3)

    return draw


def _panel(axes: Axes, found: Sequence[Bar], colours: dict[str, str]) -> None:
    """Bars from the top down, a gap between the groups, the floor of each as a stroke."""
    y, named = 0.0, set[str]()
    ticks: list[tuple[float, str]] = []
    for group in dict.fromkeys(bar.group for bar in found):
        first = y
        for bar in (bar for bar in found if bar.group == group):
            label = "_" if bar.arm in named else bar.arm  # no entry in the legend
            named.add(bar.arm)
            axes.barh(y, bar.ts, xerr=bar.sd, height=0.9, color=colours[bar.arm], label=label, error_kw={"elinewidth": 0.8})
            if bar.floor_ts is not None:
                label = "_" if "" in named else "floor"
                named.add("")
                axes.vlines(bar.floor_ts, y - 0.45, y + 0.45, color="black", linewidth=1.2, label=label)
            if bar.ratio is not None and bar.ratio != 1:
                end = max(bar.ts + bar.sd, bar.floor_ts or 0.0)
                axes.annotate(bar.gain, (end, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6)
            y += 1
        ticks.append(((first + y - 1) / 2, group))
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel("tok/s")
    axes.grid(axis="x", alpha=0.3)
