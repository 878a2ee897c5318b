"""What reading experts costs: processor time for every 100 MB, and MB/s, of `direct` and `buffered`.

`python scripts/bench_store.py -m MODEL [--budget 50%] [--seconds 2] [-r 5] [--flash-mbps N]` exchanges random experts of random
layers, as many at a time as one token misses (--misses), nothing computing beside it. Ways of reading alternate within each
repetition; the budget is full when the clock starts, so that every read has its eviction. Processor time is that of the whole
process, user and system: the readers', the caller's, and what the kernel does for them (not its own threads). MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

from cacheroute import Llama
from cacheroute.cli import options


def measure(llm: Llama, n_misses: int, seconds: float, seed: int) -> dict[str, float]:
    """Exchanges for so many seconds, from a full budget."""
    order, n_layers = random.Random(seed), len(llm.layout.layers)
    held = [list(range(llm.budget.capacity)) for _ in range(n_layers)]
    for layer, experts in enumerate(held):
        llm.load_experts(layer, experts)
    before, cpu, start = llm.stats().prefill, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        layer = order.randrange(n_layers)
        absent = [e for e in range(llm.layout.n_expert) if e not in held[layer]]
        new = order.sample(absent, min(n_misses, len(absent)))
        llm.load_experts(layer, new)
        held[layer] = [*held[layer][len(new) :], *new]
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    megabytes = (llm.stats().prefill - before).read_bytes / 1e6
    resident = llm.measure_resident()
    return {
        "cpu_ms_per_100mb": 1e5 * cpu / megabytes,
        "mb_per_s": megabytes / wall,
        "resident_mib": float("nan") if resident is None else resident / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--misses", type=int, default=2, help="experts of one exchange (default: 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of every run (default: 2)")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--io", default="direct,buffered", help="ways of reading, separated by commas")
    parser.add_argument("--flash-mbps", type=float, help="pace reads to a slower flash")
    args = parser.parse_args()
    llm = Llama(args.model, budget=args.budget, n_ctx=64, flash_mbps=args.flash_mbps, verbose=False)
    runs: dict[str, list[dict[str, float]]] = {io: [] for io in options.names(args.io)}
    for i in range(args.repetitions):
        for io in list(runs) if i % 2 else reversed(runs):
            llm.configure(budget=args.budget, eviction="lru", io=io)  # measure() knows who is evicted
            runs[io].append(measure(llm, args.misses, args.seconds, seed=i))
    expert_mib = llm.layout.layers[0].expert_bytes / 2**20
    for io, own in runs.items():
        row: dict[str, object] = {"io": io, "n_expert": llm.layout.n_expert, "expert_mib": round(expert_mib, 3)}
        for name in own[0]:
            values = [run[name] for run in own]
            row[name], row[f"{name}_sd"] = statistics.median(values), statistics.stdev(values) if len(values) > 1 else 0.0
        row["budget_mib"] = llm.budget.nbytes / 2**20
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}))
    llm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
