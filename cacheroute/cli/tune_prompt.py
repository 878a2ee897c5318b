"""`cacheroute tune --prompt`: finds the prompt routing that reads least within a limit on what it changes in the answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cacheroute.cli import interval, progress, table
from cacheroute.cli.eval_prompt import BRIEF, brief_figures, figures, say_few
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import as_json
from cacheroute.routing import budget as budgets
from cacheroute.routing import prompt_routing as prompts

if TYPE_CHECKING:
    from cacheroute.evals.prompt_tune import Outcome, Trial
    from cacheroute.evals.prompts import Lengths, Summary


@dataclass(frozen=True)
class TrialRow:
    """One trial; the figures as `eval prompt` names them. `part` is fit or held out. `passed`: the upper end of the KL's interval
    is within the limit; on the held-out part, the estimate itself."""

    prompt_routing: str
    part: str
    passed: bool
    figures: Summary


@dataclass(frozen=True)
class Report:
    """The result: `profile` is the file that `--prompt-routing tuned` takes, null when nothing fits."""

    model: str
    text: str
    budget: str
    budget_experts: int
    eviction: str
    n_history: int
    n_prompt: int
    max_kl: float
    prompt_routing: str | None
    profile: str | None
    trials: list[TrialRow]


def search(
    model: str | None,
    file: Path | None,
    column: str,
    budget: str | None,
    eviction: str,
    max_kl: float,
    lengths: Lengths,
    n_places: int,
    seed: int,
    threads: int | None,
    io: str | None,
) -> tuple[Report, Outcome]:
    """Finds the prompt routing and writes its file, where something fits."""
    from cacheroute.evals import prompt_tune
    from cacheroute.evals import prompts as evaluation
    from cacheroute.evals import tune as tuning
    from cacheroute.model import catalogue, experts, gguf_file

    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    capacity = budgets.parse(budget, layout).capacity
    budget = budget or budgets.default_name(layout)
    text = file.name if file else "heldout.txt"
    with evaluation.session(
        path, file, column, lengths, n_places, threads=threads, io=io, settings=[(budget, eviction)]
    ) as session:
        n = len(session.places)
        if n < 4:
            raise UsageError(f"{n} places are too few to fit and to validate; give more --places, or more text for them.")
        say_few(n, n_places)
        fit, held_out = tuning.split(n, seed)
        search = prompt_tune.Search(session, capacity, eviction, max_kl, fit, held_out, seed, _say_trial)
        if session.n_kept:
            say(f"{session.n_kept} scores of earlier runs are used again")
        n_trials = len(prompt_tune.COVERS).bit_length()
        with progress.bar("tuning", len(fit) * (n_trials + 1) + 2 * len(held_out)) as advance, progress.resumable():
            session.after = lambda score: advance(1, score.routing)
            outcome = search.run()
    saved = None
    if outcome.chosen and outcome.validation:
        saved = prompts.tuned_path(path, capacity)
        notes = {"text": text, "eviction": eviction, "max_kl": max_kl, "lengths": asdict(lengths)}
        try:
            prompts.save(outcome.chosen, saved, notes | {"held_out": asdict(outcome.validation.summary)})
        except CacherouteError as e:
            say(f"{str(e).rstrip('.')}; the prompt routing is not kept")
            saved = None
    report = Report(
        model=layout.model,
        text=text,
        budget=budget,
        budget_experts=capacity,
        eviction=eviction,
        n_history=lengths.history,
        n_prompt=lengths.prompt,
        max_kl=max_kl,
        prompt_routing=str(outcome.chosen) if outcome.chosen else None,
        profile=str(saved) if saved else None,
        trials=[_row(t) for t in sorted(outcome.trials, key=lambda t: t.validates)],
    )
    return report, outcome


def say_result(report: Report, outcome: Outcome) -> None:
    """What was found and how it is used. Raises CacherouteError when nothing fits."""
    max_kl = report.max_kl
    if not outcome.chosen or not outcome.validation:
        s = max(outcome.trials, key=lambda t: t.prompt_routing.cover).summary
        raise CacherouteError(
            f"Nothing fits {1000 * max_kl:g} millinats: the mildest costs {interval.mean_kl(s)}; "
            "allow more, or give more --places if the interval is too wide."
        )
    s = outcome.validation.summary
    if s.kl_high is not None and s.kl_high > max_kl:
        say(f"The held-out places are too few to be sure of the limit: the interval reaches {1000 * s.kl_high:.1f} millinats.")
    kept = f"--prompt-routing tuned --budget {report.budget}; it is in {report.profile}"
    use = kept if report.profile else f"--prompt-routing {outcome.chosen} --budget {report.budget}"
    say(
        f"{outcome.chosen} reads {100 * s.saved:.0f}% less for a prompt and changes the answer by {1000 * s.kl:.1f} millinats "
        f"of KL a token on unseen text; use it with {use}"
    )


def _verdict(row: TrialRow, max_kl: float) -> str:
    """Whether the KL is within the limit: "perhaps" where its estimate is and the end of its interval is not."""
    if row.figures.kl_high is not None and row.figures.kl_high <= max_kl:
        return "yes"
    return "perhaps" if row.figures.kl <= max_kl else "no"


def _say_trial(trial: Trial) -> None:
    s = trial.summary
    say(f"{trial.prompt_routing}: KL {interval.mean_kl(s)} millinats, {100 * s.saved:.0f}% less read")


def _row(trial: Trial) -> TrialRow:
    return TrialRow(str(trial.prompt_routing), "held out" if trial.validates else "fit", trial.passed, trial.summary)


def show(report: Report, output: str, *, wide: bool) -> None:
    """Prints the trials."""
    if output == "json":
        print(as_json(asdict(report), indent=2))
        return
    name, *rest = BRIEF
    brief = [[name, "places", *rest, "fits"]]
    brief += [[t.prompt_routing, t.part, *brief_figures(t.figures), _verdict(t, report.max_kl)] for t in report.trials]
    history = f"{report.n_history} tokens before, " if report.n_history else ""
    where = f"{report.budget_experts} experts of each layer ({report.budget}), {report.eviction}"
    goal = f"a KL of at most {1000 * report.max_kl:g} millinats a token"
    above = f"{report.model}, {report.text}: {history}prompts of {report.n_prompt}, {where}; {goal}"
    table.write([], output, table.View(brief, _whole(report), above=[above]), wide=wide)


def _whole(report: Report) -> list[list[str]]:
    head = [
        "prompt routing",
        "places",
        "experts read a layer",
        "read MiB",
        "saved",
        "swapped",
        "KL millinats [95%]",
        "p99",
        "first",
    ]
    cells = [[*head, "delta nll millinats [95%]", "same top-1", "tokens", f"within {1000 * report.max_kl:g} millinats"]]
    return [
        *cells,
        *([t.prompt_routing, t.part, *figures(t.figures), _verdict(t, report.max_kl)] for t in report.trials),
    ]
