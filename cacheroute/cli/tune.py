"""`cacheroute tune`: finds the routing with the fewest misses within a limit on the loss of quality."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import options, progress, table, tune_prompt
from cacheroute.cli.eval import ChunkOption, ColumnOption, IoOption, TextOption, brief_kl, same_top, whole_kl
from cacheroute.cli.eval_prompt import AfterOption, HistoryOption, PlacesOption, PromptTokensOption
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import paired
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import EXPERTS

if TYPE_CHECKING:
    from cacheroute.evals.divergence import Divergence
    from cacheroute.evals.tune import Goal, Outcome, Trial
    from cacheroute.model.experts import ExpertLayout


@dataclass(frozen=True)
class TrialRow:
    """One trial. `part` is fit, held out, or "fit, left early"; the change of the perplexity in % against `original`, with its
    95% interval; `kl` ... `top1_se` as in `eval perplexity`, in nats per token. `passed`: the upper end of the interval is
    within the limit; on the held-out part, the estimate itself. `within`: "yes" where the upper end is, "perhaps" where the
    estimate is. MiB are misses x bytes of an expert."""

    routing: str
    part: str
    n_tokens: int
    ppl_increase: float
    ppl_increase_low: float | None
    ppl_increase_high: float | None
    missed_mib_per_token: float
    original_missed_mib_per_token: float
    miss_rate: float
    passed: bool
    within: str
    kl: float
    kl_low: float | None
    kl_high: float | None
    kl_p99: float
    top1: float
    top1_se: float

    @property
    def saved(self) -> float:
        """Share of the bytes that `original` misses and this routing does not."""
        return 1 - self.missed_mib_per_token / self.original_missed_mib_per_token if self.original_missed_mib_per_token else 0.0


@dataclass(frozen=True)
class Report:
    """The result: `profile` is the file that `--routing tuned` takes, null when nothing fits. One of the limits is null:
    `max_ppl_increase` in %, `max_kl` in nats per token. `mass_past_k`: of each layer's router, the share of its mass that experts
    past rank K have; null with --uniform, which does not look at it."""

    model: str
    text: str
    budget: str
    budget_experts: int
    eviction: str
    max_ppl_increase: float | None
    max_kl: float | None
    routing: str | None
    parameters: list[dict[str, float]] | None
    profile: str | None
    mass_past_k: list[float] | None
    trials: list[TrialRow]


_OF_PROMPTS = ("prompt_tokens", "history", "after", "n_places")
_OF_TOKENS = ("max_ppl_increase", "uniform", "strategy", "chunk", "limit", "price_tokens", "price_groups", "workers")


def tune(
    ctx: typer.Context,
    model: options.ModelOption = None,
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
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use about that many scored tokens of the text.")] = 20000,
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
    """
    allowed = _percent(max_ppl_increase)
    for name in _OF_TOKENS if prompt else _OF_PROMPTS:
        if _given(ctx, name):
            option = "--places" if name == "n_places" else "--" + name.replace("_", "-")
            raise UsageError(f"{option} is not an option {'with' if prompt else 'without'} --prompt; leave it out.")
    table.check(output, ("text", "md", "json"), wide=wide)
    ppl_given = _given(ctx, "max_ppl_increase")
    if ppl_given and _given(ctx, "max_kl"):
        raise UsageError("Give --max-ppl-increase or --max-kl, not both.")
    if prompt:
        from cacheroute.evals.prompts import Lengths

        lengths = Lengths(history, prompt_tokens, after)
        with _resumable():
            allowed_kl = 0.02 if max_kl is None else max_kl
            tune_prompt.run(model, file, column, budget, eviction, allowed_kl, lengths, n_places, seed, threads, io, output, wide)
        return
    if strategy != "cache-prior" and not uniform:
        raise UsageError(f"{strategy} is fitted with --uniform only; per layer there is cache-prior.")
    from cacheroute.evals import loading, scorer
    from cacheroute.evals import tune as tuning
    from cacheroute.model import catalogue, experts, gguf_file

    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    if uniform and not tuning.ladder(strategy, layout):
        names = ", ".join(name for name in strategies.STRATEGIES if tuning.ladder(name, layout))
        raise UsageError(f"{strategy!r} has nothing to tune; there are {names}.")
    capacity = budgets.parse(budget, layout).capacity
    budget = budget or budgets.default_name(layout)
    by_kl = max_kl is not None and not ppl_given
    goal = tuning.Goal(
        budget=capacity,
        eviction=eviction,
        max_ppl_increase=None if by_kl else allowed,
        uniform=uniform,
        strategy=strategy,
        price_tokens=price_tokens,
        price_groups=price_groups,
        seed=seed,
        max_kl=max_kl if by_kl else None,
    )
    source = loading.Source(file, column, chunk, None, limit)
    with scorer.session(path, source, threads=threads, n_workers=workers, io=io, evictions=[eviction]) as session:
        fit, held_out = tuning.split(len(session.chunks), seed)
        if len(held_out) < paired.FEW_BLOCKS:
            say(f"few chunks ({len(session.chunks)}): intervals will be wide, and little may fit")
        search = tuning.Search(session, goal, fit, held_out, report=_print_trial)
        with progress.bar("tuning", search.expected_work()) as advance, _resumable():
            session.after = lambda cell: advance(tuning.work(session.chunks[cell.chunk]), progress.label(cell.routing))
            if session.n_kept:
                say(f"{session.n_kept} scores of earlier runs are used again")
            if session.n_without_kl:
                say(f"{session.n_without_kl} of them are without a KL; those that are wanted are scored again")
            outcome = search.tune()
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
        _save(tuning.tuned_routing(outcome, goal, layout, made_from), saved)
    _print(_report(layout, source.name, budget, goal, outcome, saved, past), output, wide=wide)
    if not outcome.chosen:
        raise CacherouteError(_why_not(outcome, goal))
    _say_doubt(outcome, goal)
    say(f"use it with --routing tuned --budget {budget}; it is in {saved}")


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"{text!r} is not a limit; give percent above 0 and up to 100, such as 1%.")
    return float(match[1])


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; run the same command to resume.") from None


def _print_trial(trial: Trial) -> None:
    say(
        f"{trial.routing}: {_change(trial.difference)} % of perplexity, {_kl(trial.kl)} millinats of KL on "
        f"{trial.difference.n_tokens} tokens, missed {trial.missed_mib_per_token:.2f} MiB/token",
    )


def _change(d: paired.Difference | TrialRow) -> str:
    return f"{d.ppl_increase:+.2f} [{table.signed(d.ppl_increase_low)}, {table.signed(d.ppl_increase_high)}]"


def _kl(d: Divergence) -> str:
    return whole_kl(d.kl, d.kl_low, d.kl_high)


def _save(routing: tuned.TunedRouting, path: Path) -> None:
    """Replaces an earlier file of the same model and budget, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CacherouteError(f"{path.parent} cannot be made ({e.strerror}).") from None
    if path.exists():
        say(f"this replaces the routing tuned for {_noted_limit(tuned.load(path).notes)}")
    tuned.save(routing, path, force=True)


def _report(
    layout: ExpertLayout, text: str, budget: str, goal: Goal, outcome: Outcome, saved: Path | None, past: list[float] | None
) -> Report:
    chosen = outcome.chosen.routing if outcome.chosen else None
    layers = (chosen.layers or (chosen,)) if chosen else ()
    return Report(
        model=layout.model,
        text=text,
        budget=budget,
        budget_experts=goal.budget,
        eviction=goal.eviction,
        max_ppl_increase=goal.max_ppl_increase,
        max_kl=goal.max_kl,
        routing=str(chosen) if chosen else None,
        parameters=[r.parameters for r in layers] if chosen else None,
        profile=str(saved) if saved else None,
        mass_past_k=past,
        trials=[_trial_row(t) for t in sorted(outcome.trials, key=lambda t: t.validates)],
    )


def _trial_row(trial: Trial) -> TrialRow:
    d = trial.difference
    return TrialRow(
        routing=str(trial.routing),
        part="held out" if trial.validates else "fit" if trial.complete else "fit, left early",
        n_tokens=d.n_tokens,
        ppl_increase=d.ppl_increase,
        ppl_increase_low=d.ppl_increase_low,
        ppl_increase_high=d.ppl_increase_high,
        missed_mib_per_token=trial.missed_mib_per_token,
        original_missed_mib_per_token=trial.original_missed_mib_per_token,
        miss_rate=trial.miss_rate,
        passed=trial.passed,
        within=trial.within,
        **asdict(trial.kl),
    )


def _print(report: Report, output: str, *, wide: bool) -> None:
    if output == "json":
        print(json.dumps(asdict(report), indent=2))
        return
    table.write([], output, table.View(_brief(report), _whole(report), [_what_was_tuned(report)], _conclusion(report)), wide=wide)
    if report.parameters and len(report.parameters) > 1 and (wide or output == "md"):
        print("\n" + "\n".join(_by_layer(report.parameters)))


def _what_was_tuned(report: Report) -> str:
    where = f"{report.budget_experts} experts of each layer ({report.budget}), {report.eviction}"
    limit = _limit(report.max_ppl_increase, report.max_kl)
    return f"{report.model}, {report.text}: {where}; at most {limit}; KLD in millinats, MiB missed per token"


def _limit(max_ppl_increase: float | None, max_kl: float | None) -> str:
    return f"{max_ppl_increase:g}% of perplexity" if max_kl is None else f"{1000 * max_kl:g} millinats of KL"


def _noted_limit(notes: dict[str, Any]) -> str:
    """The limit of an earlier file."""
    return f"{notes.get('max_ppl_increase')}%" if notes.get("max_kl") is None else f"{1000 * float(notes['max_kl']):g} millinats"


def _brief(report: Report) -> list[list[str]]:
    per_layer = "cache-prior per layer, "  # in every row or in none: the last line has it
    cells = [["routing", "text", "change % [95%]", "Mean KLD [95%]", "MiB", "fits"]]
    for t in report.trials:
        change = f"{t.ppl_increase:+.2f} [{table.signed(t.ppl_increase_low)},{table.signed(t.ppl_increase_high)}]"
        cells.append(
            [
                t.routing.removeprefix(per_layer),
                t.part.removeprefix("fit, "),
                change,
                brief_kl(t.kl, t.kl_low, t.kl_high),
                f"{t.missed_mib_per_token:.2f}",
                t.within,
            ]
        )
    return cells


def _conclusion(report: Report) -> list[str]:
    """What the chosen routing does on text that it was not fitted to."""
    last = next((t for t in reversed(report.trials) if t.part == "held out" and t.routing == report.routing), None)
    if last is None:
        return []
    missed = f"misses {last.missed_mib_per_token:.2f} of {last.original_missed_mib_per_token:.2f} MiB a token"
    kl = f"Mean KLD {brief_kl(last.kl, last.kl_low, last.kl_high)} and 99.0% KLD {1000 * last.kl_p99:.0f} millinats"
    limit = _limit(report.max_ppl_increase, report.max_kl)
    return [
        f"Chosen: {report.routing} (lossy), {missed}, for {last.ppl_increase:+.2f}% of perplexity on unseen text",
        f"  {kl}, Same top p {same_top(last.top1, last.top1_se)} %; within {limit}: {last.within}",
    ]


def _whole(report: Report) -> list[list[str]]:
    limit = f"within {_limit(report.max_ppl_increase, report.max_kl)}"
    kl_head = ["Mean KLD millinats [95%]", "99.0% KLD", "Same top p %"]
    cells = [["routing", "text", "tokens", "ppl change % [95%]", *kl_head, "missed MiB/token", "saved", "miss", limit]]
    for t in report.trials:
        missed = (f"{t.missed_mib_per_token:.2f}", f"{100 * t.saved:.0f}%", f"{100 * t.miss_rate:.1f}%")
        kl = (whole_kl(t.kl, t.kl_low, t.kl_high), f"{1000 * t.kl_p99:.1f}", same_top(t.top1, t.top1_se))
        cells.append([t.routing, t.part, str(t.n_tokens), _change(t), *kl, *missed, t.within])
    return cells


def _by_layer(parameters: Sequence[dict[str, float]]) -> Iterator[str]:
    values = " ".join(f"{p['lambda']:g}" for p in parameters)
    yield f"lambda by layer: {values}"
    if all(EXPERTS in p for p in parameters):
        yield f"experts in memory by layer: {' '.join(f'{p[EXPERTS]:g}' for p in parameters)}"


def _say_doubt(outcome: Outcome, goal: Goal) -> None:
    if outcome.validation and outcome.validation.within == "perhaps":
        limit = _limit(goal.max_ppl_increase, goal.max_kl)
        say(f"the held-out text is too short to be sure of {limit}: the interval ends beyond it")


def _why_not(outcome: Outcome, goal: Goal) -> str:
    loss = (lambda t: t.difference.delta_nll) if goal.max_kl is None else (lambda t: t.kl.kl)
    mildest = min(outcome.trials, key=loss, default=None)
    if mildest is None:
        return "Nothing fits: no layer misses less by another choice of experts at this budget."
    d = mildest.difference
    change = f"changes the perplexity by {_change(d)} %" if goal.max_kl is None else f"has a KL of {_kl(mildest.kl)} millinats"
    limit = f"{goal.max_ppl_increase:g}%" if goal.max_kl is None else f"{1000 * goal.max_kl:g} millinats"
    return (
        f"Nothing fits {limit}: {mildest.routing} {change} on {d.n_tokens} tokens; "
        "allow more, or give more text (--limit) if the interval is too wide."
    )
