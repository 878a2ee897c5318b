"""`cacheroute bench`: arms against each other on this machine."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import typer

from cacheroute import routing as routings
from cacheroute.bench import Arm, Row, run_arms
from cacheroute.cli import options
from cacheroute.errors import UsageError

_OUTPUTS = ("md", "csv", "json", "jsonl")


def bench(
    model: options.ModelOption = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="Tokens of the prompt.")] = 512,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", min=0, help="Tokens decoded one by one after it.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Runs of every arm, interleaved.")] = 5,
    budget: Annotated[str, typer.Option("--budget", help="Budgets, separated by commas.")] = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; see `cacheroute routing`.")
    ] = "original,cache-prior:lambda=0.2",
    eviction: Annotated[str, typer.Option("--eviction", help="Evictions, separated by commas.")] = "lru",
    io: Annotated[str, typer.Option("--io", help="How misses are read, separated by commas.")] = "mmap",
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Text whose tokens are run. [default: the held-out text of the package]")
    ] = None,
    threads: options.ThreadsOption = None,
    flash_mbps: options.FlashOption = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md, csv, json or jsonl.")] = "md",
) -> None:
    """Compare budgets, routings and evictions. Every arm runs the same tokens from the same cold start."""
    if output not in _OUTPUTS:
        raise UsageError(f"There is no output {output!r}; there are {', '.join(_OUTPUTS)}.")
    if n_prompt + n_gen == 0:
        raise UsageError("There is nothing to run; give -p or -n.")
    parsed = {r: routings.parse(r) for r in options.names(routing) if r != "tuned"}
    options.say_slow(parsed.values())
    typed = [str(parsed.get(r, r)) for r in options.names(routing)]
    settings = (options.names(budget), typed, options.names(eviction), options.names(io))
    if not all(settings):
        raise UsageError("There is nothing to compare; give at least one budget, routing and eviction.")
    from cacheroute import models, tuned
    from cacheroute.engine import Llama

    path = models.resolve(model)
    arms = list(dict.fromkeys(Arm(b, *tuned.resolve(path, b, r, e), i) for b, r, e, i in itertools.product(*settings)))
    llm = Llama(
        str(path),
        n_ctx=max(n_prompt + n_gen, 64),
        n_batch=max(n_prompt, 64),
        n_threads=options.threads(threads),
        n_threads_batch=options.threads(threads),
        flash_mbps=flash_mbps,
        verbose=False,
    )
    with closing(llm):
        for arm in arms:  # all settings are checked before the first run
            llm.configure(budget=arm.budget, routing=arm.routing, eviction=arm.eviction, io=arm.io)
        tokens = llm.tokenize(options.text(file).encode(), add_bos=True)
        with _progress(len(arms) * repetitions) as progress:
            rows = run_arms(llm, arms, tokens, n_prompt, n_gen, repetitions, progress)
    _write(rows, output)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's stderr, else nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("bench", total=total)
        started = itertools.count()
        yield lambda text: bar.update(task, completed=next(started), description=text)


def _write(rows: list[Row], output: str) -> None:
    if output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif output == "jsonl":
        for row in rows:
            print(json.dumps(asdict(row)))
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {"samples_ts": " ".join(f"{ts:.4f}" for ts in row.samples_ts)})
    else:
        print(_markdown(rows))


def _markdown(rows: list[Row]) -> str:
    head = ["test", "budget", "routing", "eviction", "io", "tok/s", "vs lru", "miss", "swapped", "read MiB/tok", "device MiB/tok"]
    head += ["resident/budget MiB"]
    table = [head, ["---"] * len(head)]
    for r in rows:
        paced = f" @ {r.flash_mbps:g} MB/s" if r.flash_mbps else ""
        device = "?" if r.device_mib_per_token is None else f"{r.device_mib_per_token:.2f}"
        ratio = "" if r.vs_lru is None else f"{r.vs_lru:.2f} ± {r.vs_lru_sd:.2f}"
        table.append(
            [
                r.test,
                f"{r.budget} ({r.budget_experts})",
                r.routing,
                r.eviction,
                r.io + paced,
                f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}",
                ratio,
                f"{100 * r.miss_rate:.1f}%",
                f"{100 * r.swap_rate:.1f}%",
                f"{r.read_mib_per_token:.2f}",
                device,
                ("?" if r.resident_mib is None else f"{r.resident_mib:.1f}") + f"/{r.budget_mib:.1f}",
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in table
    )
