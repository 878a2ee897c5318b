"""The README's quality table: what every strategy saves at 0.5, 1 and 3% of perplexity, at budgets of 25, 50 and 75%.

    python scripts/quality_table.py                 all of it, on the demo model and the held-out text
    python scripts/quality_table.py --budget 50% --max-ppl-increase 1% --limit 5000

Every point is tuned as `cacheroute tune` does it (fit on two thirds of the chunks, figures from the third that took no part).
Scores are kept in the user's cache, so it can be stopped and started. Before the table: `original` against a batched pass of the
unhooked engine, scored by llama-perplexity's definition. After it: bytes at the same perplexity, per layer with the default
eviction against one lambda with LRU.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cacheroute.cli import options, table
from cacheroute.errors import CacherouteError
from cacheroute.evals import loading, paired, pricing, scorer, tune
from cacheroute.evals.text import Chunk
from cacheroute.model import catalogue
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
    n_threads = options.threads(a.threads)
    with scorer.session(path, source, n_threads, n_workers=a.workers or n_threads) as scores:
        scores.after = say
        show(path, scores, a)


def show(path: Path, scores: scorer.Scorer, a: argparse.Namespace) -> None:
    """Prints all that was asked for."""
    llm, chunks = scores.llm, scores.chunks
    n_tokens = sum(c.n_scored for c in chunks)
    print(f"{llm.layout.model}, {len(chunks)} chunks of {a.chunk}, {n_tokens} scored tokens\n", flush=True)
    if not a.no_batch:
        compare_with_batch(path, scores, a.threads)
    fit, held_out = tune.split(len(chunks), seed=0)
    limits = [float(x.strip().rstrip("%")) for x in options.names(a.max_ppl_increase)]
    cells = [["budget", "limit", "routing", "eviction", "value", "ppl change % [95%]", "MiB/token", "of original, LRU"]]
    for budget in options.names(a.budget) if not a.no_table else ():
        llm.configure(budget=budget, io="none")
        capacity = llm.budget.capacity
        base = scores.cells(Routing("original"), capacity, "lru", held_out)
        lru = scorer.read_mib_per_token(base)
        cells.append([budget, "", "original", "lru", "", "0", f"{lru:.2f}", "100%"])
        for strategy, eviction, per_layer in WAYS:
            rungs, costs = ladder(scores, capacity, strategy, eviction, per_layer, fit, a)
            for limit in limits:
                search = tune.Search(scores, capacity, eviction, paired.nats(limit), fit, held_out)
                start = tune.start_rung(costs, search.limit) if costs else None
                cells.append([budget, f"{limit:g}%", *row(search.run(rungs, start), strategy, eviction, per_layer, lru)])
                print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    if not a.no_table:
        print(table.as_markdown(cells))
    if not a.no_match:
        for budget in options.names(a.budget):
            llm.configure(budget=budget, io="none")
            match(scores, llm.budget.capacity, budget, fit, held_out, a)


def say(cell: scorer.Cell) -> None:
    if cell.chunk % 10 == 0:
        print(f"  scored {cell.routing[:60]} at {cell.budget} experts, {cell.eviction}", file=sys.stderr, flush=True)


def ladder(
    scores: scorer.Scorer, capacity: int, strategy: str, eviction: str, per_layer: bool, fit: Sequence[int], a: argparse.Namespace
) -> tuple[list[Routing], list[float]]:
    if not per_layer:
        return tune.ladder(strategy, scores.llm.layout), []
    priced = fit[: pricing.n_chunks(a.price_tokens, scores.chunks)]
    return pricing.rungs(scores, capacity, eviction, priced, a.price_groups)


def row(outcome: tune.Outcome, strategy: str, eviction: str, per_layer: bool, lru: float) -> list[str]:
    """The cells of one tuned point, figures of the held-out chunks."""
    name = strategy + (" per layer" if per_layer else "")
    if not outcome.validation:
        return [name, eviction, "nothing fits", "", "", ""]
    v = outcome.validation
    d = v.difference
    layers = [r.parameters["lambda"] for r in v.routing.layers]
    value = f"{min(layers):.2g}..{max(layers):.2g}" if layers else str(v.routing).partition(":")[2]
    change = f"{d.ppl_increase:+.2f} [{table.signed(d.ppl_increase_low)}, {table.signed(d.ppl_increase_high)}]"
    return [name, eviction, value, change, f"{v.read_mib_per_token:.2f}", f"{100 * v.read_mib_per_token / lru:.0f}%"]


def compare_with_batch(path: Path, scores: scorer.Scorer, threads: int | None) -> None:
    """`original`, stepped, against one batch per chunk of the unhooked engine (perplexity.cpp: the second half, mean nll)."""
    from cacheroute.engine.llama import Llama

    n = len(scores.chunks[0].tokens)
    t = options.threads(threads)
    batched = Llama(
        str(path), routing=None, n_ctx=n, n_batch=n, n_ubatch=n, logits_all=True, n_threads=t, n_threads_batch=t, verbose=False
    )
    sums = [batch_nll(batched, chunk) for chunk in scores.chunks]
    batched.close()
    stepped = scores.cells(Routing("original"), scores.llm.layout.n_expert, "lru", range(len(scores.chunks)))
    d = paired.compare(sums, [c.nll for c in stepped], [c.n for c in stepped])
    ppl = math.exp(sum(sums) / d.n_tokens)
    low, high = table.signed(d.ppl_increase_low, 3), table.signed(d.ppl_increase_high, 3)
    print(
        f"batched, unhooked, llama-perplexity's definition: {ppl:.4f}; stepped original {d.ppl_increase:+.3f}% [{low}, {high}]\n"
    )


def batch_nll(llm: Llama, chunk: Chunk) -> float:
    """Sum of nll in nats over the scored tokens of a chunk, evaluated in one batch."""
    llm.reset()
    llm.eval(chunk.tokens)
    rows = llm.scores[chunk.first : len(chunk.tokens) - 1].astype(np.float64)
    top = rows.max(axis=1)
    targets = np.array(chunk.tokens[chunk.first + 1 :])
    return float((top + np.log(np.exp(rows - top[:, None]).sum(axis=1)) - rows[np.arange(len(rows)), targets]).sum())


def match(
    scores: scorer.Scorer, capacity: int, budget: str, fit: Sequence[int], held_out: Sequence[int], a: argparse.Namespace
) -> None:
    """Bytes of the per-layer point for 1% against what one lambda with LRU reads at the same perplexity, on all chunks.

    With --kl, also at the same KL(original || routed), which has far less noise than the perplexity has. The curve of one
    lambda is interpolated between MATCHED_LAMBDAS, up to twice the loss, in each of 2000 resamples of the chunks anew.
    """
    rungs, costs = ladder(scores, capacity, "cache-prior", DEFAULT, True, fit, a)
    search = tune.Search(scores, capacity, DEFAULT, paired.nats(1.0), fit, held_out)
    outcome = search.run(rungs, tune.start_rung(costs, search.limit))
    if not outcome.chosen:
        print(f"\n{budget}: no per-layer point within 1%, so there is nothing to match")
        return
    indices = range(len(scores.chunks))
    ours = scores.cells(outcome.chosen.routing, capacity, DEFAULT, indices)
    theirs = [scores.cells(Routing("original"), capacity, "lru", indices)]
    lossless = sum(c.nll for c in theirs[0])
    for x in MATCHED_LAMBDAS:
        theirs.append(scores.cells(Routing("cache-prior", {"lambda": x}), capacity, "lru", indices))
        if sum(c.nll for c in theirs[-1]) - lossless > 2 * (sum(c.nll for c in ours) - lossless):
            break  # so far beyond that no resample needs more
    nll = np.array([[c.nll for c in row] for row in [*theirs, ours]])
    reads = np.array([[c.read_bytes for c in row] for row in [*theirs, ours]], dtype=np.float64)
    tell(budget, "perplexity", nll, reads, sum(c.n for c in ours))
    if a.kl:
        arms = [(Routing("cache-prior", {"lambda": x}), capacity, "lru") for x in MATCHED_LAMBDAS[: len(theirs) - 1]]
        arms.append((outcome.chosen.routing, capacity, DEFAULT))
        near = [i for i in range(len(arms)) if 0.8 < reads[1 + i].sum() / reads[-1].sum() < 1.45]
        # chunk by chunk, so that the rows of `original` are computed once for all arms
        scores.ahead([scorer.Ask(*arms[i], chunk, kl=True) for chunk in indices for i in near])
        cells = [[scores.cell(*arms[i], chunk, kl=True) for i in near] for chunk in indices]
        kl = np.array([[0.0, *(c.kl for c in row)] for row in cells]).T
        tell(budget, "KL from original", kl, reads[[0, *(1 + i for i in near)]], sum(c.n for c in ours))


def tell(budget: str, what: str, loss: np.ndarray, reads: np.ndarray, n_tokens: int) -> None:
    """Reads of the last row against those of the curve, with a 95% interval by a bootstrap over chunks."""
    n = loss.shape[1]
    pick = np.random.default_rng(0).integers(0, n, (2000, n))
    ratios = [matched_ratio(loss, reads, np.arange(n)), *(matched_ratio(loss, reads, p) for p in pick)]
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    change = f"{100 * (ratios[0] - 1):+.1f}% [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
    print(
        f"\n{budget}: bytes read by cache-prior per layer with {DEFAULT}, against one lambda with LRU at the same {what}: "
        f"{change}% on {n_tokens} tokens",
        flush=True,
    )


def matched_ratio(loss: np.ndarray, reads: np.ndarray, pick: np.ndarray) -> float:
    """Reads of the last row over those of the curve (the rows before it, lossless first) where its loss is the same."""
    loss, read = loss[:, pick].sum(axis=1), reads[:, pick].sum(axis=1)
    curve = np.maximum.accumulate(loss[:-1])
    return float(read[-1] / np.interp(loss[-1], curve, read[:-1]))


if __name__ == "__main__":
    try:
        main()
    except CacherouteError as e:
        sys.exit(f"{Path(__file__).name}: {e}")
