"""What the hook costs when nothing is read: all experts resident, routed by `original` against no hook at all.

`python scripts/bench_hook.py -m MODEL [-p 512] [-n 128] [-r 5] [-t 2] [--io direct]` prints tok/s of both and their ratio, paired
within repetitions, for the prompt and for decoding. `--io load`, the default, loads the experts as llama.cpp does; `direct`
leaves them in the file.
All experts that the tokens use must fit memory. For K = 8, E = 128: scripts/make_shape_model.py qwen3-30b-a3b --layers 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

from cacheroute import Llama
from cacheroute.bench.runs import both_phases
from cacheroute.cli import options


def tokens_per_second(llm: Llama, routing: str | None, tokens: list[int], n_prompt: int, n_gen: int) -> dict[str, float]:
    """Runs the tokens twice, the first time to have their experts in memory."""
    llm.configure(budget="all", routing=routing)
    for _ in range(2):
        llm.rewind()
        phases = both_phases(llm, tokens, n_prompt, n_gen)
    return {name: run.ts for name, run in zip(("prompt", "decode"), phases, strict=True) if run}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=options.threads(None))
    parser.add_argument("--io", choices=("load", "direct"), default="load")
    args = parser.parse_args()
    n_tokens = args.n_prompt + args.n_gen
    sizes = {"n_ctx": n_tokens + 64, "n_batch": max(args.n_prompt, 64)}
    threads: dict[str, Any] = {"n_threads": args.threads, "n_threads_batch": args.threads}
    llm = Llama(args.model, budget="all", io=args.io, **sizes, **threads, verbose=False)
    tokens = llm.tokenize(options.text(None).encode())[:n_tokens]
    arms = {"hooked": "original", "plain": None}
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for i in range(args.repetitions):
        for arm in list(arms) if i % 2 else reversed(arms):
            runs[arm].append(tokens_per_second(llm, arms[arm], tokens, args.n_prompt, args.n_gen))
    llm.close()
    for phase in runs["plain"][0]:
        hooked, plain = ([run[phase] for run in runs[arm]] for arm in ("hooked", "plain"))
        ratios = [a / b for a, b in zip(hooked, plain, strict=True)]
        row = {"phase": phase, "ratio": statistics.median(ratios), "ratios": ratios, "hooked_ts": hooked, "plain_ts": plain}
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
