"""`cacheroute simulate`: replays a trace with other budgets, routings and evictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import options, progress, table
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.routing import prompt_routing as prompts
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import ALL, BELADY, DEFAULT
from cacheroute.trace import simulate as simulator
from cacheroute.trace import trace_file
from cacheroute.trace.simulate import Row


def simulate(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace from `cacheroute trace`.")],
    budget: options.BudgetsOption = "25%,50%,75%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; see `cacheroute routing`.")
    ] = "original,cache-prior:lambda=0.2",
    eviction: Annotated[
        str,
        typer.Option(
            "--eviction", help=f"Evictions, separated by commas: {', '.join(ALL)} (the offline optimum, with `original` only)."
        ),
    ] = f"lru,{DEFAULT},belady",
    prompt_routing: Annotated[
        str, typer.Option("--prompt-routing", help="How experts of prompts are chosen; several separated by commas.")
    ] = "original",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Add a row for each layer.")] = False,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Replay the tokens in random order: the same experts without locality.")
    ] = False,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of --shuffle.")] = 0,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Replay a trace with other budgets and routings.

    It goes through the same router as a live run. Nothing is read: misses are counted, and MiB are misses x bytes of an
    expert.
    """
    table.check(output, wide=wide)
    if not shuffle:
        options.refuse_unused(ctx, "seed", "is of --shuffle; give both, or neither.")
    of_prompts = prompts.parse_list(prompt_routing)
    arms = simulator.arms(options.names(budget), strategies.parse_list(routing), options.names(eviction), of_prompts)
    if not arms:
        raise UsageError("There is nothing to compare; give at least one budget, routing and eviction.")
    options.say_slow({arm.routing.text: arm.routing for arm in arms}.values())
    trace = trace_file.read(file)
    if not trace.complete:
        say(f"{file} was cut short; its complete records are replayed.")
    with progress.bar("simulate", len(arms)) as advance:
        rows = simulator.run(
            trace,
            arms,
            per_layer=per_layer,
            shuffle=seed if shuffle else None,
            progress=lambda arm: advance(1, f"{arm.routing} {arm.eviction} {arm.budget}"),
        )
    say("Open-loop: the scores are the recorded ones and do not change with the choices.")
    if any(arm.eviction == BELADY for arm in arms):
        say(
            "belady is shown with `original` only: it needs the future choices, and those of other routings depend on the cache.",
        )
    table.write(rows, output, _view(rows), wide=wide, name="simulate")


def _view(rows: list[Row]) -> table.View:
    first = rows[0]
    shuffled = ", in random order" if first.shuffled else ""
    above = f"{first.model or 'a trace'}: {first.tokens} decoded tokens{shuffled}"
    return table.View(_brief(rows), _cells(rows), above=[above], below=list(_conclusions(rows)))


def _brief(rows: list[Row]) -> list[list[str]]:
    layered, rerouted = any(row.layer is not None for row in rows), len({row.prompt_routing for row in rows}) > 1
    head = ["budget", "routing", "eviction", *(["layer"] if layered else []), "miss %", "missed MiB/token"]
    cells = [[*head, "prompt MiB" if rerouted else "swapped %"]]
    for r in rows:
        cells.append(
            [
                r.budget,
                _name(r) if rerouted else tuned.short(r.routing),
                r.eviction,
                *(["all" if r.layer is None else str(r.layer)] if layered else []),
                f"{100 * r.miss_rate:.1f}",
                f"{r.missed_mib_per_token:.2f}",
                table.number(r.prompt_read_mib) if rerouted else f"{100 * (r.swap_rate + r.drop_rate):.1f}",
            ]
        )
    return cells


def _name(row: Row) -> str:
    return tuned.short(row.routing) + ("" if row.prompt_routing == prompts.ORIGINAL else f", {row.prompt_routing}")


def _conclusions(rows: Sequence[Row]) -> Iterator[str]:
    """At each budget the online choice that missed least, against `original` with lru."""
    for budget in dict.fromkeys(row.budget for row in rows):
        own = [row for row in rows if row.budget == budget and row.layer is None and row.eviction != BELADY]
        if len(own) < 2:
            continue
        base = next((row for row in own if (row.routing, row.eviction) == ("original", "lru")), None)
        # of those that miss alike the one that changes nothing, then the one that nobody has to ask for
        best = min(own, key=lambda row: (row.missed_mib_per_token, row.routing != "original", row.eviction != DEFAULT))
        lossy = "" if best.routing == "original" else " (lossy)"
        of = f" of {base.missed_mib_per_token:.2f}" if base and base is not best else ""
        missed = f"misses {best.missed_mib_per_token:.2f}{of} MiB a token"
        yield f"Fewest misses at {budget}: {tuned.short(best.routing)}{lossy} with {best.eviction}, {missed}"


def _cells(rows: list[Row]) -> list[list[str]]:
    layered = any(row.layer is not None for row in rows)
    head = ["budget", "routing", "eviction", "miss", "missed MiB/token", "swapped", "dropped", "lost mass", "lifetime"]
    with_prompts = any(row.prompt_tokens for row in rows)
    if with_prompts:
        head += ["prompt routing", "prompt reads", "prompt MiB", "prompt swapped"]
    cells = [head[:3] + ["layer"] * layered + head[3:]]
    for r in rows:
        layer = ["all" if r.layer is None else str(r.layer)] if layered else []
        cells.append(
            [
                f"{r.budget} ({r.budget_experts})",
                tuned.short(r.routing) + (" (shuffled)" if r.shuffled else ""),
                r.eviction,
                *layer,
                f"{100 * r.miss_rate:.1f}%",
                f"{r.missed_mib_per_token:.3f}",
                f"{100 * r.swap_rate:.1f}%",
                f"{100 * r.drop_rate:.1f}%",
                f"{100 * r.lost_mass:.2f}%",
                "" if r.lifetime_tokens is None else f"{r.lifetime_tokens:.1f}",
                *(_prompt_cells(r) if with_prompts else []),
            ]
        )
    return cells


def _prompt_cells(r: Row) -> list[str]:
    mib = "?" if r.prompt_read_mib is None else f"{r.prompt_read_mib:.3f}"
    return [r.prompt_routing, "?" if r.prompt_reads is None else str(r.prompt_reads), mib, f"{100 * r.prompt_swap_rate:.1f}%"]
