"""`cacheroute tune`: the routing that reads least at a loss of quality that you name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import options, progress, table
from cacheroute.cli.eval import ChunkOption, ColumnOption, IoOption, TextOption
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import paired
from cacheroute.files import VERSION
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import EXPERTS

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama
    from cacheroute.evals.scorer import Scorer
    from cacheroute.evals.text import Chunk
    from cacheroute.evals.tune import Outcome, Trial
    from cacheroute.routing.strategies import Routing
    from cacheroute.routing.tuned import TunedRouting

_PROMPT_COST = 0.2  # of a prompt's token, in decoded tokens: for the estimate of time only


@dataclass(frozen=True)
class TrialRow:
    """One trial. `part` is fit, held out, or "fit, left early"; the change of the perplexity in % against `original`, with its
    95% interval. `passed`: the upper end is within the limit, of the held-out part the estimate is."""

    routing: str
    part: str
    n_tokens: int
    ppl_increase: float
    ppl_increase_low: float | None
    ppl_increase_high: float | None
    read_mib_per_token: float
    original_mib_per_token: float
    miss_rate: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """The result: `profile` is the file that `--routing tuned` takes, null when nothing fits."""

    model: str
    text: str
    budget: str
    budget_experts: int
    eviction: str
    max_ppl_increase: float
    routing: str | None
    parameters: list[dict[str, float]] | None
    profile: str | None
    trials: list[TrialRow]


def tune(
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: Annotated[str, typer.Option("--budget", help="Experts in memory: 50%, 30 (per layer), 2GiB (all), all.")] = "50%",
    max_ppl_increase: Annotated[
        str, typer.Option("--max-ppl-increase", help="The upper end of the 95% interval stays within this.")
    ] = "1%",
    uniform: Annotated[bool, typer.Option("--uniform", help="One value for all layers instead of one for each.")] = False,
    strategy: Annotated[
        str, typer.Option("--strategy", help="What --uniform fits: cache-prior, max-rank, cumsum, drop-cold, pruning.")
    ] = "cache-prior",
    eviction: options.EvictionOption = DEFAULT,
    chunk: ChunkOption = 512,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use about this many scored tokens of the text.")] = 20000,
    price_tokens: Annotated[int, typer.Option("--price-tokens", min=1, help="Tokens that price the layers.")] = 512,
    price_groups: Annotated[int, typer.Option("--price-groups", min=1, help="Neighbouring layers share a price: groups.")] = 15,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Seed of the split and of the bootstrap.")] = 0,
    workers: options.WorkersOption = 1,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md or json.")] = "md",
) -> None:
    """Find the routing that reads least while the perplexity rises by no more than a limit, on your text.

    Each layer gets a lambda of its own and its share of the budget: what is dear to swap is held. --uniform: all the same.
    Scores are stepped and paired with `original`. Two thirds of the chunks fit, one third is held out and has the last word.
    The result is a profile that `--routing tuned` takes for this model and budget. Stop it when you like: the same
    command goes on from there.
    """
    allowed = _percent(max_ppl_increase)
    if output not in ("md", "json"):
        raise UsageError(f"There is no output {output!r}; there are md and json.")
    if strategy != "cache-prior" and not uniform:
        raise UsageError(f"{strategy} is fitted with --uniform only; per layer there is cache-prior.")
    from cacheroute.evals import loading, pricing
    from cacheroute.evals import scorer as scoring
    from cacheroute.evals import tune as tuning
    from cacheroute.model import catalogue
    from cacheroute.routing import tuned

    path = catalogue.resolve(model)
    source = loading.Source(file, column, chunk, None, limit)
    n_threads = options.threads(threads)
    with scoring.session(path, source, n_threads, n_workers=workers, io=io, budget=budget, eviction=eviction) as scorer:
        llm, chunks = scorer.llm, scorer.chunks
        if uniform and not tuning.ladder(strategy, llm.layout):
            raise UsageError(f"{strategy!r} has nothing to tune; there are cache-prior, max-rank, cumsum, drop-cold, pruning.")
        fit, held_out = tuning.split(len(chunks), seed)
        if len(held_out) < 2 or len(fit) < 2:
            raise UsageError(f"{len(chunks)} chunks of {chunk} tokens are too few to fit and to validate; give more text.")
        if len(held_out) < paired.FEW_BLOCKS:
            print(f"{len(chunks)} chunks are few: intervals will be wide, and little may fit", file=sys.stderr)
        priced = fit[: pricing.n_chunks(price_tokens, chunks)]
        total = _work(chunks, len(fit), len(held_out), 0 if uniform else len(priced), price_groups)
        with progress.bar("tuning", total) as advance, _resumable():
            scorer.after = lambda cell: advance(cell.n + _PROMPT_COST * chunks[0].first, _label(cell.routing))
            if scorer.n_kept:
                print(f"{scorer.n_kept} scores of an earlier run are used again", file=sys.stderr)
            search = tuning.Search(
                scorer, llm.budget.capacity, eviction, paired.nats(allowed), fit, held_out, seed, report=_announce
            )
            capacity = llm.budget.capacity
            rungs, start = _rungs(scorer, capacity, eviction, uniform, strategy, priced, price_groups, search.limit)
            outcome = search.run(rungs, start)
        saved = None
        if outcome.chosen:
            notes = {"eviction": eviction, "budget": capacity, "max_ppl_increase": allowed, "text": source.name}
            saved = _save(tuned.path(path, capacity), _profile(llm, outcome, notes))
        report = _report(llm, source.name, budget, capacity, eviction, allowed, outcome, saved)
    _print(report, output)
    if not outcome.chosen:
        raise CacherouteError(_why_not(outcome, allowed))
    print(f"use it with --routing tuned --budget {budget}; it is in {saved}", file=sys.stderr)


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"{text!r} is not a limit; give percent above 0 and up to 100, such as 1%.")
    return float(match[1])


def _label(key: str) -> str:
    """A routing's key without what it has for each layer."""
    name, per_layer, _ = key.partition("[")
    return name + " per layer" if per_layer else name


def _work(chunks: Sequence[Chunk], n_fit: int, n_held_out: int, n_priced: int, n_groups: int) -> float:
    """Decoded tokens of a search, about: `original` and four rungs on the fit part, two on the held-out one, the prices."""
    from cacheroute.evals import pricing

    each = chunks[0].n_scored + _PROMPT_COST * chunks[0].first
    return float(each * (5 * n_fit + 2 * n_held_out + n_priced * pricing.n_runs(n_groups)))


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; run the same command to go on", file=sys.stderr)
        raise


def _rungs(
    scorer: Scorer, capacity: int, eviction: str, uniform: bool, strategy: str, priced: list[int], n_groups: int, limit: float
) -> tuple[list[Routing], int | None]:
    from cacheroute.evals import pricing
    from cacheroute.evals import tune as tuning

    if uniform:
        return tuning.ladder(strategy, scorer.llm.layout), None
    rungs, costs = pricing.rungs(scorer, capacity, eviction, priced, n_groups)
    return rungs, tuning.start_rung(costs, limit)


def _announce(trial: Trial) -> None:
    d = trial.difference
    print(
        f"{trial.routing}: {d.ppl_increase:+.2f}% [{table.signed(d.ppl_increase_low)}, {table.signed(d.ppl_increase_high)}] "
        f"on {d.n_tokens} tokens, {trial.read_mib_per_token:.2f} MiB/token",
        file=sys.stderr,
    )


def _profile(llm: Llama, outcome: Outcome, notes: dict[str, Any]) -> TunedRouting:
    from cacheroute.routing.tuned import TunedRouting

    assert outcome.chosen and outcome.validation
    routing, d = outcome.chosen.routing, outcome.validation.difference
    layers = routing.layers or (routing,) * len(llm.layout.layers)
    return TunedRouting(
        model=llm.layout.model,
        architecture=llm.layout.architecture,
        n_expert=llm.layout.n_expert,
        n_used=llm.layout.n_used,
        layers=llm.layout.indices,
        strategy=routing.name,
        parameters=tuple(r.parameters for r in layers),
        notes=notes | {"version": VERSION, "held_out": asdict(d), "ppl_increase": d.ppl_increase},
    )


def _save(path: Path, profile: TunedRouting) -> Path:
    """Replaces an earlier profile of the same model and budget, and says so; the name tells models apart."""
    from cacheroute.routing import tuned

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CacherouteError(f"{path.parent} cannot be made ({e.strerror}).") from None
    if path.exists():
        print(f"this replaces the profile tuned for {tuned.load(path).notes.get('max_ppl_increase')}%", file=sys.stderr)
    tuned.save(profile, path, force=True)
    return path


def _report(
    llm: Llama,
    text: str,
    budget: str,
    capacity: int,
    eviction: str,
    allowed: float,
    outcome: Outcome,
    saved: Path | None,
) -> Report:
    chosen = outcome.chosen.routing if outcome.chosen else None
    layers = (chosen.layers or (chosen,)) if chosen else ()
    return Report(
        model=llm.layout.model,
        text=text,
        budget=budget,
        budget_experts=capacity,
        eviction=eviction,
        max_ppl_increase=allowed,
        routing=str(chosen) if chosen else None,
        parameters=[r.parameters for r in layers] if chosen else None,
        profile=str(saved) if saved else None,
        trials=[_trial_row(t, "fit" if t.complete else "fit, left early") for t in outcome.trials if not t.validates]
        + [_trial_row(t, "held out") for t in outcome.trials if t.validates],
    )


def _trial_row(trial: Trial, part: str) -> TrialRow:
    d = trial.difference
    return TrialRow(
        routing=str(trial.routing),
        part=part,
        n_tokens=d.n_tokens,
        ppl_increase=d.ppl_increase,
        ppl_increase_low=d.ppl_increase_low,
        ppl_increase_high=d.ppl_increase_high,
        read_mib_per_token=trial.read_mib_per_token,
        original_mib_per_token=trial.original_mib_per_token,
        miss_rate=trial.miss_rate,
        passed=trial.passed,
    )


def _print(report: Report, output: str) -> None:
    if output == "json":
        print(json.dumps(asdict(report), indent=2))
        return
    cells = [
        ["routing", "text", "tokens", "ppl change % [95%]", "MiB/tok", "saved", "miss", f"within {report.max_ppl_increase:g}%"]
    ]
    for t in report.trials:
        saved = 1 - t.read_mib_per_token / t.original_mib_per_token if t.original_mib_per_token else 0.0
        cells.append(
            [
                t.routing,
                t.part,
                str(t.n_tokens),
                f"{t.ppl_increase:+.2f} [{table.signed(t.ppl_increase_low)}, {table.signed(t.ppl_increase_high)}]",
                f"{t.read_mib_per_token:.2f}",
                f"{100 * saved:.0f}%",
                f"{100 * t.miss_rate:.1f}%",
                "yes" if t.passed else "no",
            ]
        )
    print(table.as_markdown(cells))
    if report.parameters and len(report.parameters) > 1:
        values = " ".join(f"{p['lambda']:g}" for p in report.parameters)
        print(f"\nlambda by layer: {values}")
        if all(EXPERTS in p for p in report.parameters):
            print(f"experts in memory by layer: {' '.join(f'{p[EXPERTS]:g}' for p in report.parameters)}")


def _why_not(outcome: Outcome, allowed: float) -> str:
    mildest = min(outcome.trials, key=lambda t: t.difference.delta_nll, default=None)
    if mildest is None:
        return "Nothing fits: no layer can read less by another choice of experts; this budget leaves nothing to gain."
    d = mildest.difference
    return (
        f"Nothing fits {allowed:g}%: {mildest.routing} costs {d.ppl_increase:+.2f}%, with 95% up to "
        f"{table.signed(d.ppl_increase_high)}%, on {d.n_tokens} tokens; allow more, or give more text (--limit) if the "
        "interval is too wide."
    )
