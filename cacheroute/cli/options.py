"""Options that several commands share, so that a flag means the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import prompt
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.install.machine import cores
from cacheroute.routing.eviction import ONLINE
from cacheroute.routing.strategies import Routing

MAX_COUNT = 2**31 - 1
MAX_THREADS = 512  # GGML_MAX_N_THREADS
MAX_SEED = 2**32 - 2  # llama.cpp takes 2^32-1 for a random one


def check_number(name: str, value: object) -> None:
    """Raises UsageError for a number of the option `name` that C could not hold: it would be another number there."""
    limit = MAX_SEED if name == "--seed" else MAX_COUNT
    if isinstance(value, int) and value > limit:
        raise UsageError(f"{name} is at most {limit}, not {value}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} is a number, not {value}.")


ModelOption = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", metavar="PATH|NAME", help="A GGUF file, the first shard of a split one, or a name. [default: demo]"
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("-t", "--threads", min=1, max=MAX_THREADS, help="Compute threads in total. [default: all cores]")
]
IoOption = Annotated[
    str,
    typer.Option("--io", help="How misses are read: mmap (page cache), direct (past it), auto (the faster one, measured once)."),
]
FlashOption = Annotated[
    float | None,
    typer.Option("--flash-mbps", min=0.001, help="Limit reads to that many MB/s, as a slower flash would."),
]
PrefetchOption = Annotated[
    int,
    typer.Option("--prefetch", min=0, help="Experts of the next layer to read ahead while a layer computes, at most."),
]
WarmStartOption = Annotated[
    Path | None,
    typer.Option("--warm-start", help="Start with the experts of a task in memory; `cacheroute trace --save-profile` writes it."),
]
EvictionOption = Annotated[str, typer.Option("--eviction", help=f"Which expert a full cache evicts: {', '.join(ONLINE)}.")]
EvictionsOption = Annotated[str, typer.Option("--eviction", help=f"Evictions, separated by commas: {', '.join(ONLINE)}.")]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        max=MAX_THREADS,
        help="Processes that score side by side, each with the model; they share the threads of -t.",
    ),
]
FileOption = Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")]


def threads(asked: int | None) -> int:
    """`asked`, or the cores this process may use."""
    return asked or cores()


def say_slow(routings: Iterable[Routing]) -> None:
    """One line on stderr for each policy in Python."""
    for routing in routings:
        if routing.policy:
            say(f"{routing}: Python is asked for every token and layer, which is slower.")


def names(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def text(file: Path | None) -> str:
    """The text of a file, or the held-out text of the package. Raises UsageError when it cannot be read."""
    if file is None:
        return files("cacheroute").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    return prompt.from_file(file)
