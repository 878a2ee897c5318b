"""`cacheroute tune`: finds the routing with the fewest misses within a limit on the loss of quality."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import frontier_files, options, progress, table, tune_files, tune_prompt
from cacheroute.cli.defaults import is_typed
from cacheroute.cli.eval import ChunkOption, ColumnOption, IoOption, TextOption
from cacheroute.cli.eval_prompt import AfterOption, HistoryOption, PlacesOption, PromptTokensOption
from cacheroute.cli.frontier_files import FilesOption, ReferenceOption
from cacheroute.cli.terminal import say
from cacheroute.cli.tune_report import print_report, report_of, save, say_doubt, say_trial, why_not
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import paired
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.model.experts import ExpertLayout

_OF_PROMPTS = ("prompt_tokens", "history", "after", "n_places")
_OF_TOKENS = ("max_ppl_increase", "uniform", "strategy", "chunk", "limit", "price_tokens", "price_groups", "workers")


def tune(
    ctx: typer.Context,
    model: options.ModelOption = None,
    files: FilesOption = None,
    reference: ReferenceOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: options.StudyBudgetOption = None,
    max_ppl_increase: Annotated[
        str, typer.Option("--max-ppl-increase", help="Limit on the rise of the perplexity: the upper end of its 95% interval.")
    ] = "1%",
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Tune --prompt-routing instead: the smallest cover within --max-kl.")
    ] = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            min=0,
            help="Limit on the mean KL in nats per token instead: the upper end of its 95% interval; with --prompt, of the "
            "tokens after it. [default with --prompt: 0.02]",
        ),
    ] = None,
    prompt_tokens: PromptTokensOption = 512,
    history: HistoryOption = 0,
    after: AfterOption = 64,
    n_places: PlacesOption = 24,
    uniform: Annotated[bool, typer.Option("--uniform", help="Fit one value for all layers instead of one per layer.")] = False,
    strategy: Annotated[
        str, typer.Option("--strategy", help="Strategy for --uniform (`cacheroute routing` lists them).")
    ] = "cache-prior",
    eviction: options.EvictionOption = DEFAULT,
    chunk: ChunkOption = 512,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Use at least that many scored tokens of the text, in whole chunks.")
    ] = 20000,
    price_tokens: Annotated[
        int, typer.Option("--price-tokens", min=1, help="Tokens on which the cost of rerouting each layer is measured.")
    ] = 512,
    price_groups: Annotated[
        int, typer.Option("--price-groups", min=1, help="Groups of neighbouring layers whose cost is measured together.")
    ] = 15,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of the split and of the resampling.")] = 0,
    workers: options.WorkersOption = 1,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    flash_mbps: Annotated[
        float | None,
        typer.Option("--flash-mbps", min=0.001, help="With --files: forecast the speed behind a drive of that many MB/s."),
    ] = None,
    wide: options.WideOption = False,
    output: Annotated[str, typer.Option("-o", "--output", help="text (a table at 80 columns), md or json.")] = "text",
) -> None:
    """Find the routing that misses least within a limit on loss.

    The loss is the rise of the perplexity of your text or, with --max-kl, the mean KL(original || routed) of its tokens, which
    takes fewer tokens to be sure of. Each layer gets its own lambda and its own share of the budget: layers that lose most by
    rerouting get more cache. With --uniform all layers are alike. Scores are stepped and paired with `original`. Two thirds of
    the chunks are used to fit, one third is held out to validate the choice.

    The result is a file that `--routing tuned` uses for this model and budget. Scores are kept in the cache folder: a command
    that was stopped resumes when it is run again.

    With --prompt it finds a prompt routing, which `--prompt-routing tuned` uses, at places of the text as `eval prompt` does.

    With --files it chooses among several quantisations of one model, each with as many experts as fit the same bytes: the loss is
    against `original` of the reference, so that quantising and rerouting together stay within the limit. With --prompt as well
    a prompt routing for that file, too.
    """
    allowed = _percent(max_ppl_increase)
    frontier_files.check_options(ctx, files, reference)
    if files is None:
        options.refuse_unused(ctx, "flash_mbps", "is for the forecast of --files; leave it out.")
    for name in _OF_TOKENS if prompt and files is None else () if prompt else _OF_PROMPTS:
        if is_typed(ctx, name):
            option = "--places" if name == "n_places" else "--" + name.replace("_", "-")
            raise UsageError(f"{option} is not an option {'with' if prompt else 'without'} --prompt; leave it out.")
    table.check(output, ("text", "md", "json"), wide=wide)
    ppl_given = is_typed(ctx, "max_ppl_increase")
    if ppl_given and is_typed(ctx, "max_kl"):
        raise UsageError("Give --max-ppl-increase or --max-kl, not both.")
    from cacheroute.evals.prompts import Lengths

    lengths = Lengths(history, prompt_tokens, after)
    if prompt and files is None:
        with progress.resumable():
            allowed_kl = 0.02 if max_kl is None else max_kl
            found = tune_prompt.search(model, file, column, budget, eviction, allowed_kl, lengths, n_places, seed, threads, io)
            tune_prompt.show(found[0], output, wide=wide)
            tune_prompt.say_result(*found)
        return
    if strategy != "cache-prior" and not uniform:
        raise UsageError(f"{strategy} is fitted with --uniform only; per layer there is cache-prior.")
    from cacheroute.evals import loading, scorer
    from cacheroute.evals import tune as tuning
    from cacheroute.model import catalogue, experts, gguf_file

    by_kl = max_kl is not None and not ppl_given
    limits: dict[str, Any] = {"max_ppl_increase": None if by_kl else allowed, "max_kl": max_kl if by_kl else None}
    prices: dict[str, Any] = {
        "uniform": uniform,
        "strategy": strategy,
        "price_tokens": price_tokens,
        "price_groups": price_groups,
    }
    source = loading.Source(file, column, chunk, None, limit)
    if files is not None:
        goal = tuning.Goal(budget=0, eviction=eviction, seed=seed, **limits, **prices)
        chosen = frontier_files.choose(files, reference)
        if uniform:
            _check_strategy(strategy, chosen.copies[0].layout)
        settings = frontier_files.Settings(threads, workers, None, io, flash_mbps, [eviction])
        wanted = tune_files.PromptGoal(lengths, n_places, 0.02 if max_kl is None else max_kl) if prompt else None
        with progress.resumable():
            tune_files.run(chosen, budget, goal, source, settings, wanted, output, wide=wide)
        return
    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    if uniform:
        _check_strategy(strategy, layout)
    capacity = budgets.parse(budget, layout).capacity
    if capacity == layout.n_expert:
        raise UsageError(f"A budget of {budget} has all experts in memory: nothing is missed, and there is nothing to tune.")
    budget = budget or budgets.default_name(layout)
    goal = tuning.Goal(budget=capacity, eviction=eviction, seed=seed, **limits, **prices)
    with scorer.session(path, source, threads=threads, n_workers=workers, io=io, evictions=[eviction]) as session:
        fit, held_out = tuning.split(len(session.chunks), seed)
        if len(held_out) < paired.FEW_BLOCKS:
            say(f"few chunks ({len(session.chunks)}): intervals will be wide, and little may fit")
        search = tuning.Search(session, goal, fit, held_out, report=say_trial)
        with progress.bar("tuning", search.expected_work()) as advance, progress.resumable():
            session.after = lambda cell: advance(tuning.work(session.chunks[cell.chunk]), progress.label(cell.routing))
            if session.n_kept:
                say(f"{session.n_kept} scores of earlier runs are used again")
            if session.n_without_kl:
                say(f"{session.n_without_kl} of them are without a KL; those that are wanted are scored again")
            outcome = search.tune().if_it_saves()
            past = search.mass_past_k()
    if past is not None and (flat := sum(past) / len(past)) > 0.5:
        say(
            f"the router is flat: experts past rank {layout.n_used} have {100 * flat:.0f}% of its mass; "
            "small changes of its scores swap many experts"
        )
    saved = None
    if outcome.chosen:
        saved = tuned.path(path, capacity)
        made_from = {
            "fingerprint": gguf_file.fingerprint(path),
            "text": source.name,
            "chunk": chunk,
            "n_chunks": len(session.chunks),
            "mass_past_k": past,
        }
        try:
            save(tuning.tuned_routing(outcome, goal, layout, made_from), saved)
        except CacherouteError:  # what was found is printed all the same
            print_report(report_of(layout, source.name, budget, goal, outcome, None, past), output, wide=wide)
            raise
    print_report(report_of(layout, source.name, budget, goal, outcome, saved, past), output, wide=wide)
    if not outcome.chosen:
        raise CacherouteError(why_not(outcome, goal))
    say_doubt(outcome, goal)
    say(f"use it with --routing tuned --budget {budget}; it is in {saved}")


def _check_strategy(strategy: str, layout: ExpertLayout) -> None:
    from cacheroute.evals import tune as tuning

    if not tuning.ladder(strategy, layout):
        names = ", ".join(name for name in strategies.STRATEGIES if tuning.ladder(name, layout))
        raise UsageError(f"{strategy!r} has nothing to tune; there are {names}.")


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"{text!r} is not a limit; give percent above 0 and up to 100, such as 1%.")
    return float(match[1])
