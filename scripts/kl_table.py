"""Misses, KL and perplexity of any routings on the held-out text, paired with `original`.

    python scripts/kl_table.py --budget 25%,50% --limit 2000 speculate speculate:lambda=0.1 dynamic-k:p=0.6

`eval perplexity` with the KL(original || routed) beside it, which needs far fewer tokens for the same certainty. The speculated
experts of layers after the first are read while the layer before computes: `late` are the misses that are read when their own
layer chooses (not counted for `speculate` with a j). What is read early and not chosen then is no miss: `bench` has its bytes.
Scores are kept in the user's cache, so it can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from cacheroute.cli import interval, options, table
from cacheroute.evals import loading, paired, scorer
from cacheroute.evals.perplexity import miss_rate, missed_mib_per_token
from cacheroute.evals.runner import Cell
from cacheroute.model import catalogue
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing, parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routings", nargs="+")
    parser.add_argument("-m", "--model", help="a GGUF file or a name (default: demo)")
    parser.add_argument("-f", "--file", type=Path, help="the text (default: the held-out text of the package)")
    parser.add_argument("--budget", default="25%,50%")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--limit", type=int, default=2000, help="scored tokens")
    parser.add_argument("-t", "--threads", type=int)
    a = parser.parse_args()
    source = loading.Source(a.file, chunk=a.chunk, limit=a.limit)
    rows = [
        ["budget", "routing", "miss", "missed MiB/token", "late", "swapped", "dropped", "KL, millinats", "ppl change % [95%]"]
    ]
    with scorer.session(catalogue.resolve(a.model), source, threads=a.threads) as session:
        chunks = range(len(session.chunks))
        wanted = [
            (b, budgets.parse(b, session.llm.layout).capacity, parse(r)) for b in options.names(a.budget) for r in a.routings
        ]
        for chunk in chunks:  # in this order `original`, which the KL is taken from, is scored once a chunk
            for _, capacity, routing in wanted:
                session.cell(routing, capacity, DEFAULT, chunk, kl=True)
            print(f"{chunk + 1} of {len(chunks)}", file=sys.stderr, flush=True)
        for budget, capacity, routing in wanted:
            base, cells = (
                [session.cell(r, capacity, DEFAULT, i, kl=r is routing) for i in chunks] for r in (Routing("original"), routing)
            )
            rows.append([budget, str(routing), *_figures(base, cells, routing)])
        print(f"{session.llm.layout.model}, {len(chunks)} chunks, {sum(c.n_scored for c in session.chunks)} scored tokens\n")
    print(table.as_markdown(rows))


def _figures(base: list[Cell], cells: list[Cell], routing: Routing) -> list[str]:
    d = paired.compare([c.nll_sum for c in base], [c.nll_sum for c in cells], [c.n for c in cells])
    kl = 1e3 * np.array([c.kl.mean() for c in cells])
    missed = np.sum([c.misses for c in cells], axis=0)
    late = missed[0] if routing.speculates else missed.sum()
    examined = sum(c.examined for c in cells)
    return [
        f"{100 * miss_rate(cells):.1f}%",
        f"{missed_mib_per_token(cells):.2f}",
        "" if routing.parameters.get("j") and routing.speculates else f"{100 * late / sum(c.selected for c in cells):.1f}%",
        f"{100 * sum(sum(c.swapped) for c in cells) / examined:.1f}%",
        f"{100 * sum(c.dropped for c in cells) / examined:.1f}%",
        f"{kl.mean():.1f} ± {2 * kl.std(ddof=1) / len(kl) ** 0.5:.1f}",
        interval.ppl_change(d),
    ]


if __name__ == "__main__":
    main()
