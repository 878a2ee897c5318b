"""Which figure shows some files: results of bench, simulate, eval and frontier, or a trace. As PNG, SVG, or a table.

Rows are read by the names of their fields; matplotlib is imported only to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacheroute.errors import UsageError
from cacheroute.files import check_regular, unreadable
from cacheroute.plot import bench_bars, copies, curves, misses, rows, traces
from cacheroute.plot.chart import Chart
from cacheroute.trace import trace_file

KINDS = {
    "frontier": "quality, or lost router mass, against MiB missed or read per token",
    "speed": "quality against tok/s, and what each strategy loses at the same speed (of `frontier --io auto`)",
    "files": "KL against forecast speed, several files in equal memory, with the Pareto front (of `frontier --files`)",
    "bench": "tok/s of every arm with its spread and its floor, in groups of the same model, budget and reading (of bench)",
    "misses": "miss rate against the budget",
    "residency": "which experts of one layer are in the cache, token by token (of a trace)",
    "layers": "how often each expert of each layer runs (of a trace)",
}
_OF_TRACES = ("residency", "layers")


def chart(files: Sequence[Path], kind: str = "", layer: int | None = None) -> Chart:
    """The figure of some files: rows together, or one trace. `kind` "": the first of KINDS that the files can show.

    Raises UsageError for files that cannot be read or do not have what the kind needs.
    """
    if kind and kind not in KINDS:
        raise UsageError(f"There is no plot {kind!r}; there are {', '.join(KINDS)}.")
    are_traces = [_is_trace(path) for path in files]
    if layer is not None and not (any(are_traces) and kind in ("", "residency")):
        raise UsageError("--layer is of --kind residency, which shows one layer of a trace; leave it out.")
    if any(are_traces):
        if len(files) > 1:
            raise UsageError("A trace is plotted alone; give one file.")
        if kind and kind not in _OF_TRACES:
            raise UsageError(f"A trace has no {kind} of its own; `cacheroute simulate` makes the rows of one.")
        trace = trace_file.read(files[0])
        return traces.layers(trace) if kind == "layers" else traces.residency(trace, layer)
    if kind in _OF_TRACES:
        raise UsageError(f"{files[0]} is not a trace, which {kind} is of.")
    contents = [rows.latest(rows.read(path)) for path in files]
    raws = [raw for content in contents for raw in content]
    if kind == "bench" or (not kind and raws and all(bench_bars.is_row(raw) for raw in raws)):
        return bench_bars.bars(raws)
    if kind == "files" or (not kind and raws and any(copies.is_row(raw) for raw in raws)):
        return copies.chart(raws)
    found = [row for path, content in zip(files, contents, strict=True) for row in rows.of(path, content)]
    if kind == "misses" or (not kind and not curves.have_quality(found)):
        return misses.chart(found)
    chart = curves.speed(found) if kind == "speed" else curves.frontier(found)
    return replace(chart, note=" ".join(filter(None, (chart.note, _mixed(raws)))))


def _mixed(raws: Sequence[dict[str, Any]]) -> str:
    """A warning where scored rows are not of the same tokens: neither misses nor losses of one compare with those of another."""
    kinds = dict.fromkeys(
        (str(raw["text"]), str(raw["chunk"]), str(raw.get("n_tokens"))) for raw in raws if raw.keys() >= {"text", "chunk", "nll"}
    )
    if len(kinds) < 2:
        return ""
    each = "; ".join(f"{text}, {n} in chunks of {chunk}" for text, chunk, n in kinds)
    return f"These rows are not of the same tokens ({each}): compare each with its own only, and plot one at a time for marks."


def _is_trace(path: Path) -> bool:
    check_regular(path, "a file to plot")
    try:
        with path.open("rb") as f:
            return trace_file.FORMAT.encode() in f.read(64)
    except OSError as e:
        raise unreadable(path, e) from None
