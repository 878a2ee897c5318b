"""`--budget all` against llama.cpp itself, as it loads a model by default: repacked experts, no hook, no cacheroute.

`python scripts/bench_all_resident.py -m MODEL [-p 512] [-n 64] [-r 5] [-t 2]` prints for the prompt and for decoding the ratio of
their tok/s (all / stock), paired within repetitions: its median, mean, standard deviation, and both sides' samples.

Each side is a process of its own, which holds the model as long as the program runs: memory must take it twice. They run in
turns, and the first run of each is not counted. On a machine with other load set GOMP_SPINCOUNT=3000 for both: cacheroute sets it
for itself, and llama.cpp's threads spin longer. Shapes of real models: scripts/make_shape_model.py qwen3-30b-a3b --layers 3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIDES = ("all", "stock")


def load(side: str, model: str, n_ctx: int, n_threads: int) -> Any:
    """One of SIDES. `stock` never imports cacheroute, which sets how long OpenMP's threads spin."""
    settings: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
    if side == "stock":
        import llama_cpp

        return llama_cpp.Llama(model, flash_attn_type=2, **settings)  # for prompts, as here: engine/flash_attention.py
    from cacheroute import Llama

    llm = Llama(model, budget="all", **settings)
    assert llm.io == "load", "all experts are loaded with the model"
    return llm


def run(llm: Any, tokens: list[int], n_prompt: int) -> dict[str, float]:
    """Tokens per second of the prompt, and of what follows it, one by one."""
    found = {}
    llm.reset()
    start = time.perf_counter()
    if n_prompt:
        llm.eval(tokens[:n_prompt])
        found["prompt"] = n_prompt / (time.perf_counter() - start)
    rest = tokens[n_prompt:]
    start = time.perf_counter()
    with getattr(llm, "decoding", contextlib.nullcontext)():
        for token in rest:
            llm.eval([token])
    return found | ({"decode": len(rest) / (time.perf_counter() - start)} if rest else {})


def child(side: str, args: argparse.Namespace) -> None:
    """Runs once for each line of stdin, and prints what run() gives."""
    n_tokens = args.n_prompt + args.n_gen
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's own output goes to stderr
    llm = load(side, args.model, n_tokens + 64, args.threads)
    text = (ROOT / "cacheroute/data/heldout.txt").read_text(encoding="utf-8")
    tokens = llm.tokenize(text.encode())[:n_tokens]
    assert len(tokens) == n_tokens, "the text is too short for so many tokens"
    for _ in sys.stdin:
        print(json.dumps(run(llm, tokens, args.n_prompt)), file=out, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # this process is one
    args = parser.parse_args()
    if args.side:
        child(args.side, args)
        return 0
    with contextlib.ExitStack() as stack:
        processes = {}
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.communicate)  # its input ends, and so does it
            processes[side] = process
        samples: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for i in range(args.repetitions + 1):
            for side in SIDES if i % 2 else reversed(SIDES):
                samples[side].append(measure(processes[side]))
    for phase in samples["all"][0]:
        own, stock = ([s[phase] for s in samples[side][1:]] for side in SIDES)
        ratios = [a / b for a, b in zip(own, stock, strict=True)]
        row = {
            "phase": phase,
            "ratio": statistics.median(ratios),
            "mean": statistics.fmean(ratios),
            "sd": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
            "ratios": ratios,
            "all_ts": own,
            "stock_ts": stock,
        }
        print(json.dumps(row))
    return 0


def measure(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin and process.stdout
    process.stdin.write("run\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side has ended; its reason is above")
    found: dict[str, float] = json.loads(line)
    return found


if __name__ == "__main__":
    sys.exit(main())
