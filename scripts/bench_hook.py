"""What the hook costs when nothing is read: decoding with all experts resident, routed by `original` against no hook at all.

`python scripts/bench_hook.py -m MODEL [-n 128] [-r 5] [-t 2]` prints tok/s of both and their ratio, paired within repetitions.
All experts that the tokens use must fit memory. For K = 8, E = 128: scripts/make_shape_model.py qwen3-30b-a3b --layers 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cacheroute import Llama
from cacheroute.cli import options
from cacheroute.runs import decode, timed

PROMPT = 8


def tokens_per_second(llm: Llama, routing: str | None, tokens: list[int]) -> float:
    """Decodes the tokens twice, the first time to have their experts in memory."""
    llm.configure(budget="all", routing=routing)
    for _ in range(2):
        llm.rewind()
        llm.eval(tokens[:PROMPT])
        with llm.decoding():
            run = timed(llm, lambda: decode(llm, tokens[PROMPT:]))
    return run.ts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-n", "--n-gen", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=options.threads(None))
    args = parser.parse_args()
    llm = Llama(args.model, n_ctx=args.n_gen + 64, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
    tokens = llm.tokenize(options.text(None).encode())[: PROMPT + args.n_gen]
    hooked: list[float] = []
    plain: list[float] = []
    for i in range(args.repetitions):
        for arm in ("original", None) if i % 2 else (None, "original"):
            (hooked if arm else plain).append(tokens_per_second(llm, arm, tokens))
    ratios = [a / b for a, b in zip(hooked, plain, strict=True)]
    llm.close()
    print(json.dumps({"hooked_ts": hooked, "plain_ts": plain, "ratio": statistics.median(ratios), "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
