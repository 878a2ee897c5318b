"""Figures of rows of bench, simulate and eval, and of traces: as PNG, SVG, or a table.

Rows are read by the names of their fields; matplotlib is imported only to draw.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cacheroute.errors import UsageError
from cacheroute.files import check_regular
from cacheroute.plot import bench_bars
from cacheroute.plot.chart import Chart
from cacheroute.trace import trace_file
from cacheroute.trace.trace_file import DECODE, FORMAT, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {
    "frontier": "quality, or lost router mass, against MiB missed or read per token",
    "speed": "quality against tok/s, and what each strategy loses at the same speed (of `frontier --io auto`)",
    "bench": "tok/s of every arm with its spread and its floor, in groups of the same model, budget and reading (of bench)",
    "misses": "miss rate against the budget",
    "residency": "which experts of one layer are in the cache, token by token (of a trace)",
    "layers": "how often each expert of each layer runs (of a trace)",
}
_MIB_FIELDS = {"missed": "missed_mib_per_token", "read": "read_mib_per_token"}
_MARKERS = "osD^vP*X"
_SPEEDUPS = (1.25, 1.5, 2.0)  # over `original` at the same budget: where strategies are compared
# What the quality axis can show, the most exact first: field, label, how to convert it.
_QUALITY: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("delta_nll", "perplexity increase, %", lambda d: 100 * math.expm1(d)),
    ("ppl", "perplexity", float),
    ("lost_mass", "lost router mass, %", lambda m: 100 * m),
)


@dataclass(frozen=True)
class Row:
    """What a figure takes from a row of results; None where the row does not have it.

    `mib_per_token` are "read" from the device, or "missed" (misses x bytes of an expert), as `mib_kind` says.
    """

    model: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    miss_rate: float
    mib_per_token: float
    mib_kind: str
    delta_nll: float | None = None
    ppl: float | None = None
    lost_mass: float | None = None
    ts: float | None = None
    shuffled: bool = False

    @property
    def strategy(self) -> str:
        return self.routing.partition(":")[0]


def chart(files: Sequence[Path], kind: str = "", layer: int | None = None) -> Chart:
    """The figure of some files: rows together, or one trace. `kind` "": the first of KINDS that the files can show.

    Raises UsageError for files that cannot be read or do not have what the kind needs.
    """
    if kind and kind not in KINDS:
        raise UsageError(f"There is no plot {kind!r}; there are {', '.join(KINDS)}.")
    are_traces = [_is_trace(path) for path in files]
    if any(are_traces):
        if len(files) > 1:
            raise UsageError("A trace is plotted alone; give one file.")
        if kind in ("frontier", "speed", "bench", "misses"):
            raise UsageError(f"A trace has no {kind} of its own; `cacheroute simulate` makes the rows of one.")
        trace = trace_file.read(files[0])
        return _layers(trace) if kind == "layers" else _residency(trace, layer)
    if kind in ("residency", "layers"):
        raise UsageError(f"{files[0]} is not a trace, which {kind} is of.")
    contents = [_read(path) for path in files]
    raws = [raw for content in contents for raw in content]
    if kind == "bench" or (not kind and raws and all(bench_bars.is_row(raw) for raw in raws)):
        return bench_bars.bars(raws)
    rows = [row for path, content in zip(files, contents, strict=True) for row in _rows(path, content)]
    if kind == "misses" or (not kind and not any(_value(row, field) is not None for row in rows for field, _, _ in _QUALITY)):
        return _misses(rows)
    return _speed(rows) if kind == "speed" else _frontier(rows)


# ---- reading --------------------------------------------------------------------------------------


def _is_trace(path: Path) -> bool:
    check_regular(path, "a file to plot")
    try:
        with path.open("rb") as f:
            return FORMAT.encode() in f.read(64)
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None


def read_rows(path: Path) -> list[Row]:
    """Rows of decoded tokens in a json, jsonl or csv file, all layers together. Raises UsageError when there are none."""
    return _rows(path, _read(path))


def _rows(path: Path, content: list[dict[str, Any]]) -> list[Row]:
    try:
        found = [row for raw in content if (row := _row(raw))]
    except (ValueError, TypeError, OverflowError) as e:
        raise _strange(path, e) from None
    if not found:
        raise UsageError(f"{path} does not hold rows of bench, simulate or eval; -o json, jsonl or csv writes them.")
    return found


def _strange(path: Path, e: Exception) -> UsageError:
    return UsageError(f"{path} does not hold rows of bench, simulate or eval ({e}).")


def _read(path: Path) -> list[dict[str, Any]]:
    """What a json, jsonl or csv file holds: rows, and perhaps a header. Raises UsageError when it is none of them."""
    try:
        raws = _raw_rows(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, csv.Error, RecursionError) as e:
        raise _strange(path, e) from None
    if not all(isinstance(raw, dict) for raw in raws):
        raise _strange(path, TypeError("no names of fields"))
    return raws


def _raw_rows(text: str) -> list[dict[str, Any]]:
    if not text.lstrip().startswith(("[", "{")):
        return [{k: v for k, v in line.items() if v != ""} for line in csv.DictReader(text.splitlines())]
    try:
        content = json.loads(text)
        return content if isinstance(content, list) else [content]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _row(raw: dict[str, Any]) -> Row | None:
    kind = next((kind for kind, field in _MIB_FIELDS.items() if raw.get(field) is not None), "")
    if not kind or raw.get("routing") is None or raw.get("layer") is not None or raw.get("n_gen") in (0, "0"):
        return None  # a header, a control of bench, one layer, a prompt
    values = {field: float(raw[field]) for field in (*(f for f, _, _ in _QUALITY), "ts") if raw.get(field) is not None}
    return Row(
        model=str(raw.get("model", "")),
        routing=str(raw["routing"]),
        eviction=str(raw.get("eviction", "")),
        budget=str(raw.get("budget", "")),
        budget_experts=int(raw.get("budget_experts", 0)),
        miss_rate=float(raw.get("miss_rate", "nan")),
        mib_per_token=float(raw[_MIB_FIELDS[kind]]),
        mib_kind=kind,
        shuffled=str(raw.get("shuffled")) == "True",
        **values,
    )


def _value(row: Row, field: str) -> float | None:
    value: float | None = getattr(row, field)
    return value


# ---- rows -----------------------------------------------------------------------------------------


def _qualities(rows: Sequence[Row]) -> tuple[list[tuple[Row, float]], str, str]:
    """(rows with their quality, its label, a note on the rows that are left out)."""
    known = [(f, label, read) for f, label, read in _QUALITY if any(_value(row, f) is not None for row in rows)]
    if not known:
        raise UsageError("These rows have no quality; rows of simulate or eval have one, and --kind misses shows these.")
    field, label, read = known[0]
    points = [(row, read(value)) for row in rows if (value := _value(row, field)) is not None]
    left = len(rows) - len(points)
    return points, label, f"{left} rows without {field} are left out." if left else ""


def _frontier(rows: Sequence[Row]) -> Chart:
    kinds = {row.mib_kind for row in rows}
    if len(kinds) > 1:
        raise UsageError(
            "Some rows have MiB missed (simulate, eval, frontier) and others MiB read from the device (bench); plot them apart."
        )
    kind = kinds.pop()
    points, label, note = _qualities(rows)
    points.sort(key=lambda p: (p[0].mib_per_token, p[1]))
    # no other row has fewer MiB and loses less
    best = {id(row) for i, (row, y) in enumerate(points) if all(y < before for _, before in points[:i])}
    cells = [["budget", "routing", "eviction", f"{kind} MiB/token", label, "best"]]
    for row, y in points:
        cells.append([row.budget, _name(row), row.eviction, f"{row.mib_per_token:.3f}", f"{y:.3f}", "*" * (id(row) in best)])
    return Chart(cells, _curves([(row, row.mib_per_token, y) for row, y in points], f"MiB {kind} per token", label), note)


def _speed(rows: Sequence[Row]) -> Chart:
    found, label, _ = _qualities(rows)
    points = [(row, row.ts, y) for row, y in found if row.ts is not None]
    if not points:
        raise UsageError("These rows have no tok/s; `cacheroute frontier --io auto` with one worker measures it.")
    points.sort(key=lambda p: p[1])
    cells = [["budget", "strategy", "eviction", *(f"{label} at {s:g} x original's tok/s" for s in _SPEEDUPS)]]
    groups = sorted({(r.budget_experts, r.budget, r.strategy, r.eviction) for r, _, _ in points if r.strategy != "original"})
    for experts, budget, strategy, eviction in groups:
        same = [p for p in points if (p[0].budget_experts, p[0].eviction) == (experts, eviction)]
        base = next((p for p in same if p[0].strategy == "original"), None)
        own = [p for p in same if p[0].strategy == strategy]
        losses = [_at(s, base, own) if base else None for s in _SPEEDUPS]
        cells.append([budget, strategy, eviction, *("-" if loss is None else f"{loss:.3f}" for loss in losses)])
    left = len(rows) - len(points)
    return Chart(cells, _curves(points, "tok/s", label), f"{left} rows without tok/s are left out." if left else "")


def _at(speedup: float, base: tuple[Row, float, float], own: Sequence[tuple[Row, float, float]]) -> float | None:
    """The least quality loss at a speed-up over `base`, between points by interpolation; None where no point is as fast."""
    wanted = speedup * base[1]
    curve = [base, *own]
    reached = [y for _, ts, y in own if ts >= wanted]
    for (_, slow, a), (_, fast, b) in itertools.permutations(curve, 2):
        if slow < wanted < fast:
            reached.append(a + (b - a) * (wanted - slow) / (fast - slow))
    return min(reached, default=None)


def _curves(points: Sequence[tuple[Row, float, float]], x_label: str, y_label: str) -> Callable[[Figure], None]:
    """Draws (row, x, y), a line for each strategy, eviction and budget, that begins at `original`."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        budgets = sorted({(row.budget_experts, row.budget) for row, _, _ in points})
        series = sorted({(row.strategy, row.eviction, row.shuffled) for row, _, _ in points})
        pairs = itertools.product(enumerate(series), enumerate(budgets))
        for (colour, (strategy, eviction, shuffled)), (mark, (_, budget)) in pairs:
            group = [p for p in points if (p[0].eviction, p[0].shuffled, p[0].budget) == (eviction, shuffled, budget)]
            own = [p for p in group if p[0].strategy == strategy]
            if not own:
                continue
            line = [(x, y) for r, x, y in group if r.strategy in (strategy, "original")]
            axes.plot(*zip(*line, strict=True), "-", color=f"C{colour}", linewidth=1)  # from `original` on
            name = f"{strategy} {eviction} {budget}" + " shuffled" * shuffled
            xs, ys = zip(*((x, y) for _, x, y in own), strict=True)
            axes.plot(xs, ys, _MARKERS[mark % len(_MARKERS)], color=f"C{colour}", markersize=5, label=name)
            for row, x, y in own:
                axes.annotate(row.routing.partition(":")[2], (x, y), fontsize=5, alpha=0.7)
        _finish(axes, x_label, y_label, points[0][0].model)

    return draw


def _misses(rows: Sequence[Row]) -> Chart:
    series = list(dict.fromkeys((_name(row), row.eviction) for row in rows))
    budgets = sorted({row.budget_experts for row in rows})
    rate = {(_name(row), row.eviction, row.budget_experts): 100 * row.miss_rate for row in rows}
    cells = [["routing", "eviction", *(f"{b} experts" for b in budgets)]]
    for name, eviction in series:
        values = [rate.get((name, eviction, b)) for b in budgets]
        cells.append([name, eviction, *("" if v is None else f"{v:.1f}%" for v in values)])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, eviction in series:
            own = [b for b in budgets if (name, eviction, b) in rate]
            style = "k--" if eviction == "belady" else "o-"
            axes.plot(own, [rate[name, eviction, b] for b in own], style, markersize=4, label=f"{name} {eviction}")
        _finish(axes, "experts per layer in memory", "miss rate, %", rows[0].model)
        axes.set_ylim(bottom=0)

    return Chart(cells, draw)


def _name(row: Row) -> str:
    return row.routing + (" (shuffled)" if row.shuffled else "")


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.figure.legend(fontsize=7, loc="outside right upper")


# ---- traces ---------------------------------------------------------------------------------------


def _residency(trace: Trace, layer: int | None) -> Chart:
    """One layer of the first sequence: 0 absent, 1 resident, 2 resident and used, 3 read from flash."""
    h = trace.header
    index = len(h.layers) // 2 if layer is None else h.layers.index(layer) if layer in h.layers else -1
    if index < 0:
        raise UsageError(f"The trace has no layer {layer}; it has {h.layers[0]}..{h.layers[-1]}.")
    first = trace.records[trace.records["sequence"] == trace.records["sequence"][0]]
    state = _states(first[first["layer"] == index], h.n_expert, h.n_used)

    def draw(figure: Figure) -> None:
        from matplotlib.colors import ListedColormap

        axes = figure.subplots()
        colours = ListedColormap(["white", "#c6dbef", "#2171b5", "#e6550d"])
        image = axes.imshow(state.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=-0.5, vmax=3.5, origin="lower")
        bar = figure.colorbar(image, ax=axes, ticks=range(4))
        bar.ax.set_yticklabels(["absent", "resident", "used", "read"])
        axes.set_xlabel("token")
        axes.set_ylabel("expert")
        cache = f"{h.eviction}, {h.budget_experts} of {h.n_expert} experts"
        axes.set_title(f"{h.model}, layer {h.layers[index]}, {h.routing}, {cache}")

    return Chart(_per_layer(trace), draw)


def _layers(trace: Trace) -> Chart:
    h = trace.header
    share = _use(trace)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(100 * share, aspect="auto", interpolation="nearest", cmap="viridis", origin="lower")
        figure.colorbar(image, ax=axes, label="tokens that use it, %")
        axes.set_yticks(range(0, len(h.layers), max(len(h.layers) // 16, 1)))
        axes.set_yticklabels([str(i) for i in h.layers[:: max(len(h.layers) // 16, 1)]])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_title(f"{h.model}, {h.routing}")

    return Chart(_per_layer(trace), draw)


def _states(records: trace_file.Records, n_expert: int, n_used: int) -> npt.NDArray[np.int8]:
    """[n_events, E]: 0 absent, 1 resident, 2 resident and used, 3 used and not resident."""
    state = np.unpackbits(records["resident"], axis=1, count=n_expert, bitorder="little").astype(np.int8)
    event, slot = np.nonzero(np.arange(n_used) < records["n_run"][:, None])
    expert = records["ids"][event, slot]
    state[event, expert] = np.where(state[event, expert] > 0, 2, 3)
    return state


def _use(trace: Trace) -> npt.NDArray[np.float64]:
    """[layers, E]: share of the tokens that use an expert."""
    h, records = trace.header, trace.records
    share = np.zeros((len(h.layers), h.n_expert))
    for i in range(len(h.layers)):
        own = records[records["layer"] == i]
        ran = np.arange(h.n_used) < own["n_run"][:, None]
        share[i] = np.bincount(own["ids"][ran], minlength=h.n_expert) / max(len(own), 1)
    return share


def _per_layer(trace: Trace) -> list[list[str]]:
    h, share = trace.header, _use(trace)
    cells = [["layer", "decoded tokens", "miss", "experts used", "half of all uses by", "resident"]]
    for i, layer in enumerate(h.layers):
        own = trace.records[(trace.records["layer"] == i) & (trace.records["flags"] & DECODE > 0)]
        state = _states(own, h.n_expert, h.n_used)
        used, missed = int((state >= 2).sum()), int((state == 3).sum())
        ranked = np.sort(share[i])[::-1].cumsum()
        half = int(np.searchsorted(ranked, ranked[-1] / 2)) + 1
        held = float(((state == 1) | (state == 2)).sum(axis=1).mean()) if len(own) else 0.0
        miss = f"{100 * missed / used:.1f}%" if used else ""
        cells.append([str(layer), str(len(own)), miss, str(int((share[i] > 0).sum())), str(half), f"{held:.1f}"])
    return cells
