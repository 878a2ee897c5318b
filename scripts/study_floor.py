"""What share of the floor could be reached, if experts were read ahead and no guess were ever wrong?

    python scripts/study_floor.py --layer-ms 1.85 --experts-ms 1.2 --head-ms 10 --expert-mib 2.53 --layers 8,48

Scores are those of `bench --replay synthetic`, routed and cached by the C++ router. A token is its layers, one after the other,
and the head. A layer takes --layer-ms, of which its K experts take --experts-ms, and chooses before them. It computes on the
experts that are there while the others are read, and on those as they come. The device reads one expert after the other in the
order in which they were asked for: with 0 layers ahead, when their layer chooses; with d, when the layer d before it does, or a
token's first one. Nothing else is read ahead. The floor is max(compute, bytes missed / bandwidth), as in bench.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cacheroute.cli.table import as_markdown
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing.strategies import parse_list
from cacheroute.trace import forced_scores, simulate, trace_file

AHEAD = (0, 1, 2, 4)
BUDGETS = ("25%", "50%")
GB_PER_S = (0.5, 1.0, 2.0)
ARMS = (("original", "lru"), ("cache-prior:lambda=0.2", "soft-lfu"))
N_TOKENS = 400
WARM = 100  # tokens that are not judged: caches fill

Counts = npt.NDArray[np.int64]


def synthetic(n_layers: int, n_expert: int, n_used: int) -> simulate.Replay:
    """A trace of decoded tokens with synthetic scores."""
    shape = SimpleNamespace(layers=range(n_layers), n_expert=n_expert, n_used=n_used)
    scores = forced_scores.bind(forced_scores.parse(forced_scores.SYNTHETIC), cast(ExpertLayout, shape), 0, N_TOKENS)
    records: Any = np.zeros((N_TOKENS, n_layers), trace_file.record_dtype(n_expert, n_used, mass=False))
    records["token"], records["layer"] = np.ogrid[:N_TOKENS, :n_layers]
    records["flags"], records["n_run"] = trace_file.DECODE | trace_file.SOFTMAX_MASS, n_used
    records["z"] = np.stack(scores.z, axis=1)
    layers = tuple(range(n_layers))
    header = trace_file.Header("synthetic", "", n_expert, n_used, layers, (1,) * n_layers, "original", "lru", n_expert)
    return simulate.Replay(trace_file.Trace(header, records.reshape(-1), True))


def misses(scores: simulate.Replay, arm: simulate.Arm) -> Counts:
    """[tokens, layers]. An expert that was missed is in the cache after its token, and was not before."""
    before = [scores.resident(arm, 0, layer) for layer in range(len(scores.header.layers))]
    return np.stack([(held[1:] & ~held[:-1]).sum(axis=1) for held in before], axis=1)


def seconds(missed: Counts, ahead: int, a: argparse.Namespace, expert_ms: float) -> float:
    """Of a token, the mean over those after the first WARM."""
    n_layers, each = missed.shape[1], a.experts_ms / a.used
    now = idle_from = judged_from = 0.0
    for t, row in enumerate(missed):
        if t == WARM:
            judged_from = now
        there: list[npt.NDArray[np.float64]] = []
        for layer in range(n_layers):
            now += a.layer_ms - a.experts_ms
            for n in row[len(there) : layer + ahead + 1]:
                there.append(max(idle_from, now) + expert_ms * np.arange(1, n + 1))
                idle_from = max(there[-1].max(initial=0.0), idle_from)
            now += each * (a.used - row[layer])
            for at in there[layer]:
                now = max(now, at) + each
        now += a.head_ms
    return float((now - judged_from) / (len(missed) - WARM) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer-ms", type=float, required=True, help="a layer with everything resident")
    parser.add_argument("--experts-ms", type=float, required=True, help="of that, its experts")
    parser.add_argument("--head-ms", type=float, required=True, help="what a token takes beside its layers")
    parser.add_argument("--expert-mib", type=float, required=True)
    parser.add_argument("--layers", default="8", help="numbers of layers, separated by commas")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--used", type=int, default=8)
    a = parser.parse_args()
    cells = [["layers", "budget", "routing, eviction", "GB/s", "misses/token", *(f"{d} ahead" for d in AHEAD)]]
    for n_layers in map(int, a.layers.split(",")):
        scores = synthetic(n_layers, a.experts, a.used)
        compute = (n_layers * a.layer_ms + a.head_ms) / 1000
        for budget in BUDGETS:
            for routing, eviction in ARMS:
                missed = misses(scores, *simulate.arms([budget], parse_list(routing), [eviction]))
                per_token = missed[WARM:].sum(axis=1).mean()
                for rate in GB_PER_S:
                    expert = a.expert_mib * 2**20 / (rate * 1e9)
                    floor = max(compute, per_token * expert)
                    shares = [floor / seconds(missed, d, a, 1000 * expert) for d in AHEAD]
                    row = [str(n_layers), budget, f"{routing}, {eviction}", f"{rate:g}", f"{per_token:.1f}"]
                    cells.append([*row, *(f"{100 * share:.0f}%" for share in shares)])
    print(as_markdown(cells))


if __name__ == "__main__":
    main()
