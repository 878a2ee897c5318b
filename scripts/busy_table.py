"""Decoding beside other work: tok/s of cacheroute and of llama.cpp, quiet and beside busy processes, interleaved.

`python scripts/busy_table.py -m MODEL [--others 2] [-n 60] [-r 5] [--budget 50%] [-t 2] [--arms ...]` prints a row for each arm:
tok/s quiet and busy, their ratio paired within repetitions, and processor seconds a token. Arms:

- cacheroute: `original`, as it comes;
- fixed: the same with a number of threads that does not change;
- spinning: fixed, with OpenMP's own waits (GOMP_SPINCOUNT as libgomp has it);
- llama.cpp: the engine without cacheroute's hook and without its setting of OpenMP, all of the model in memory;
- llama.cpp, short spin: the same with cacheroute's setting of OpenMP.

Each run is a process of its own; a busy process is a loop that does nothing else.
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
from collections.abc import Iterator
from typing import Any

ARMS = "cacheroute", "fixed", "spinning", "llama.cpp", "llama.cpp, short spin"
_LOOP = "while True: pass"
_SPIN = {
    "GOMP_SPINCOUNT": "300000",
    "KMP_BLOCKTIME": "200",
}  # what the libraries do without being asked, on a machine of two cores


def worker(arm: str, a: argparse.Namespace) -> None:
    """Decodes once and prints tok/s and processor seconds per token."""
    if arm == "spinning" or arm == "llama.cpp":
        os.environ.update(_SPIN)
    from cacheroute import Llama
    from cacheroute.bench.runs import decode, timed, warm_up
    from cacheroute.cli import options
    from cacheroute.engine.compute_threads import ComputeThreads
    from cacheroute.install import patched_llama_cpp
    from cacheroute.model import catalogue

    sizes = {"n_ctx": a.n_gen + 64, "n_batch": 64, "n_threads": a.threads, "n_threads_batch": a.threads, "verbose": False}
    decoding: Any
    if arm.startswith("llama.cpp"):
        llm = patched_llama_cpp.module().Llama(str(catalogue.resolve(a.model)), use_mmap=True, use_extra_bufts=False, **sizes)
        decoding = contextlib.nullcontext
    else:
        if arm != "cacheroute":
            ComputeThreads.look = lambda self: self.n  # type: ignore[method-assign]
        llm = Llama(a.model, budget=a.budget, **sizes)
        decoding = llm.decoding
    tokens = llm.tokenize(options.text(None).encode())[: a.n_gen + 24]
    warm_up(llm, tokens)
    llm.reset()
    llm.eval(tokens[:16])
    with decoding():
        decode(llm, tokens[16:24])  # the number of threads may settle
        run = timed(llm, lambda: decode(llm, tokens[24:]))
    print(json.dumps({"ts": run.ts, "cpu": run.cpu_seconds / run.tokens}))


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    """Beside `n` busy processes."""
    others = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(n)]
    time.sleep(0.2)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--others", type=int, default=2, help="busy processes (default: 2)")
    parser.add_argument("-n", "--n-gen", type=int, default=60)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args)
        return 0
    arms = [arm.strip() for arm in args.arms.split(";")]
    if unknown := set(arms) - set(ARMS):
        parser.error(f"there is no arm {unknown.pop()}; there are {'; '.join(ARMS)}")
    runs: dict[tuple[str, int], list[dict[str, float]]] = {(arm, n): [] for arm in arms for n in (0, args.others)}
    for i in range(args.repetitions):
        for arm, n in list(runs) if i % 2 else list(reversed(runs)):
            with busy(n):
                done = subprocess.run([sys.executable, *sys.argv, "--worker", arm], capture_output=True, text=True, check=True)
            runs[arm, n].append(json.loads(done.stdout))
            print(f"{arm}, {n} others: {runs[arm, n][-1]['ts']:.1f} tok/s", file=sys.stderr)
    for arm in arms:
        quiet, loaded = ([run["ts"] for run in runs[arm, n]] for n in (0, args.others))
        ratios = [b / q for q, b in zip(quiet, loaded, strict=True)]
        row: dict[str, object] = {
            "arm": arm,
            "quiet_ts": spread(quiet),
            "busy_ts": spread(loaded),
            "busy/quiet": spread(ratios),
        }
        row |= {
            name: spread([run["cpu"] for run in runs[arm, n]], 3) for name, n in (("quiet_cpu_s", 0), ("busy_cpu_s", args.others))
        }
        print(json.dumps(row))
    return 0


def spread(values: list[float], digits: int = 2) -> str:
    """The median and what lies between."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
