"""Whether a routing that `tune` chose stays within its limit on unseen text: 20 times, tune on two thirds and score the rest.

    python scripts/check_tune.py                    demo model, 1%, budget 50%, per layer; exit code 1 if fewer than 19 of 20 hold
    python scripts/check_tune.py --uniform --limit 5000 --trials 5
    python scripts/check_tune.py --max-kl 0.02
    python scripts/check_tune.py --max-kl 0.02 --files q4.gguf,q3.gguf,q8.gguf      which file, too, as `tune --files`

Within the limit is an unseen part whose estimate is; the column says "yes" where its interval ends there, too, else "perhaps".

Each trial draws other chunks to be unseen. The chunks that price the layers are in no trial's unseen part. Scores are kept in the
user's cache and shared by the trials, so it can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import numpy as np

from cacheroute.cli import frontier_files, interval, options, table
from cacheroute.errors import CacherouteError
from cacheroute.evals import choose, loading, pricing, scorer, tune
from cacheroute.model import catalogue
from cacheroute.model.copies import Copy
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT

UNSEEN = 1 / 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a GGUF file or a name (default: demo)")
    parser.add_argument("--files", help="several quantisations of one model, separated by commas, instead of -m")
    parser.add_argument("--reference", help="with --files: what all is compared with (default: the largest)")
    parser.add_argument("-f", "--file", type=Path, help="the text (default: the held-out text of the package)")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--max-ppl-increase", type=float, default=1.0, help="in %%")
    parser.add_argument("--max-kl", type=float, help="in nats per token, instead of --max-ppl-increase")
    parser.add_argument("--eviction", default=DEFAULT)
    parser.add_argument("--uniform", action="store_true", help="one lambda instead of one per layer")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--limit", type=int, default=34000, help="scored tokens (default: all of the held-out text)")
    parser.add_argument("--price-tokens", type=int, default=1024)
    parser.add_argument("--price-groups", type=int, default=15)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--workers", type=int, help="processes that score (default: one a thread, best for a small model)")
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    source = loading.Source(a.file, chunk=a.chunk, limit=a.limit)
    n_workers = a.workers or options.threads(a.threads)
    if a.files:
        sys.exit(0 if check_files(a, source, n_workers) >= 0.95 * a.trials else 1)
    path = catalogue.resolve(a.model)
    with scorer.session(path, source, threads=a.threads, n_workers=n_workers, evictions=[a.eviction]) as session:
        within = check(session, a)
    sys.exit(0 if within >= 0.95 * a.trials else 1)


def parts(n_chunks: int, trial: int, priced: Sequence[int], rest: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(fit, held out, unseen) of a trial; the priced chunks are the first of those to fit."""
    drawn = [rest[i] for i in np.random.default_rng(trial).permutation(len(rest))]
    n_unseen = round(n_chunks * UNSEEN)
    unseen, seen = drawn[:n_unseen], [*priced, *drawn[n_unseen:]]
    n_held_out = round(len(seen) * UNSEEN)
    return seen[:-n_held_out], seen[-n_held_out:], unseen


def priced_first(n_chunks: int, n_priced: int) -> tuple[list[int], list[int]]:
    """(chunks that price the layers, all others)."""
    order = [int(i) for i in np.random.default_rng(1000).permutation(n_chunks)]
    return order[:n_priced], order[n_priced:]


def check_files(a: argparse.Namespace, source: loading.Source, n_workers: int) -> int:
    """As check(), for `tune --files`: each trial chooses a file, too. A session of each file stays open for all trials."""
    chosen = frontier_files.choose(a.files, a.reference)
    nbytes = budgets.in_bytes(a.budget, chosen.copies[0].layout)
    settings = frontier_files.Settings(a.threads, n_workers, None, None, None, [a.eviction])
    with ExitStack() as stack:
        opened: dict[tuple[str, bool], scorer.Scorer] = {}

        def session(copy: Copy, own: bool) -> AbstractContextManager[scorer.Scorer]:
            reference = copy if own else chosen.reference
            key = (copy.fingerprint, own or copy is chosen.reference)
            if key not in opened:
                opened[key] = stack.enter_context(settings.session(copy, reference, source))
            return nullcontext(opened[key])

        chooser = choose.Chooser(
            chosen.copies, chosen.reference, nbytes, goal_of(a, 0, 0), lambda c: session(c, False), lambda c: session(c, True)
        )
        chooser.prepare()
        n = len(chooser.chunks)
        priced, rest = priced_first(n, pricing.n_chunks(a.price_tokens, chooser.chunks))
        limit = limit_of(a)
        head = ["trial", "file", "chosen", "unseen tokens", "Mean KLD millinats [95%]", "missed MiB/token", f"within {limit}"]
        cells, within = [head], 0
        for trial in range(a.trials):
            chooser.goal = goal_of(a, 0, trial)
            fit, held_out, unseen = parts(n, trial, priced, rest)
            best = choose.best(chooser.run(fit, held_out))
            if best is None or best.capacity is None or best.outcome is None or best.outcome.chosen is None:
                within += 1
                cells.append([str(trial), "nothing fits", "", "", "", "", "yes"])
                continue
            with session(best.copy, False) as own:
                t = tune.Search(own, goal_of(a, best.capacity, trial), fit, held_out).trial(
                    best.outcome.chosen.routing, unseen, validates=True
                )
            within += t.passed
            missed = "0" if best.whole else f"{t.missed_mib_per_token:.2f}"
            kl = interval.mean_kl(t.kl)
            cells.append([str(trial), best.copy.name, str(t.routing), str(t.difference.n_tokens), kl, missed, t.within])
            print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    print(table.as_markdown(cells))
    print(f"\n{within} of {a.trials} within {limit} on unseen text, KL against {chosen.reference.name}")
    return within


def goal_of(a: argparse.Namespace, capacity: int, seed: int) -> tune.Goal:
    """What a trial tunes for."""
    return tune.Goal(
        budget=capacity,
        eviction=a.eviction,
        max_ppl_increase=a.max_ppl_increase if a.max_kl is None else None,
        max_kl=a.max_kl,
        uniform=a.uniform,
        price_tokens=a.price_tokens,
        price_groups=a.price_groups,
        seed=seed,
    )


def limit_of(a: argparse.Namespace) -> str:
    """The limit in words."""
    return f"{a.max_ppl_increase:g}%" if a.max_kl is None else f"{1000 * a.max_kl:g} millinats"


def check(session: scorer.Scorer, a: argparse.Namespace) -> int:
    """Prints the trials as a table; returns how many stayed within the limit."""
    chunks, capacity = session.chunks, budgets.parse(a.budget, session.llm.layout).capacity
    priced, rest = priced_first(len(chunks), pricing.n_chunks(a.price_tokens, chunks))
    limit = limit_of(a)
    head = ["trial", "chosen", "unseen tokens", "ppl change % [95%]", "Mean KLD millinats [95%]", "missed MiB/token", "saved"]
    cells = [[*head, f"within {limit}"]]
    within = 0
    for trial in range(a.trials):
        fit, held_out, unseen = parts(len(chunks), trial, priced, rest)
        search = tune.Search(session, goal_of(a, capacity, trial), fit, held_out)
        outcome = search.tune()
        if not outcome.chosen:
            within += 1  # tune reports it, so no setting that costs more is used
            cells.append([str(trial), "nothing fits", "", "", "", "", "", "yes"])
            continue
        t = search.trial(outcome.chosen.routing, unseen, validates=True)
        d = t.difference
        within += t.passed
        change = interval.ppl_change(d)
        saved = f"{100 * (1 - t.missed_mib_per_token / t.original_missed_mib_per_token):.0f}%"
        missed = f"{t.missed_mib_per_token:.2f}"
        kl = interval.mean_kl(t.kl)
        cells.append([str(trial), str(t.routing), str(d.n_tokens), change, kl, missed, saved, t.within])
        print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    print(table.as_markdown(cells))
    print(f"\n{within} of {a.trials} within {limit} on unseen text")
    return within


if __name__ == "__main__":
    try:
        main()
    except CacherouteError as e:
        sys.exit(f"{Path(__file__).name}: {e}")
