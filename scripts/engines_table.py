"""The engines of two checkouts against each other, all experts in memory, as a table in Markdown.

`python scripts/engines_table.py OLD NEW -m model.gguf --tokens 8,64,512,2048 -r 3` gives, of opening the model, of prompts of
random tokens and of decoding one by one, both times (medians) and new / old, paired within repetitions. Each run is a process
of its checkout's own `.venv`, the two in turns. By default experts lie as those do that were read from flash; --loaded
takes them as `--budget all` does, as llama.cpp itself lays them out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from busy_table import spread

WARM_UP = 64  # tokens before those that are timed


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, with the cacheroute of this process."""
    import numpy as np

    from cacheroute import Llama
    from cacheroute.bench.runs import decode

    n_ctx = max(*args.tokens, args.n_gen) + WARM_UP
    tokens = [int(t) for t in np.random.default_rng(0).integers(5, 3000, n_ctx)]
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    start = time.perf_counter()
    llm = Llama(args.model, budget="all", n_ctx=n_ctx, verbose=False, io="auto" if args.loaded else "direct", **threads)
    found = {"open": time.perf_counter() - start}
    if not args.loaded:
        for layer in range(len(llm.layout.layers)):
            llm.load_experts(layer, range(llm.layout.n_expert))
    llm.eval(tokens[:WARM_UP])
    for n in args.tokens:
        llm.rewind()
        start = time.perf_counter()
        llm.eval(tokens[:n])
        found[f"{n} tokens"] = time.perf_counter() - start
    llm.rewind()
    with llm.decoding():
        decode(llm, tokens[:1])
        start = time.perf_counter()
        decode(llm, tokens[1 : args.n_gen + 1])
    found["a decoded token"] = (time.perf_counter() - start) / args.n_gen
    return found


def run(checkout: Path) -> dict[str, float]:
    command = [str(checkout / ".venv/bin/python"), __file__, *sys.argv[1:], "--one"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: it failed")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(args: argparse.Namespace) -> Iterator[str]:
    samples: dict[Path, list[dict[str, float]]] = {args.old: [], args.new: []}
    for repetition in range(args.repetitions):
        for checkout in (args.old, args.new)[:: -1 if repetition % 2 else 1]:
            samples[checkout].append(run(checkout))
    yield "| | old s | new s | new / old |"
    yield "|---|---|---|---|"
    for name in samples[args.old][0]:
        old, new = ([sample[name] for sample in samples[checkout]] for checkout in (args.old, args.new))
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        yield f"| {name} | {statistics.median(old):.4f} | {statistics.median(new):.4f} | {spread(ratios)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda text: Path(text).resolve(), help="a checkout that scripts/setup has set up")
    parser.add_argument("new", type=lambda text: Path(text).resolve())
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument(
        "--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[8, 64, 512, 2048], metavar="N,N"
    )
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("-n", "--n-gen", type=int, default=48)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # this process is one run
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args)))
        return
    for line in table(args):
        print(line)


if __name__ == "__main__":
    main()
