"""The first table of the README: the demo model in half of its experts' memory, three ways, in one run.

    python scripts/demo_table.py                    one to two minutes on two cores

1. llama.cpp's own mmap, in a process limited to the memory that cacheroute uses (the control);
2. cacheroute without loss (`original`, lru);
3. cacheroute tuned for 1% of perplexity (the packaged file that `--routing tuned` uses).

Speed and reads: the same tokens, the three interleaved. Perplexity: one token per decode, paired, on held-out text that the tuned
routing was not made from. The control runs the model's own choice of experts, so its perplexity is that of `original`.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from cacheroute.bench.arms import Arm, Row, control_arm, run_arms
from cacheroute.cli import options, progress, table
from cacheroute.engine.llama import Llama
from cacheroute.errors import CacherouteError
from cacheroute.evals import loading, paired, scorer
from cacheroute.evals.perplexity import summary
from cacheroute.evals.runner import Request
from cacheroute.model import catalogue
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned

BUDGET = "50%"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--n-prompt", type=int, default=64, help="tokens of the prompt (default: 64)")
    parser.add_argument("-n", "--n-gen", type=int, default=64, help="tokens decoded after it (default: 64)")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="interleaved runs of each row (default: 3)")
    parser.add_argument("--chunks", type=int, default=12, help="chunks of text that are scored (default: 12)")
    parser.add_argument("--flash-mbps", type=float, help="limit cacheroute's reads (not the control's) to so many MB/s")
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    path = catalogue.resolve(None)
    notes = tuned.load(tuned.DEMO).notes
    arms = {
        "llama.cpp's own mmap, same memory": control_arm(BUDGET, repack=False),
        "cacheroute, lossless, LRU": Arm(BUDGET, "original", "lru", "auto"),
        "cacheroute, tuned for 1%": Arm(BUDGET, f"{tuned.NAME}:{tuned.DEMO}", str(notes["eviction"]), "auto"),
    }
    reasons: list[str] = []
    rows = speed(path, list(arms.values()), a, reasons)
    lossless, change = perplexity(path, arms["cacheroute, tuned for 1%"], notes, a.chunks)
    cells = [["", "tok/s", "MiB/token read", "perplexity"]]
    for name, arm in arms.items():
        row = rows.get((arm.control, arm.routing))
        ppl = f"{lossless:.2f}"
        if not arm.control and arm.routing != "original":
            low, high = table.signed(change.ppl_increase_low), table.signed(change.ppl_increase_high)
            ppl = f"{lossless * (1 + change.ppl_increase / 100):.2f} ({change.ppl_increase:+.2f}% [{low}, {high}])"
        if row is None:
            cells.append([f"{name}: not possible here", "", "", ppl])
            continue
        # Of the control only the kernel's count exists; cacheroute's own is what it asked of the device.
        read = row.device_mib_per_token if arm.control else row.read_mib_per_token
        cells.append([name, f"{row.avg_ts:.1f} ± {row.stddev_ts:.1f}", "?" if read is None else f"{read:.2f}", ppl])
    print(table.as_markdown(cells))
    for reason in reasons:
        print(f"\n{reason}", file=sys.stderr)
    pace = f", cacheroute's reads at most {a.flash_mbps:g} MB/s" if a.flash_mbps else ""
    print(
        f"\nbudget {BUDGET}: {a.n_gen} tokens after a prompt of {a.n_prompt}, {a.repetitions} interleaved runs{pace}; "
        f"perplexity of {change.n_tokens} unseen tokens, with the 95% interval of its change"
    )


def speed(path: Path, arms: list[Arm], a: argparse.Namespace, reasons: list[str]) -> dict[tuple[bool, str], Row]:
    """The rows of the decoded tokens by (control, routing); `reasons` receives why one is missing."""
    n_threads = options.threads(None)
    llm = Llama(
        str(path),
        budget="50%",
        n_ctx=a.n_prompt + a.n_gen,
        n_batch=a.n_prompt,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        flash_mbps=a.flash_mbps,
        verbose=False,
    )
    with closing(llm), progress.bar("bench", len(arms) * a.repetitions) as advance:
        tokens = llm.tokenize(options.text(None).encode(), add_bos=True)
        rows = run_arms(llm, arms, tokens, a.n_prompt, a.n_gen, a.repetitions, lambda text: advance(1, text), say=reasons.append)
    return {(row.control, row.routing): row for row in rows if row.n_gen}


def perplexity(path: Path, arm: Arm, notes: dict[str, Any], n_chunks: int) -> tuple[float, paired.Difference]:
    """Perplexity of `original` on the chunks after those that `tune` used, and the difference that the arm makes there."""
    workers = min(options.threads(None), 8)  # each loads the model
    with scorer.session(path, loading.Source(chunk=notes["chunk"]), n_workers=workers, evictions=[arm.eviction]) as session:
        chunks = range(len(session.chunks))[notes["n_chunks"] :][:n_chunks]
        capacity = budgets.parse(arm.budget, session.llm.layout).capacity
        groups = [
            [Request(strategies.parse(routing), capacity, arm.eviction, i) for i in chunks]
            for routing in ("original", arm.routing)
        ]
        with progress.scoring(session, [request for group in groups for request in group]):
            base, other = session.groups(groups)
    change = paired.compare([c.nll_sum for c in base], [c.nll_sum for c in other], [c.n for c in base])
    return summary(base).ppl, change


if __name__ == "__main__":
    try:
        main()
    except CacherouteError as e:
        sys.exit(f"{Path(__file__).name}: {e}")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
