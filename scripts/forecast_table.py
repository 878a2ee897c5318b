"""What `cacheroute plan` forecasts against what `cacheroute bench` measures, as a table in Markdown.

`python scripts/forecast_table.py q3.gguf q15.gguf gpto.gguf --flash-mbps 500,1000` decodes with the choices of `--replay
synthetic`, which miss as the demo model does, and reads a prompt; the models are those of make_shape_model.py. The forecast knows
a model by its header, and of the machine what `plan` has measured of it. Error: forecast over measured, less one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cacheroute import Llama
from cacheroute.bench.arms import Arm, Row, run_arms
from cacheroute.cli import options
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB
from cacheroute.forecast import drive as drives
from cacheroute.forecast import misses, speed, timing, workload
from cacheroute.forecast.drive import Drive
from cacheroute.install.machine import cores
from cacheroute.model import experts, gguf_file
from cacheroute.routing import budget as budgets
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.trace import forced_scores

COLUMNS = (
    "model", "drive", "routing", "tok/s forecast", "measured", "error", "MiB/token forecast", "measured", "error",
    "first token s forecast", "measured", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Of one arm: tok/s, MiB a token, seconds of the prompt."""

    ts: float
    mib: float
    first: float


def forecast(
    work: workload.Workload, own: speed.ComputeSpeed, drive: Drive, arm: Arm, capacity: int, n: tuple[int, int]
) -> Forecast:
    n_prompt, n_gen = n
    rate, _ = misses.typical(work.n_expert, work.n_used, capacity, strategies.parse(arm.routing), arm.eviction)
    spare = cores() - own.n_threads
    decoding = timing.decoding(work, own, drive, rate, n_prompt + n_gen // 2, spare)
    prompt = timing.prompt(work, own, drive, capacity, n_prompt, n_prompt, spare)
    return Forecast(1 / decoding.seconds, decoding.read_bytes / MIB, prompt.seconds)


def table(args: argparse.Namespace) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    errors: dict[str, list[float]] = {"tok/s": [], "MiB/token": [], "first token": []}
    for model in args.models:
        header = gguf_file.read(model)
        layout = experts.layout(header)
        work = workload.of_header(header, layout)
        own = speed.measure(work.types(whole=False), args.threads)
        capacity = budgets.parse(args.budget, layout).capacity
        arms = [Arm(args.budget, r, evictions.DEFAULT, "direct") for r in args.routing.split(",")]
        for flash in args.flash_mbps:
            drive = drives.measure(layout, flash or None)
            rows = measured(model, arms, flash or None, args)
            for arm in arms:
                found = forecast(work, own, drive, arm, capacity, (args.n_prompt, args.n_gen))
                prompt, decoded = (
                    next(r for r in rows if r.routing == arm.routing and bool(r.n_prompt) == of_prompt)
                    for of_prompt in (True, False)
                )
                pairs = {
                    "tok/s": (found.ts, decoded.avg_ts),
                    "MiB/token": (found.mib, decoded.read_mib_per_token or 0.0),
                    "first token": (found.first, args.n_prompt / prompt.avg_ts),
                }
                cells = [work.name, f"{flash:g} MB/s" if flash else f"disk, {drive.bytes_per_s / 1e6:.0f} MB/s", arm.routing]
                for name, (expected, seen) in pairs.items():
                    errors[name].append(expected / seen - 1)
                    cells += [f"{expected:.2f}", f"{seen:.2f}", f"{100 * errors[name][-1]:+.0f}%"]
                yield "| " + " | ".join(cells) + " |"
    for name, values in errors.items():
        sizes = [abs(e) for e in values]
        within = sum(e <= 0.25 for e in sizes)
        yield f"\n{name}: mean error {100 * statistics.mean(sizes):.0f}%, within 25% in {within} of {len(sizes)}"


def measured(model: str, arms: list[Arm], flash: float | None, args: argparse.Namespace) -> list[Row]:
    llm = Llama(
        model, routing=None, io="direct", n_ctx=args.n_prompt + args.n_gen + 8, n_threads=args.threads,
        n_threads_batch=args.threads, flash_mbps=flash, verbose=False,
    )  # fmt: skip
    with closing(llm):
        forced = forced_scores.bind(forced_scores.parse("synthetic"), llm.layout, args.n_prompt, args.n_gen)
        tokens = llm.tokenize(options.text(None).encode(), add_bos=True)
        return run_arms(llm, arms, tokens, args.n_prompt, args.n_gen, args.repetitions, replay=forced)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--routing", default="original,cache-prior:lambda=0.2", help="separated by commas")
    parser.add_argument(
        "--flash-mbps", type=lambda text: [float(x) for x in text.split(",")], default=[500.0, 1000.0], help="0: the disk's own"
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=256)
    parser.add_argument("-n", "--n-gen", type=int, default=96)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=cores())
    args = parser.parse_args()
    try:
        for line in table(args):
            print(line, flush=True)
    except CacherouteError as e:
        print(f"forecast_table: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
