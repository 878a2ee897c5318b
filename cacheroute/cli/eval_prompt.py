"""`cacheroute eval prompt`: measures what a prompt routing costs in the answer after it, and what it saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import interval, options, progress, table
from cacheroute.cli.eval import ColumnOption, TextOption
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.evals import paired
from cacheroute.routing import prompt_routing as prompts
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.evals.prompts import PromptRow, PromptScore, PromptScorer, Request, Summary

PromptTokensOption = Annotated[
    int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt, which is what the prompt routing acts on.")
]
HistoryOption = Annotated[
    int,
    typer.Option("--history", min=0, help="Tokens before the prompt, evaluated losslessly: the turns of a chat before this one."),
]
AfterOption = Annotated[int, typer.Option("--after", min=1, help="Tokens after the prompt, decoded one by one and scored.")]
PlacesOption = Annotated[int, typer.Option("--places", min=1, help="Places of the text, evenly spread.")]
PromptIoOption = Annotated[str | None, typer.Option("--io", help="How misses are read: auto, direct, buffered. [default: auto]")]


def prompt(
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: options.BudgetsOption = "50%",
    prompt_routing: Annotated[
        str, typer.Option("--prompt-routing", help="Prompt routings, separated by commas; `original` is always scored as well.")
    ] = "keep:cover=0.95,keep:cover=0.85,keep:cover=0.7,keep:cover=0.5",
    eviction: options.EvictionsOption = DEFAULT,
    prompt_tokens: PromptTokensOption = 512,
    history: HistoryOption = 0,
    after: AfterOption = 64,
    n_places: PlacesOption = 20,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of the resampling.")] = 0,
    threads: options.ThreadsOption = None,
    io: PromptIoOption = None,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Measure what a prompt routing changes in the tokens after the prompt, and what it saves in reads.

    At each place of the text the tokens after a lossy prompt are decoded one by one by `original`, and compared with the same
    tokens after a lossless prompt; intervals are from resampled places. Scores are stored in the cache folder.
    """
    table.check(output, wide=wide)
    from cacheroute.evals import prompts as evaluation
    from cacheroute.model import catalogue, experts, gguf_file
    from cacheroute.routing import budget as budgets

    wanted = [prompts.PromptRouting(), *(p for p in prompts.parse_list(prompt_routing) if p.lossy)]
    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    settings = list(itertools.product(options.names(budget), options.names(eviction)))
    if not settings:
        raise UsageError("There is nothing to score; give at least one budget and eviction.")
    lengths = evaluation.Lengths(history, prompt_tokens, after)
    with evaluation.session(path, file, column, lengths, n_places, threads=threads, io=io, settings=settings) as session:
        n = len(session.places)
        say_few(n, n_places)
        arms = [(b, e, budgets.parse(b, layout).capacity, p) for b, e in settings for p in wanted]
        # place by place: the lossless run of a place is kept for its lossy ones
        requests = [evaluation.Request(p, capacity, e, i) for i in range(n) for _, e, capacity, p in arms]
        with scoring(session, requests):
            for request in requests:
                session.score(request)
        rows: list[PromptRow] = []
        base: Sequence[PromptScore] = ()
        for b, e, capacity, p in arms:
            scores = session.scores(p, capacity, e, range(n))
            base = scores if not p.lossy else base
            found = evaluation.summary(base, scores, len(layout.layers), seed=seed)
            rows.append(
                evaluation.PromptRow(
                    model=layout.model or path.name,
                    text=file.name if file else "heldout.txt",
                    budget=b,
                    budget_experts=capacity,
                    eviction=e,
                    prompt_routing=str(p),
                    n_history=history,
                    n_prompt=prompt_tokens,
                    **vars(found),
                )
            )
    table.write(rows, output, _view(rows), wide=wide, name="prompt")


def say_few(n_places: int, wanted: int) -> None:
    """One line on stderr where a text has fewer places than were asked for, or few."""
    if n_places < wanted:
        say(f"the text has {n_places} place{'' if n_places == 1 else 's'} of that length")
    if n_places < paired.FEW_BLOCKS:
        say(f"few places ({n_places}): the intervals are rough")


@contextmanager
def scoring(scorer: PromptScorer, requests: Sequence[Request]) -> Iterator[None]:
    """Shows what is computed of those requests; prints first how many of them are in the cache."""
    total, missing = len(requests), scorer.missing(requests)
    if missing < total:
        say(f"{total - missing} of {total} scores are in the cache")
    with progress.bar("scoring", max(missing, 1)) as advance, progress.resumable():
        scorer.after = lambda score: advance(1, f"{score.routing} {score.budget} experts")
        yield


def _view(rows: Sequence[PromptRow]) -> table.View:
    first = rows[0]
    one = len({(r.budget, r.eviction) for r in rows}) == 1
    history = f"{first.n_history} tokens before, " if first.n_history else ""
    tokens = f"{history}prompts of {first.n_prompt}, {first.n_tokens} tokens after {first.n_places} of them"
    common = f", {first.budget_experts} experts of each layer ({first.budget}), {first.eviction}" if one else ""
    cells = [[*([] if one else ["budget"]), *BRIEF]]
    for r in rows:
        name = r.prompt_routing if one else f"{r.prompt_routing}, {r.eviction}"
        cells.append([*([] if one else [r.budget]), name, *brief_figures(r)])
    return table.View(cells, _cells(rows), above=[f"{first.model}, {first.text}: {tokens}{common}"], below=_conclusion(rows))


def _conclusion(rows: Sequence[PromptRow]) -> list[str]:
    """The prompt routing that saved most, and its price."""
    best = max(rows, key=lambda r: r.saved)
    if best.prompt_routing == "original" or best.saved <= 0:
        return []
    return [
        f"Fewest reads: {best.prompt_routing} (lossy) at {best.budget} reads {100 * best.saved:.0f}% less for a prompt; "
        f"the tokens after it change by a KL of {1000 * best.kl:.1f} millinats"
    ]


BRIEF = ("prompt routing", "read MiB", "saved %", "swapped %", "KL millinats [95%]", "same top-1 %")


def brief_figures(r: Summary) -> list[str]:
    """The cells of BRIEF after the first."""
    kl = interval.mean_kl(r, tight=True)
    return [f"{r.read_mib:.1f}", f"{100 * r.saved:.0f}", f"{100 * r.swap_rate:.1f}", kl, f"{100 * r.top1:.1f}"]


def _cells(rows: Sequence[PromptRow]) -> list[list[str]]:
    head = ["budget", "eviction", "prompt routing", "experts read a layer", "read MiB", "saved", "swapped"]
    head += ["KL millinats [95%]", "p99", "first", "delta nll millinats [95%]", "same top-1", "tokens"]
    return [head, *([f"{r.budget} ({r.budget_experts})", r.eviction, r.prompt_routing, *figures(r)] for r in rows)]


def figures(r: Summary) -> list[str]:
    """The cells of the figures of one prompt routing."""
    return [
        f"{r.reads_per_layer:.1f}",
        f"{r.read_mib:.2f}",
        f"{100 * r.saved:.0f}%",
        f"{100 * r.swap_rate:.1f}%",
        interval.mean_kl(r),
        f"{1000 * r.kl_p99:.0f}",
        f"{1000 * r.kl_first:.1f}",
        interval.figure(r.delta_nll, r.delta_nll_low, r.delta_nll_high, factor=1000, digits=1),
        f"{100 * r.top1:.1f}%",
        str(r.n_tokens),
    ]
