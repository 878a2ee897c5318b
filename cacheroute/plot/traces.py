"""Figures of a trace: the cache of one layer token by token, and how often each expert of each layer runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cacheroute.errors import UsageError
from cacheroute.plot import style, words
from cacheroute.plot.chart import Chart
from cacheroute.trace import trace_file
from cacheroute.trace.trace_file import DECODE, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TOKENS = 400  # a token of less than two pixels would be drawn or left out by chance
_STATES = (
    ("not in memory", "#ffffff"),
    ("in memory", "#c9ddf0"),
    ("in memory and used", "#5b9bd0"),
    ("used, had to be read", "#67000d"),
)
"""Name and colour of each state; from light to dark, so that they are told apart in grey."""


def residency(trace: Trace, layer: int | None) -> Chart:
    """One layer of the first sequence, its first tokens. Raises UsageError for a layer that the trace does not have."""
    h = trace.header
    index = len(h.layers) // 2 if layer is None else h.layers.index(layer) if layer in h.layers else -1
    if index < 0:
        raise UsageError(f"The trace has no layer {layer}; it has {h.layers[0]}..{h.layers[-1]}.")
    first = trace.records[trace.records["sequence"] == trace.records["sequence"][0]]
    whole = states(first[first["layer"] == index], h.n_expert, h.n_used)
    state = whole[:_MOST_TOKENS]
    routing = ", ".join(part for part in (words.routing(h.routing), words.eviction(h.eviction)) if part)
    title = f"{h.model}, layer {h.layers[index]}: {h.budget_experts} of {h.n_expert} experts in memory\n{routing}"

    def draw(figure: Figure) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        axes = figure.subplots()
        colours = ListedColormap([colour for _, colour in _STATES])
        axes.imshow(state.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=-0.5, vmax=3.5, origin="lower")
        axes.set_xlabel("token" if len(state) == len(whole) else f"token (the first {len(state)} of {len(whole)})")
        axes.set_ylabel("expert")
        axes.set_title(title)
        patches = [Patch(facecolor=colour, edgecolor="black", linewidth=0.5) for _, colour in _STATES]
        style.legend(figure, patches, [name for name, _ in _STATES])

    used, missed = int((state >= 2).sum()), int((state == 3).sum())
    alt = (
        f"Which of the {h.n_expert} experts of layer {h.layers[index]} are in memory at each of {len(state)} tokens, {h.model}, "
        f"{routing}: {100 * missed / max(used, 1):.0f}% of those used had to be read."
    )
    return Chart(per_layer(trace), draw, alt)


def layers(trace: Trace) -> Chart:
    """How often each expert of each layer runs, over all sequences."""
    h = trace.header
    share = use(trace)
    average = 100 * h.n_used / h.n_expert

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(100 * share, aspect="auto", interpolation="nearest", cmap="viridis", origin="lower")
        figure.colorbar(image, ax=axes, label=f"tokens that use the expert, %  (on average {average:.3g})")
        step = max(len(h.layers) // 16, 1)
        axes.set_yticks(range(0, len(h.layers), step))
        axes.set_yticklabels([str(i) for i in h.layers[::step]])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_title(f"{h.model}, {words.routing(h.routing)}")

    layer, expert = np.unravel_index(int(share.argmax()), share.shape)
    alt = (
        f"How many of the tokens use each of {h.n_expert} experts in {len(h.layers)} layers of {h.model}, on average "
        f"{average:.3g}%: most use expert {expert} of layer {h.layers[int(layer)]}, {100 * share.max():.0f}%."
    )
    return Chart(per_layer(trace), draw, alt)


def states(records: trace_file.Records, n_expert: int, n_used: int) -> npt.NDArray[np.int8]:
    """[n_events, E]: 0 absent, 1 resident, 2 resident and used, 3 used and not resident."""
    state = np.unpackbits(records["resident"], axis=1, count=n_expert, bitorder="little").astype(np.int8)
    event, slot = np.nonzero(np.arange(n_used) < records["n_run"][:, None])
    expert = records["ids"][event, slot]
    state[event, expert] = np.where(state[event, expert] > 0, 2, 3)
    return state


def use(trace: Trace) -> npt.NDArray[np.float64]:
    """[layers, E]: share of the tokens that use an expert."""
    h, records = trace.header, trace.records
    share = np.zeros((len(h.layers), h.n_expert))
    for i in range(len(h.layers)):
        own = records[records["layer"] == i]
        ran = np.arange(h.n_used) < own["n_run"][:, None]
        share[i] = np.bincount(own["ids"][ran], minlength=h.n_expert) / max(len(own), 1)
    return share


def per_layer(trace: Trace) -> list[list[str]]:
    """The table of a trace: a row for each layer."""
    h, share = trace.header, use(trace)
    cells = [["layer", "decoded tokens", "miss", "experts used", "half of all uses by", "resident"]]
    for i, layer in enumerate(h.layers):
        own = trace.records[(trace.records["layer"] == i) & (trace.records["flags"] & DECODE > 0)]
        state = states(own, h.n_expert, h.n_used)
        used, missed = int((state >= 2).sum()), int((state == 3).sum())
        ranked = np.sort(share[i])[::-1].cumsum()
        half = int(np.searchsorted(ranked, ranked[-1] / 2)) + 1
        held = float(((state == 1) | (state == 2)).sum(axis=1).mean()) if len(own) else 0.0
        miss = f"{100 * missed / used:.1f}%" if used else ""
        cells.append([str(layer), str(len(own)), miss, str(int((share[i] > 0).sum())), str(half), f"{held:.1f}"])
    return cells
