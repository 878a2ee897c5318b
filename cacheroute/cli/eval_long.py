"""`cacheroute eval long`: whether the texts that a routing writes repeat themselves or drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import interval, options, progress, table
from cacheroute.cli.eval import ColumnOption, IoOption, TextOption
from cacheroute.cli.terminal import say
from cacheroute.evals import paired, rows
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.evals.long import LongRow


def long(
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: options.BudgetsOption = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; `original` always writes as well.")
    ] = "cache-prior:lambda=0.1",
    eviction: options.EvictionsOption = DEFAULT,
    n_places: Annotated[int, typer.Option("--places", min=1, help="Prompts, evenly spread over the text.")] = 8,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=4, help="Tokens of each prompt.")] = 64,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", min=8, help="Tokens written after each prompt.")] = 2000,
    temp: Annotated[float, typer.Option("--temp", min=0, help="Temperature of the sampled texts; 0: greedy ones only.")] = 0.8,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="Least probability, over the likeliest token's.")] = 0.05,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of the sampled texts and of the resampling.")] = 0,
    workers: options.WorkersOption = 1,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Measure whether the long texts that a routing writes repeat themselves or drift.

    Each routing continues pieces of a text, greedily and sampled with the same random numbers, and never ends a text. What it
    wrote is scored by `original`: a perplexity below that of the texts of `original` means that they loop, one above that they
    drift. distinct-n are different n-grams over all of them, and the longest repeat is the longest piece that comes twice. The
    first 100 tokens, with a cold cache, are also shown apart.

    Texts are stored in the cache folder, so an interrupted run is resumed.
    """
    table.check(output, wide=wide)
    from cacheroute.evals import loading
    from cacheroute.evals import long as evaluation
    from cacheroute.model import catalogue, experts, gguf_file

    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    arms = rows.arms(path, layout, options.names(budget), options.names(eviction), options.names(routing))
    decodings = [evaluation.Decoding(), *([evaluation.Decoding(temp, min_p, seed)] if temp else [])]
    source = loading.Source(file, column, prompt_tokens)
    asked = (path, source, n_places, n_predict, arms)
    with evaluation.session(*asked, threads=threads, n_workers=workers, io=io) as session:
        if n_places < paired.FEW_BLOCKS:
            say(f"few prompts ({n_places}): the interval is rough")
        groups = [
            [evaluation.Request(strategies.parse(a.routing), a.budget_experts, a.eviction, d, i) for i in range(n_places)]
            for d in decodings
            for a in arms
        ]
        # prompt by prompt, so that an interrupted run has the texts of all routings after the same prompts
        requests = [request for of_prompt in zip(*groups, strict=True) for request in of_prompt]
        total, missing = len(requests), session.missing(requests)
        if missing < total:
            say(f"{total - missing} of {total} texts are in the cache")
        with progress.bar("writing", max(missing, 1)) as advance, progress.resumable():
            session.after = lambda text: advance(1, f"{progress.label(text.routing)} {text.budget} experts")
            session.write(requests)
        texts = [session.write(group) for group in groups]
    found: list[LongRow] = []
    base = texts[0]
    for i, written in enumerate(texts):
        a = arms[i % len(arms)]
        base = written if a.routing == "original" else base  # comes first among the arms
        found.append(
            evaluation.LongRow(
                model=layout.model or path.name,
                text=source.name,
                **asdict(a),
                n_prompt=prompt_tokens,
                decoding=str(decodings[i // len(arms)]),
                **asdict(evaluation.summary(base, written, seed=seed)),
            )
        )
    table.write(found, output, _view(found), wide=wide, name="long")


def _view(found: Sequence[LongRow]) -> table.View:
    first = found[0]
    one_budget, names, settings = rows.in_common(found)
    cells = [
        ["decoding", *([] if one_budget else ["budget"]), "routing", "distinct-2", "-4", "repeat", "ppl, cold", "warm", "miss %"]
    ]
    for r, name in zip(found, names, strict=True):
        figures = [f"{r.distinct2:.3f}", f"{r.distinct4:.3f}", f"{r.longest_repeat:.0f}"]
        figures += [f"{r.ppl_cold:.2f}", f"{r.ppl_warm:.2f}", f"{100 * r.miss_warm:.1f}"]
        cells.append([r.decoding, *([] if one_budget else [r.budget]), name, *figures])
    above = f"{first.model}, {first.text}: {first.n_texts} texts of {first.n_tokens} tokens{settings}"
    below = [
        f"cold: the first {first.n_cold} tokens; repeat: tokens of the longest piece that comes twice, mean of the texts",
        *(_conclusion(r) for r in found if r.routing != "original"),
    ]
    return table.View(cells, _cells(found), above=[above], below=below)


def _conclusion(r: LongRow) -> str:
    change, low, high = (None if v is None else paired.percent(v) for v in (r.delta_nll, r.delta_nll_low, r.delta_nll_high))
    percent = interval.figure(change, low, high, digits=1, tight=True)
    return f"{r.decoding}, {tuned.short(r.routing)} at {r.budget} (lossy): perplexity of its texts {percent} %"


def _cells(found: Sequence[LongRow]) -> list[list[str]]:
    head = ["decoding", "budget", "routing", "eviction", "distinct-1", "-2", "-4", "longest repeat", "of all"]
    head += ["same first", "ppl", "cold", "warm", "change of nll [95%]", "miss cold", "warm", "texts", "tokens"]
    cells = [head]
    for r in found:
        change = interval.figure(r.delta_nll, r.delta_nll_low, r.delta_nll_high, digits=4)
        cells.append(
            [
                r.decoding,
                f"{r.budget} ({r.budget_experts})",
                tuned.short(r.routing),
                r.eviction,
                *(f"{v:.3f}" for v in (r.distinct1, r.distinct2, r.distinct4)),
                f"{r.longest_repeat:.1f}",
                str(r.longest_repeat_most),
                f"{r.same:.0f}",
                *(f"{v:.2f}" for v in (r.ppl, r.ppl_cold, r.ppl_warm)),
                "baseline" if r.routing == "original" else change,
                *(f"{100 * v:.1f}%" for v in (r.miss_cold, r.miss_warm)),
                str(r.n_texts),
                str(r.n_tokens),
            ]
        )
    return cells
