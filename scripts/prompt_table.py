"""Time to the first token of prompts, against the least that it can be, as a table in Markdown.

`python scripts/prompt_table.py model.gguf --tokens 32,128,512 --flash-mbps 500,1000,2000,0` evaluates random tokens, each prompt
from an empty cache, the arms of a repetition in turns. The floor of a prompt is max(compute, distinct MiB / speed of the flash):
compute is the same prompt with all experts in memory, distinct MiB are the experts that it uses, each once. With --control
llama.cpp's own mmap evaluates it, too, in a process limited to the same memory, as fast as the disk. With --turns a
conversation is measured instead: so many turns of --tokens tokens after each other, each with 20 decoded tokens after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from cacheroute import Llama
from cacheroute.bench import control
from cacheroute.engine import flash_attention
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB
from cacheroute.install.machine import cores

ARMS = {"ahead": True, "not ahead": False}  # read_ahead
COLUMNS = (
    "tokens", "flash", "compute s", "distinct MiB", "floor s", "first token s", "share of the floor", "without reading ahead",
    "read/distinct", "over budget", "llama.cpp's own mmap s",
)  # fmt: skip
DECODED = 20  # tokens after each turn
USUAL_ROUTING = "keep:cover=0.7"  # of the prompts of --turns
MB = 1e6
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One prompt: seconds, MiB asked of the device and used, bytes above the budget at most."""

    seconds: float
    read: float
    distinct: float
    over: int


def prompt(llm: Llama, tokens: list[int]) -> Measured:
    before = llm.stats().prefill
    start = time.perf_counter()
    llm.eval(tokens)
    seconds = time.perf_counter() - start
    now = llm.stats().prefill
    assert llm._hook
    return Measured(
        seconds, now.read_mib - before.read_mib, now.distinct_mib - before.distinct_mib, llm._hook.peak_bytes - llm.budget.nbytes
    )


def fill(llm: Llama, io: str) -> float:
    """Brings all experts into memory, one layer after the other: MB/s of the device."""
    llm.configure(budget="all", io=io, prompt_routing="original")
    llm.flash_mbps = None
    start = time.perf_counter()
    for layer in range(len(llm.layout.layers)):
        llm.load_experts(layer, range(llm.layout.n_expert))
    return llm.layout.all_expert_bytes / MB / (time.perf_counter() - start)


def compute_seconds(llm: Llama, tokens: list[int]) -> float:
    """Of the prompt with all experts in memory (see fill), after a short one that touches the buffers."""
    prompt(llm, tokens[: flash_attention.LEAST])
    llm.rewind()
    got = prompt(llm, tokens)
    assert not got.read, f"{got.read:.0f} MiB were read, though all experts were to be in memory"
    return got.seconds


def control_seconds(llm: Llama, budget: str, tokens: list[int], repetitions: int) -> list[float]:
    """Of the prompt in llama.cpp's own process, limited to what it needs beside the experts, and the budget."""
    limit = control.limit_for(llm, budget, tokens, len(tokens))
    seconds = []
    for _ in range(repetitions):
        limit, (run, _) = control.run(llm, limit, tokens, len(tokens), 0, repack=False)
        assert run
        seconds.append(run.seconds)
    return seconds


def table(llm: Llama, args: argparse.Namespace) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    rng = np.random.default_rng(0)
    names = ["ahead"] if args.ahead_only else list(ARMS)
    for n in args.tokens:
        tokens = [int(t) for t in rng.integers(5, 3000, n)]
        shares: dict[tuple[float, str], list[float]] = {}
        rows: dict[float, list[tuple[float, float, Measured]]] = {}
        for repetition in range(args.repetitions):
            disk = fill(llm, args.io)
            compute = compute_seconds(llm, tokens)
            for flash in args.flash_mbps:
                for name in names[:: 1 if repetition % 2 else -1]:
                    llm.configure(budget=args.budget, io=args.io)
                    llm.flash_mbps, llm._read_ahead = flash or None, ARMS[name]
                    got = prompt(llm, tokens)
                    floor = max(compute, got.distinct * MIB / MB / min(flash or disk, disk))
                    shares.setdefault((flash, name), []).append(floor / got.seconds)
                    if name == "ahead":
                        rows.setdefault(flash, []).append((compute, floor, got))
        beside = control_seconds(llm, args.budget, tokens, args.repetitions) if args.control else []
        for flash, seen in rows.items():
            last = seen[-1][2]
            cells = (
                n,
                f"{flash:g} MB/s" if flash else f"disk, {disk:.0f} MB/s",
                mean([c for c, _, _ in seen]),
                f"{last.distinct:.0f}",
                mean([f for _, f, _ in seen]),
                mean([m.seconds for _, _, m in seen]),
                spread(shares[flash, "ahead"]),
                spread(shares.get((flash, "not ahead"), [])),
                f"{last.read / last.distinct:.3f}",
                f"{last.over / MIB:.0f} MiB",
                spread(beside),
            )
            yield "| " + " | ".join(map(str, cells)) + " |"


def conversation(llm: Llama, args: argparse.Namespace) -> Iterator[str]:
    """Seconds to the first token of each turn, lossless and with a prompt routing."""
    yield "| prompt routing | flash | " + " | ".join(f"turn {i + 1}" for i in range(args.turns)) + " | MiB read, turns 2 on |"
    yield "|---|---|" + "---|" * (args.turns + 1)
    n = args.tokens[0]
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(5, 3000, args.turns * (n + DECODED))]
    seconds: dict[tuple[float, str], list[list[float]]] = {}
    read: dict[tuple[float, str], list[float]] = {}
    for _ in range(args.repetitions):
        for flash in args.flash_mbps:
            for routing in ("original", *(args.prompt_routing or [USUAL_ROUTING])):
                llm.configure(budget=args.budget, io=args.io, prompt_routing=routing)
                llm.flash_mbps, own, total = flash or None, [], 0.0
                for turn in range(args.turns):
                    at = turn * (n + DECODED)
                    got = prompt(llm, tokens[at : at + n])
                    own.append(got.seconds)
                    total += got.read if turn else 0.0
                    with llm.decoding():
                        for token in tokens[at + n : at + n + DECODED]:
                            llm.eval([token])
                seconds.setdefault((flash, routing), []).append(own)
                read.setdefault((flash, routing), []).append(total)
    for (flash, routing), runs in seconds.items():
        each = " | ".join(mean(column) for column in zip(*runs, strict=True))
        yield f"| {routing} | {f'{flash:g} MB/s' if flash else 'disk'} | {each} | {statistics.mean(read[flash, routing]):.0f} |"


def mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}"


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def several(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argument of values with commas between them."""
    return lambda text: [kind(x) for x in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=several(int), default=[32, 128, 512], metavar="N,N")
    parser.add_argument(
        "--flash-mbps", type=several(float), default=[500.0, 1000.0, 2000.0, 0.0], metavar="MB/s,MB/s", help="0: the disk's"
    )
    parser.add_argument("--io", default="direct")
    parser.add_argument("--ahead-only", action="store_true", help="without the arm that does not read ahead")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--prompt-routing", type=several(str), help=f"of --turns [default: {USUAL_ROUTING}]")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=cores())
    parser.add_argument("-fa", "--flash-attn", choices=("prompts", "on", "off"), default="prompts")
    args = parser.parse_args()
    if args.turns and (args.control or args.ahead_only):
        parser.error("--turns has neither --control nor --ahead-only")
    if args.prompt_routing and not args.turns:
        parser.error("--prompt-routing is of --turns")
    longest = args.turns * (args.tokens[0] + DECODED) if args.turns else max(args.tokens)
    try:
        llm = Llama(
            args.model, budget=args.budget, io=args.io, n_ctx=max(longest + 8, flash_attention.LEAST), n_threads=args.threads,
            n_threads_batch=args.threads, flash_attn={"on": True, "off": False}.get(args.flash_attn), verbose=False,
        )  # fmt: skip
        for line in (conversation if args.turns else table)(llm, args):
            print(line, flush=True)
        llm.close()
    except CacherouteError as e:
        print(f"prompt_table: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
