"""Every strategy on a trace of held-out text, with its time-shuffled control, and the evictions compared.

    python scripts/strategy_table.py [TRACE ...]

Without a trace, 4,096 tokens of the held-out text are traced with the demo model first. The first trace gives the table; the
evictions are compared on all of them, so that the default is not chosen by one model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from cacheroute.cli.table import as_markdown
from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import Routing, parse
from cacheroute.trace import simulate, trace_file

BUDGETS = ("25%", "50%", "75%")


def routings(n_expert: int, n_used: int) -> list[Routing]:
    """A mild and a strong setting of each strategy, for a model with E = `n_expert`, K = `n_used`."""
    k, e = n_used, n_expert
    texts = ["original"]
    texts += [f"pruning:k={n}" for n in (k - 1, k - k // 4) if 0 < n < k]
    texts += [f"max-rank:m={min(m, e)}" for m in (k + k // 4 + 1, 2 * k)]
    texts += ["cumsum:p=0.5", "cumsum:p=0.7"]
    texts += [f"cache-prior:lambda={x}" for x in (0.05, 0.1, 0.2, 0.4)]
    texts += ["cache-prior:lambda=0.4:max-loss=0.02", f"max-rank:m={min(2 * k, e)}:max-loss=0.02"]
    texts += ["drop-cold:f=0.9", "drop-cold:f=0.95"]
    return [parse(text) for text in dict.fromkeys(texts)]


def strategies(read: trace_file.Trace) -> list[list[str]]:
    """Rows of all strategies at BUDGETS: misses, missed MiB/token, lost mass; then belady, then the shuffled control."""
    plain, control = simulate.Replay(read), simulate.Replay(read, shuffle=0)
    arms: list[tuple[simulate.Replay, Routing, str]] = [
        (plain, r, evictions.DEFAULT) for r in routings(read.header.n_expert, read.header.n_used)
    ]
    arms += [(plain, parse("original"), e) for e in ("lru", evictions.BELADY)]
    arms += [(control, parse(r), evictions.DEFAULT) for r in ("original", "cache-prior:lambda=0.2")]
    cells = [["routing", "eviction", *(f"{b}: {what}" for b in BUDGETS for what in ("miss", "missed MiB/token", "lost mass"))]]
    for replay, routing, eviction in arms:
        row = [str(routing) + (" (shuffled)" if replay.shuffled else ""), eviction]
        for budget in BUDGETS:
            got = replay.run(simulate.Arm(budget, routing, eviction))[0]
            row += [f"{100 * got.miss_rate:.1f}%", f"{got.missed_mib_per_token:.2f}", f"{100 * got.lost_mass:.2f}%"]
        cells.append(row)
    return cells


def eviction_table(reads: list[trace_file.Trace]) -> list[list[str]]:
    """Miss rates of every eviction on every trace, `original` and cache-prior."""
    cells = [["model", "routing", "budget", *evictions.ALL]]
    for read in reads:
        replay = simulate.Replay(read)
        for name in ("original", "cache-prior:lambda=0.1"):
            for budget in BUDGETS:
                rates = []
                for eviction in evictions.ALL:
                    if name != "original" and eviction == evictions.BELADY:
                        rates.append("")
                        continue
                    got = replay.run(simulate.Arm(budget, parse(name), eviction))[0]
                    rates.append(f"{100 * got.miss_rate:.2f}%")
                cells.append([read.header.model, name, budget, *rates])
    return cells


def main() -> None:
    """Prints Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(a) for a in sys.argv[1:]]
        if not files:
            files = [Path(folder) / "demo.trace"]
            command = [sys.executable, "-m", "cacheroute", "trace", "--max-tokens", "4096", "-c", "1024", "--io", "none"]
            subprocess.run([*command, "-o", str(files[0])], check=True)
        reads = [trace_file.read(file) for file in files]
        h, first = reads[0].header, reads[0].records
        tokens = int(((first["layer"] == 0) & (first["flags"] & trace_file.DECODE > 0)).sum())
        print(f"{h.model}: {len(h.layers)} layers, E = {h.n_expert}, K = {h.n_used}; {tokens} tokens decoded, open-loop.\n")
        print(as_markdown(strategies(reads[0])))
        print("\nMisses of the evictions; belady is the offline optimum of `original`.\n")
        print(as_markdown(eviction_table(reads)))


if __name__ == "__main__":
    main()
