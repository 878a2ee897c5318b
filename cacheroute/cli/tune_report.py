"""What `cacheroute tune` prints: its trials as a table, what was chosen, and how sure that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.cli import interval, table
from cacheroute.cli.eval import same_top
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError
from cacheroute.evals.divergence import Divergence
from cacheroute.files import as_json
from cacheroute.routing import tuned
from cacheroute.routing.strategies import EXPERTS

if TYPE_CHECKING:
    from cacheroute.evals.tune import Goal, Outcome, Trial
    from cacheroute.model.experts import ExpertLayout


@dataclass(frozen=True)
class TrialFields:
    """One trial. `part` is fit, held out, or "fit, left early"; the change of the perplexity in % against `original`, with its
    95% interval. `passed`: the upper end of the interval is within the limit; on the held-out part, the estimate itself.
    `within`: "yes" where the upper end is, "perhaps" where the estimate is. MiB are misses x bytes of an expert."""

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

    @property
    def saved(self) -> float:
        """Share of the bytes that `original` misses and this routing does not."""
        return 1 - self.missed_mib_per_token / self.original_missed_mib_per_token if self.original_missed_mib_per_token else 0.0


@dataclass(frozen=True)
class TrialRow(Divergence, TrialFields):
    """One trial, then its KL as in `eval perplexity`, in nats per token."""


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


def say_trial(trial: Trial) -> None:
    say(
        f"{trial.routing}: {interval.ppl_change(trial.difference)} % of perplexity, "
        f"{interval.mean_kl(trial.kl)} millinats of KL on {trial.difference.n_tokens} tokens, "
        f"missed {trial.missed_mib_per_token:.2f} MiB/token",
    )


def save(routing: tuned.TunedRouting, path: Path) -> None:
    """Replaces an earlier file of the same model and budget, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CacherouteError(f"{path.parent} cannot be made ({e.strerror}).") from None
    if path.exists():
        before = "a file that cannot be read"
        with contextlib.suppress(CacherouteError, ValueError, TypeError):
            before = f"the routing tuned for {noted_limit(tuned.load(path).notes)}"
        say(f"this replaces {before}")
    tuned.save(routing, path, force=True)


def report_of(
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
        trials=[trial_row(t) for t in sorted(outcome.trials, key=lambda t: t.validates)],
    )


def trial_row(trial: Trial) -> TrialRow:
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


def print_report(report: Report, output: str, *, wide: bool) -> None:
    if output == "json":
        print(as_json(asdict(report), indent=2))
        return
    table.write([], output, table.View(_brief(report), _whole(report), [_what_was_tuned(report)], _conclusion(report)), wide=wide)
    if report.parameters and len(report.parameters) > 1 and (wide or output == "md"):
        print("\n" + "\n".join(_by_layer(report.parameters)))


def _what_was_tuned(report: Report) -> str:
    where = f"{report.budget_experts} experts of each layer ({report.budget}), {report.eviction}"
    limit = limit_of(report.max_ppl_increase, report.max_kl)
    return f"{report.model}, {report.text}: {where}; at most {limit}; KLD in millinats, MiB missed per token"


def limit_of(max_ppl_increase: float | None, max_kl: float | None) -> str:
    return f"{max_ppl_increase:g}% of perplexity" if max_kl is None else f"{1000 * max_kl:g} millinats of KL"


def noted_limit(notes: dict[str, Any]) -> str:
    """The limit of an earlier file."""
    return f"{notes.get('max_ppl_increase')}%" if notes.get("max_kl") is None else f"{1000 * float(notes['max_kl']):g} millinats"


def _brief(report: Report) -> list[list[str]]:
    per_layer = "cache-prior per layer, "  # in every row or in none: the last line has it
    cells = [["routing", "text", "change % [95%]", "Mean KLD [95%]", "MiB", "fits"]]
    for t in report.trials:
        cells.append(
            [
                t.routing.removeprefix(per_layer),
                t.part.removeprefix("fit, "),
                interval.ppl_change(t, tight=True),
                interval.mean_kl(t, tight=True),
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
    kl = f"Mean KLD {interval.mean_kl(last, tight=True)} and 99.0% KLD {1000 * last.kl_p99:.0f} millinats"
    limit = limit_of(report.max_ppl_increase, report.max_kl)
    return [
        f"Chosen: {report.routing} (lossy), {missed}, for {last.ppl_increase:+.2f}% of perplexity on unseen text",
        f"  {kl}, Same top p {same_top(last.top1, last.top1_se)} %; within {limit}: {last.within}",
    ]


def _whole(report: Report) -> list[list[str]]:
    limit = f"within {limit_of(report.max_ppl_increase, report.max_kl)}"
    kl_head = ["Mean KLD millinats [95%]", "99.0% KLD", "Same top p %"]
    cells = [["routing", "text", "tokens", "ppl change % [95%]", *kl_head, "missed MiB/token", "saved", "miss", limit]]
    for t in report.trials:
        missed = (f"{t.missed_mib_per_token:.2f}", f"{100 * t.saved:.0f}%", f"{100 * t.miss_rate:.1f}%")
        kl = (interval.mean_kl(t), f"{1000 * t.kl_p99:.1f}", same_top(t.top1, t.top1_se))
        cells.append([t.routing, t.part, str(t.n_tokens), interval.ppl_change(t), *kl, *missed, t.within])
    return cells


def _by_layer(parameters: Sequence[dict[str, float]]) -> Iterator[str]:
    values = " ".join(f"{p['lambda']:g}" for p in parameters)
    yield f"lambda by layer: {values}"
    if all(EXPERTS in p for p in parameters):
        yield f"experts in memory by layer: {' '.join(f'{p[EXPERTS]:g}' for p in parameters)}"


def say_doubt(outcome: Outcome, goal: Goal) -> None:
    if outcome.validation and outcome.validation.within == "perhaps":
        limit = limit_of(goal.max_ppl_increase, goal.max_kl)
        say(f"the held-out text is too short to be sure of {limit}: the interval ends beyond it")


def why_not(outcome: Outcome, goal: Goal) -> str:
    loss = (lambda t: t.difference.delta_nll) if goal.max_kl is None else (lambda t: t.kl.kl)
    mildest = min(outcome.trials, key=loss, default=None)
    if mildest is None:
        return "Nothing fits: no layer misses less by another choice of experts at this budget."
    last = outcome.trials[-1]
    if last.validates and last.passed:
        missed = f"{last.missed_mib_per_token:.2f} MiB a token, and `original` {last.original_missed_mib_per_token:.2f}"
        return f"Nothing is saved: on unseen text {last.routing} misses {missed}; keep the model's own routing at this budget."
    d = mildest.difference
    change = (
        f"changes the perplexity by {interval.ppl_change(d)} %"
        if goal.max_kl is None
        else f"has a KL of {interval.mean_kl(mildest.kl)} millinats"
    )
    limit = f"{goal.max_ppl_increase:g}%" if goal.max_kl is None else f"{1000 * goal.max_kl:g} millinats"
    return (
        f"Nothing fits {limit}: {mildest.routing} {change} on {d.n_tokens} tokens; "
        "allow more, or give more text (--limit) if the interval is too wide."
    )
