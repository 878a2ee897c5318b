"""Would budgets that differ by layer, under one total, read less than the same share everywhere? A study on a trace.

    python scripts/study_layer_budgets.py TRACE [ROUTING ...]

Experts of memory are given one at a time to the layer whose misses fall most by it, on the first half of the trace's sequences;
the shares found are judged on the second half. Open-loop. Prints Markdown.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cacheroute.cli.table import as_markdown
from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import Routing, parse
from cacheroute.trace import simulate, trace_file

SHARES = (0.35, 0.5, 0.75)


def misses(read: trace_file.Trace, routing: Routing) -> npt.NDArray[np.int64]:
    """[E - K + 1, layer]: misses of each layer at a budget of K, K + 1 ... E experts."""
    replay, h = simulate.Replay(read), read.header
    rows = []
    for capacity in range(h.n_used, h.n_expert + 1):
        _, *layers = replay.run(simulate.Arm(str(capacity), routing, evictions.DEFAULT), per_layer=True)
        rows.append([row.misses for row in layers])
    return np.array(rows)


def allocate(curve: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Indices into the rows of `curve`, one a layer, that sum to `total`: greedy on the convex hull's gain per expert.

    A layer takes the step of any length that gains most per expert, or a flat stretch would hide the gain behind it.
    """
    at = np.zeros(curve.shape[1], dtype=np.int64)
    left = total
    while left > 0:
        best = (-1.0, 0, 0)
        for layer, i in enumerate(at):
            gains = (curve[i, layer] - curve[i + 1 : i + 1 + left, layer]) / np.arange(1, len(curve[i + 1 : i + 1 + left]) + 1)
            if len(gains):
                step = int(gains.argmax())
                best = max(best, (float(gains[step]), layer, step + 1))
        if not best[2]:
            break
        at[best[1]] += best[2]
        left -= best[2]
    return at


def main() -> None:
    read = trace_file.read(Path(sys.argv[1]))
    h = read.header
    sequences = np.unique(read.records["sequence"])
    if len(sequences) < 2:
        sys.exit("study_layer_budgets.py: the trace has one sequence; one half must judge what the other found.")
    first = np.isin(read.records["sequence"], sequences[: len(sequences) // 2])
    halves = [replace(read, records=read.records[part]) for part in (first, ~first)]
    cells = [["routing", "budget", "misses, by layer against alike", "experts of the layers"]]
    for routing in map(parse, sys.argv[2:] or ("original", "cache-prior:lambda=0.1")):
        fit, judged = (misses(half, routing) for half in halves)
        layers = np.arange(fit.shape[1])
        for share in SHARES:
            alike = round(share * h.n_expert) - h.n_used
            at = allocate(fit, alike * len(layers))
            change = judged[at, layers].sum() / judged[alike].sum() - 1
            cells.append([str(routing), f"{share:.0%}", f"{100 * change:+.1f}%", f"{at.min() + h.n_used}..{at.max() + h.n_used}"])
    print(as_markdown(cells))


if __name__ == "__main__":
    main()
