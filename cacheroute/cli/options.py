"""Options that several commands share, so that a flag has one meaning everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import prompt
from cacheroute.cli.defaults import is_typed
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.install.machine import big_cores, cores
from cacheroute.routing.eviction import ONLINE
from cacheroute.routing.strategies import Routing

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

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


def refuse_unused(ctx: typer.Context, name: str, why: str) -> None:
    """Raises UsageError for an option that was typed where nothing uses it. `name`: of its parameter."""
    if is_typed(ctx, name):
        raise UsageError(f"--{name.replace('_', '-')} {why}")


def check_path(name: str, value: object, words: Iterable[str]) -> None:
    """Raises UsageError for a path that was typed as "", which Python takes for the folder it is in. `words`: all that was."""
    if isinstance(value, Path) and value == Path() and "." not in {word.rstrip("/").rpartition("=")[2] for word in words}:
        option = name.startswith("-")
        raise UsageError(f"{name if option else name.upper()} is empty; name a file{', or leave it out' if option else ''}.")


ModelOption = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="PATH|NAME",
        help="A GGUF file (of a split one, the first shard) or a model's name. [default: demo]",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("-t", "--threads", min=1, max=MAX_THREADS, help="Compute threads in total, at most. [default: all fast cores]"),
]
IoOption = Annotated[
    str,
    typer.Option(
        "--io",
        help="How misses are read: direct (past the page cache), buffered (through it) or auto (direct, unless slower); load: "
        "all experts are read with the model, as llama.cpp does it, which auto does with --budget all.",
    ),
]
FlashOption = Annotated[
    float | None,
    typer.Option("--flash-mbps", min=0.001, help="Limit reads to that many MB/s, to simulate a slower flash."),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget", help="Experts kept in memory: auto (as free memory allows), 50%, 30 (per layer), 2GiB (all layers) or all."
    ),
]
StudyBudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="Experts in memory: 50%, 30 (per layer), 2GiB (all layers) or all. [default: 50%]"),
]
PrefetchOption = Annotated[
    int,
    typer.Option("--prefetch", min=0, help="Prefetch at most that many experts of the next layer while a layer computes."),
]
WarmStartOption = Annotated[
    Path | None,
    typer.Option(
        "--warm-start", help="Start with the experts of a task in memory; the file is from `cacheroute trace --save-profile`."
    ),
]
PromptRoutingOption = Annotated[
    str,
    typer.Option(
        "--prompt-routing", help="How experts of prompts are chosen: original, keep:cover=0.9 (lossy, reads less) or tuned."
    ),
]
BudgetsOption = Annotated[str, typer.Option("--budget", help="Budgets, separated by commas.")]
EvictionOption = Annotated[str, typer.Option("--eviction", help=f"Which expert leaves a full cache: {', '.join(ONLINE)}.")]
EvictionsOption = Annotated[str, typer.Option("--eviction", help=f"Evictions, separated by commas: {', '.join(ONLINE)}.")]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        max=MAX_THREADS,
        help="Processes that score in parallel, each with the model loaded; they share the threads of -t.",
    ),
]
SeedOption = Annotated[int, typer.Option("-s", "--seed", min=-1, help="Seed of the sampler; -1: a random one.")]
TempOption = Annotated[float, typer.Option("--temp", min=0, help="Sampling temperature; 0: always the likeliest token.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample among the likeliest that sum to p.")]
MinPOption = Annotated[float, typer.Option("--min-p", min=0, max=1, help="Least probability, over the likeliest token's.")]
RepeatOption = Annotated[float, typer.Option("--repeat-penalty", min=0, help="Penalty for repeated tokens; 1: none.")]
CtxOption = Annotated[
    int, typer.Option("-c", "--ctx-size", min=0, help="Context in tokens, as 4096 or 4k; 0: as the model was trained.")
]
OutputOption = Annotated[
    str, typer.Option("-o", "--output", help="text (a table at 80 columns), md, csv, json, jsonl or sql, with all columns.")
]
WideOption = Annotated[bool, typer.Option("--wide", help="All columns, however wide.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No statistics, and no line at the start but what is lossy.")]
FileOption = Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.")]


def check_verbosity(*, verbose: bool, quiet: bool) -> None:
    """Raises UsageError where both are asked for."""
    if verbose and quiet:
        raise UsageError("-v asks for more and -q for less; give one of them.")


def threads(asked: int | None) -> int:
    """`asked`, or the fast cores that this process may use."""
    return asked or big_cores()


def say_threads(given: Mapping[str, Any]) -> None:
    """A line on stderr where -t has more threads than there are processors; `given`: the values of a command's options."""
    n, elsewhere = given.get("threads"), given.get("scheduler")
    if n and n > cores() and not (elsewhere or given.get("quiet")):
        here = "1 processor is" if cores() == 1 else f"{cores()} processors are"
        say(f"-t {n}: {here} here for them; with more threads than that, each waits for the others.")


def say_slow(routings: Iterable[Routing]) -> None:
    """One line on stderr for each policy in Python."""
    for routing in routings:
        if routing.policy:
            say(f"{routing}: Python is called for every token and layer, which is slower.")


def changes_nothing(llm: Llama) -> bool:
    """Whether a lossy routing has nothing to do: the model was loaded with all experts, which then stay, and none is missed."""
    return bool(llm.io == "load" and llm.routing and llm.routing.lossy and llm.routing.needs_misses)


def say_lossy(llm: Llama, *, quiet: bool = False) -> None:
    """Lines on stderr for what may run other experts than the model chooses; of one that cannot here, unless it is `quiet`."""
    if changes_nothing(llm):
        if not quiet:
            say(f"{llm.routing} changes nothing here: all experts are in memory, and it acts only where some are missing.")
    elif llm.routing and llm.routing.lossy:
        say(f"{llm.routing} is lossy: it may run other experts than the model chooses.")
        say_slow([llm.routing])
    if llm.prompt_routing.lossy:
        say(f"{llm.prompt_routing} is lossy: tokens of the prompt may run other experts than the model chooses.")


def names(text: str) -> list[str]:
    """The parts of a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def text(file: Path | None) -> str:
    """The text of a file, or the held-out text of the package. Raises UsageError when it cannot be read."""
    if file is None:
        return files("cacheroute").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    return prompt.from_file(file)
