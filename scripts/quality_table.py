"""The quality table of RESULTS.md: what every strategy saves at 0.5, 1 and 3% of perplexity, at budgets of 25, 50 and 75%.

    python scripts/quality_table.py                 all of it, on the demo model and the held-out text
    python scripts/quality_table.py --budget 50% --max-ppl-increase 1% --limit 5000

Every point is tuned as `cacheroute tune` does it (fit on two thirds of the chunks, figures from the third that took no part).
Scores are kept in the user's cache, so it can be stopped and resumed. Before the table: `original` against a batched pass of the
unhooked engine, scored by llama-perplexity's definition. After it: bytes missed at the same perplexity, per layer with the
default eviction against one lambda with LRU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cacheroute.cli import interval, options, table
from cacheroute.errors import CacherouteError
from cacheroute.evals import loading, paired, scorer, tune
from cacheroute.evals.perplexity import missed_mib_per_token
from cacheroute.evals.runner import Cell, Request
from cacheroute.evals.text import Chunk
from cacheroute.model import catalogue
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

# strategy, eviction, one value per layer
WAYS = (
    ("cache-prior", "lru", False),
    *((s, DEFAULT, False) for s in ("pruning", "drop-cold", "cumsum", "max-rank", "cache-prior")),
    ("cache-prior", DEFAULT, True),
)
MATCHED_LAMBDAS = (0.02, 0.05, 0.1, 0.14, 0.2, 0.3, 0.4)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a GGUF file or a name (default: demo)")
    parser.add_argument("-f", "--file", type=Path, help="the text (default: the held-out text of the package)")
    parser.add_argument("--budget", default="25%,50%,75%")
    parser.add_argument("--max-ppl-increase", default="0.5%,1%,3%")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--limit", type=int, default=34000, help="scored tokens (default: all of the held-out text)")
    parser.add_argument("--price-tokens", type=int, default=1024)
    parser.add_argument("--price-groups", type=int, default=15)
    parser.add_argument("--no-batch", action="store_true", help="leave out the comparison with a batched pass")
    parser.add_argument("--no-table", action="store_true", help="leave out the table")
    parser.add_argument("--no-match", action="store_true", help="leave out the bytes at the same perplexity")
    parser.add_argument("--kl", action="store_true", help="bytes at the same KL, too, which scores the cells again")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--workers", type=int, help="processes that score (default: one a thread, best for a small model)")
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    path = catalogue.resolve(a.model)
    source = loading.Source(a.file, chunk=a.chunk, limit=a.limit)
    n_workers = a.workers or options.threads(a.threads)
    with scorer.session(path, source, threads=a.threads, n_workers=n_workers, evictions=["lru", DEFAULT]) as session:
        session.after = print_progress
        show(path, session, a)


def show(path: Path, session: scorer.Scorer, a: argparse.Namespace) -> None:
    """Prints all that was asked for."""
    layout, chunks = session.llm.layout, session.chunks
    n_tokens = sum(c.n_scored for c in chunks)
    print(f"{layout.model}, {len(chunks)} chunks of {a.chunk}, {n_tokens} scored tokens\n", flush=True)
    if not a.no_batch:
        compare_with_batch(path, session, a.threads)
    fit, held_out = tune.split(len(chunks), seed=0)
    limits = [float(x.strip().rstrip("%")) for x in options.names(a.max_ppl_increase)]
    cells = [["budget", "limit", "routing", "eviction", "value", "ppl change % [95%]", "missed MiB/token", "of original, LRU"]]
    for budget in options.names(a.budget) if not a.no_table else ():
        capacity = budgets.parse(budget, layout).capacity
        lru = missed_mib_per_token(session.cells(Routing("original"), capacity, "lru", held_out))
        cells.append([budget, "", "original", "lru", "", "0", f"{lru:.2f}", "100%"])
        for strategy, eviction, per_layer in WAYS:
            for limit in limits:
                outcome = tune.Search(session, goal(a, capacity, limit, strategy, eviction, per_layer), fit, held_out).tune()
                cells.append([budget, f"{limit:g}%", *row(outcome, strategy, eviction, per_layer, lru)])
                print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    if not a.no_table:
        print(table.as_markdown(cells))
    if not a.no_match:
        for budget in options.names(a.budget):
            match(session, budgets.parse(budget, layout).capacity, budget, fit, held_out, a)


def print_progress(cell: Cell) -> None:
    if cell.chunk % 10 == 0:
        print(f"  scored {cell.routing[:60]} at {cell.budget} experts, {cell.eviction}", file=sys.stderr, flush=True)


def goal(
    a: argparse.Namespace,
    capacity: int,
    limit: float,
    strategy: str = "cache-prior",
    eviction: str = DEFAULT,
    per_layer: bool = True,
) -> tune.Goal:
    return tune.Goal(capacity, eviction, limit, not per_layer, strategy, a.price_tokens, a.price_groups)


def row(outcome: tune.Outcome, strategy: str, eviction: str, per_layer: bool, lru: float) -> list[str]:
    """The cells of one tuned point, figures of the held-out chunks."""
    name = strategy + (" per layer" if per_layer else "")
    if not outcome.validation:
        return [name, eviction, "nothing fits", "", "", ""]
    v = outcome.validation
    d = v.difference
    layers = [r.parameters["lambda"] for r in v.routing.layers]
    value = f"{min(layers):.2g}..{max(layers):.2g}" if layers else str(v.routing).partition(":")[2]
    return [
        name,
        eviction,
        value,
        interval.ppl_change(d),
        f"{v.missed_mib_per_token:.2f}",
        f"{100 * v.missed_mib_per_token / lru:.0f}%",
    ]


def compare_with_batch(path: Path, session: scorer.Scorer, threads: int | None) -> None:
    """`original`, stepped, against one batch per chunk of the unhooked engine (perplexity.cpp: the second half, mean nll)."""
    from cacheroute.engine.llama import Llama

    n = len(session.chunks[0].tokens)
    t = options.threads(threads)
    batched = Llama(
        str(path), routing=None, n_ctx=n, n_batch=n, n_ubatch=n, logits_all=True, n_threads=t, n_threads_batch=t, verbose=False
    )
    sums = [batch_nll(batched, chunk) for chunk in session.chunks]
    batched.close()
    stepped = session.cells(Routing("original"), session.llm.layout.n_expert, "lru", range(len(session.chunks)))
    d = paired.compare(sums, [c.nll_sum for c in stepped], [c.n for c in stepped])
    ppl = math.exp(sum(sums) / d.n_tokens)
    change = interval.figure(d.ppl_increase, d.ppl_increase_low, d.ppl_increase_high, digits=3)
    print(f"batched, unhooked, llama-perplexity's definition: {ppl:.4f}; stepped original {change} %\n")


def batch_nll(llm: Llama, chunk: Chunk) -> float:
    """Sum of nll in nats over the scored tokens of a chunk, evaluated in one batch."""
    llm.reset()
    llm.eval(chunk.tokens)
    rows = llm.scores[chunk.first : len(chunk.tokens) - 1].astype(np.float64)
    top = rows.max(axis=1)
    targets = np.array(chunk.tokens[chunk.first + 1 :])
    return float((top + np.log(np.exp(rows - top[:, None]).sum(axis=1)) - rows[np.arange(len(rows)), targets]).sum())


def match(
    session: scorer.Scorer, capacity: int, budget: str, fit: Sequence[int], held_out: Sequence[int], a: argparse.Namespace
) -> None:
    """Bytes missed by the per-layer point for 1% against those of one lambda with LRU at the same perplexity, on all chunks.

    With --kl, also at the same KL(original || routed), which has far less noise than the perplexity has. The curve of one
    lambda is interpolated between MATCHED_LAMBDAS, up to twice the loss, in each of 2000 resamples of the chunks anew.
    """
    outcome = tune.Search(session, goal(a, capacity, 1.0), fit, held_out).tune()
    if not outcome.chosen:
        print(f"\n{budget}: no per-layer point within 1%, so there is nothing to match")
        return
    indices = range(len(session.chunks))
    ours = session.cells(outcome.chosen.routing, capacity, DEFAULT, indices)
    theirs = [session.cells(Routing("original"), capacity, "lru", indices)]
    lossless = sum(c.nll_sum for c in theirs[0])
    for x in MATCHED_LAMBDAS:
        theirs.append(session.cells(Routing("cache-prior", {"lambda": x}), capacity, "lru", indices))
        if sum(c.nll_sum for c in theirs[-1]) - lossless > 2 * (sum(c.nll_sum for c in ours) - lossless):
            break  # so far beyond that no resample needs more
    nll = np.array([[c.nll_sum for c in row] for row in [*theirs, ours]])
    missed = np.array([[c.missed_bytes for c in row] for row in [*theirs, ours]], dtype=np.float64)
    print_ratio(budget, "perplexity", nll, missed, sum(c.n for c in ours))
    if a.kl:
        arms = [(Routing("cache-prior", {"lambda": x}), capacity, "lru") for x in MATCHED_LAMBDAS[: len(theirs) - 1]]
        arms.append((outcome.chosen.routing, capacity, DEFAULT))
        near = [i for i in range(len(arms)) if 0.8 < missed[1 + i].sum() / missed[-1].sum() < 1.45]
        # chunk by chunk, so that the rows of `original` are computed once for all arms
        cells = session.groups([[Request(*arms[i], chunk, kl=True) for i in near] for chunk in indices])
        kl = np.array([[0.0, *(float(c.kl.sum()) for c in row)] for row in cells]).T
        print_ratio(budget, "KL from original", kl, missed[[0, *(1 + i for i in near)]], sum(c.n for c in ours))


def print_ratio(budget: str, what: str, loss: np.ndarray, missed: np.ndarray, n_tokens: int) -> None:
    """Misses of the last row against those of the curve, with a 95% interval by a bootstrap over chunks."""
    n = loss.shape[1]
    pick = np.random.default_rng(0).integers(0, n, (2000, n))
    ratios = [matched_ratio(loss, missed, np.arange(n)), *(matched_ratio(loss, missed, p) for p in pick)]
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    change = f"{100 * (ratios[0] - 1):+.1f}% [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
    print(
        f"\n{budget}: bytes missed by cache-prior per layer with {DEFAULT}, against one lambda with LRU at the same {what}: "
        f"{change} on {n_tokens} tokens",
        flush=True,
    )


def matched_ratio(loss: np.ndarray, missed: np.ndarray, pick: np.ndarray) -> float:
    """Misses of the last row over those of the curve (the rows before it, lossless first) where its loss is the same."""
    loss, missed = loss[:, pick].sum(axis=1), missed[:, pick].sum(axis=1)
    curve = np.maximum.accumulate(loss[:-1])
    return float(missed[-1] / np.interp(loss[-1], curve, missed[:-1]))


if __name__ == "__main__":
    try:
        main()
    except CacherouteError as e:
        sys.exit(f"{Path(__file__).name}: {e}")
