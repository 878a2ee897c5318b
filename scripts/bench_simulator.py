"""How fast the simulator replays: (token, layer) events a minute on one core, E = 64, K = 8, every strategy and eviction.

    python scripts/bench_simulator.py [EVENTS]

The goal is 2 million a minute. Scores are a random walk, so that the cache hits about as often as on a model's trace.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import parse
from cacheroute.trace import simulate, trace_file

N_EXPERT, N_USED, N_LAYERS = 64, 8, 4
ROUTINGS = (
    "original",
    "pruning:k=6",
    "max-rank:m=16",
    "cumsum:p=0.7",
    "cache-prior:lambda=0.2",
    "cache-prior:lambda=0.2:max-loss=0.02",
    "drop-cold:f=0.5",
)


def made_up(n_events: int) -> trace_file.Trace:
    """A trace of `n_events` decoded (token, layer) events."""
    rng = np.random.default_rng(0)
    records = np.zeros(n_events, trace_file.record_dtype(N_EXPERT, N_USED, mass=False))
    records["token"], records["layer"] = np.divmod(np.arange(n_events), N_LAYERS)
    records["flags"] = trace_file.DECODE | trace_file.SOFTMAX_MASS
    habit = np.zeros((N_LAYERS, N_EXPERT))
    for t in range(n_events // N_LAYERS):
        habit = 0.95 * habit + rng.normal(0, 0.5, habit.shape)
        records["z"][t * N_LAYERS : (t + 1) * N_LAYERS] = habit - habit.max(axis=1, keepdims=True)
    layers = tuple(range(N_LAYERS))
    header = trace_file.Header("made up", "none", N_EXPERT, N_USED, layers, (1 << 20,) * N_LAYERS, "original", "lru", N_USED)
    return trace_file.Trace(header, records, complete=True)


def main() -> None:
    """Prints a table; CPU time, so that what else runs on the machine does not count."""
    n_events = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    replay = simulate.Replay(made_up(n_events))
    print(f"{n_events} events, E = {N_EXPERT}, K = {N_USED}, C = 50%\n")
    print("| routing | eviction | million events/min | miss |\n|---|---|---|---|")
    for routing in ROUTINGS:
        for eviction in evictions.ALL if routing == "original" else ("lru", evictions.DEFAULT):
            start = time.process_time()
            row = replay.run(simulate.Arm("50%", parse(routing), eviction))[0]
            rate = n_events / (time.process_time() - start) * 60 / 1e6
            print(f"| {routing} | {eviction} | {rate:.1f} | {100 * row.miss_rate:.1f}% |", flush=True)


if __name__ == "__main__":
    main()
