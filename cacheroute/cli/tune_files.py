"""`cacheroute tune --files`: the file, the routing and, with --prompt, the prompt routing that read least within a limit."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.cli import interval, progress, table, tune_prompt
from cacheroute.cli.frontier_files import Chosen, Settings, machine, speed
from cacheroute.cli.terminal import say
from cacheroute.cli.tune_report import TrialRow, limit_of, save, trial_row
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import paired
from cacheroute.files import MIB, as_json, size
from cacheroute.model import gguf_file
from cacheroute.routing import budget as budgets
from cacheroute.routing import tuned

if TYPE_CHECKING:
    from cacheroute.evals.choose import Chooser, Found
    from cacheroute.evals.loading import Source
    from cacheroute.evals.prompt_tune import Outcome as PromptOutcome
    from cacheroute.evals.prompts import Lengths
    from cacheroute.evals.scorer import Scorer
    from cacheroute.evals.tune import Goal, Trial
    from cacheroute.forecast.rates import Machine
    from cacheroute.model.copies import Copy


@dataclass(frozen=True)
class PromptGoal:
    """What --prompt asks for beside the routing; `max_kl` in nats per token after the prompt."""

    lengths: Lengths
    n_places: int
    max_kl: float


@dataclass(frozen=True)
class FileTrial(TrialRow):
    """A trial of one file. The change of the perplexity and the KL are against the reference; a file whose experts all fit misses
    nothing."""

    file: str


@dataclass(frozen=True)
class FileRow:
    """One file in the memory. `budget_experts` of each layer, null where those of one token do not fit; `routing` null where it
    was not searched or nothing fits. `kl` ... `within` on text that took no part; `predicted_ts`: tokens per second, forecast."""

    file: str
    path: str
    experts_mib: float
    budget_experts: int | None
    whole: bool
    routing: str | None
    parameters: list[dict[str, float]] | None
    missed_mib_per_token: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    ppl_increase: float | None
    within: str | None
    predicted_ts: float | None


@dataclass(frozen=True)
class FilesReport:
    """The result: `chosen` is the row of the file to take, null when nothing fits, and `profile` the file that `--routing tuned`
    takes for it, null where all its experts fit. `prompt`: of --prompt."""

    model: str
    text: str
    reference: str
    memory_mib: float
    budget: str
    eviction: str
    max_ppl_increase: float | None
    max_kl: float | None
    n_tokens: int
    files: list[FileRow]
    chosen: FileRow | None
    profile: str | None
    flash_mbps: float | None
    answer: str
    prompt: tune_prompt.Report | None
    trials: list[FileTrial]


def run(
    chosen: Chosen,
    budget: str | None,
    goal: Goal,
    source: Source,
    settings: Settings,
    prompt: PromptGoal | None,
    output: str,
    *,
    wide: bool,
) -> None:
    """Searches, prints, and writes the file that `--routing tuned` takes. Raises CacherouteError when nothing fits."""
    from cacheroute.evals import choose

    budget = budget or budgets.default_name(chosen.copies[0].layout)
    nbytes = budgets.in_bytes(budget, chosen.copies[0].layout)
    chooser, trials, found = _search(chosen, nbytes, goal, source, settings)
    best = choose.best(found)
    own = machine(chosen, settings.threads, settings.flash_mbps) if best else None
    rows = {f.copy.fingerprint: _row(f, own) for f in found}
    row = rows[best.copy.fingerprint] if best else None
    saved, unsaved = None, None
    try:
        saved = _saved(best, goal, chosen, source, nbytes, len(chooser.chunks)) if best else None
    except CacherouteError as e:  # what was found is printed all the same
        unsaved = e
    of_prompt = _search_prompt(prompt, best, goal, source, settings) if prompt and best and not best.whole else None
    report = FilesReport(
        model=chosen.copies[0].layout.model,
        text=source.name,
        reference=chosen.reference.name,
        memory_mib=nbytes / MIB,
        budget=budget,
        eviction=goal.eviction,
        max_ppl_increase=goal.max_ppl_increase,
        max_kl=goal.max_kl,
        n_tokens=sum(c.n_scored for c in chooser.chunks),
        files=list(rows.values()),
        chosen=row,
        profile=str(saved) if saved else None,
        flash_mbps=settings.flash_mbps,
        answer=_answer(row, chosen.reference, goal, nbytes, settings.flash_mbps) if row else "Nothing fits.",
        prompt=of_prompt[0] if of_prompt else None,
        trials=[FileTrial(**_of_whole(trial_row(t), copy, rows), file=copy.name) for copy, t in trials],
    )
    _print(report, output, wide=wide)
    if unsaved:
        raise unsaved
    if best is None:
        raise CacherouteError(_why_not(trials, goal))
    if best.whole and prompt:
        say("all its experts are in memory, so a prompt reads nothing either, and no prompt routing is needed")
    if of_prompt:
        tune_prompt.say_result(*of_prompt)
    how = "--budget all" if best.whole else f"--routing tuned --budget {best.capacity}"
    say(f"use it with -m {best.copy.path} {how}" + (f"; it is in {saved}" if saved else ""))


def _search_prompt(
    prompt: PromptGoal, best: Found, goal: Goal, source: Source, settings: Settings
) -> tuple[tune_prompt.Report, PromptOutcome]:
    """A prompt routing for the file that was chosen."""
    return tune_prompt.search(
        model=str(best.copy.path),
        file=source.path,
        column=source.column,
        budget=str(best.capacity),
        eviction=goal.eviction,
        max_kl=prompt.max_kl,
        lengths=prompt.lengths,
        n_places=prompt.n_places,
        seed=goal.seed,
        threads=settings.threads,
        io=settings.io,
    )


def _search(
    chosen: Chosen, nbytes: int, goal: Goal, source: Source, settings: Settings
) -> tuple[Chooser, list[tuple[Copy, Trial]], list[Found]]:
    """(the chooser, all trials, what was found for each file), with what is to come said before and its progress shown."""
    from cacheroute.evals import choose
    from cacheroute.evals import tune as tuning

    trials: list[tuple[Copy, Trial]] = []
    total = 1.0

    def report(copy: Copy, trial: Trial) -> None:
        trials.append((copy, trial))
        say(
            f"{copy.name}, {trial.routing}: {interval.ppl_change(trial.difference)} % of perplexity, "
            f"{interval.mean_kl(trial.kl)} millinats of KL "
            f"on {trial.difference.n_tokens} tokens"
        )

    def begin(session: Scorer, seconds: float) -> None:
        nonlocal total
        total = chooser.expected_work(session.chunks)
        _say_steps(chooser, session, total, total * seconds / settings.workers)

    @contextmanager
    def opened(copy: Copy, reference: Copy) -> Iterator[Scorer]:
        with settings.session(copy, reference, source) as session:
            session.after = lambda cell: advance(
                tuning.work(session.chunks[cell.chunk]) / total, f"{copy.name} {progress.label(cell.routing)}"
            )
            yield session

    chooser = choose.Chooser(
        chosen.copies,
        chosen.reference,
        nbytes,
        goal,
        compared=lambda copy: opened(copy, chosen.reference),
        own=lambda copy: opened(copy, copy),
        report=report,
    )
    _say_left(chooser.files(), nbytes)
    with progress.bar("tuning", 1.0) as advance, progress.resumable():  # of the whole, which is known when the text is
        chooser.prepare(begin)
        fit, held_out = tuning.split(len(chooser.chunks), goal.seed)
        return chooser, trials, chooser.run(fit, held_out)


def _say_steps(chooser: Chooser, session: Scorer, total: float, seconds: float) -> None:
    """What will be done and how long it will take. Raises UsageError for too little text."""
    from cacheroute.evals import tune as tuning

    n = len(session.chunks)
    if len(tuning.split(n, chooser.goal.seed)[1]) < paired.FEW_BLOCKS:
        say(f"few chunks ({n}): intervals will be wide, and little may fit")
    files = [f.copy.name + (" whole" if f.whole else "") for f in chooser.files() if f.capacity]
    say(
        f"{1 + len(files)} steps: {chooser.reference.name} as the reference, then in {size(chooser.nbytes)} {', '.join(files)}; "
        f"about {total:.0f} tokens to decode, {progress.duration(seconds)} as fast as now, less what earlier runs have scored"
    )
    say("Ctrl-C stops it, and the same command resumes")


def _say_left(found: Sequence[Found], nbytes: int) -> None:
    """Files without room; raises UsageError where none has."""
    for f in found:
        if f.capacity is None:
            needed = f.copy.layout.n_used * f.copy.layout.resident_bytes
            say(f"{f.copy.name} is left out: the experts of one token need {size(needed)}, and there are {size(nbytes)}")
    if all(f.capacity is None for f in found):
        least = min(f.copy.layout.n_used * f.copy.layout.resident_bytes for f in found)
        raise UsageError(f"No file has room for the experts of one token in {size(nbytes)}; give at least {-(-least // MIB)}MiB.")


def _row(f: Found, own: Machine | None) -> FileRow:
    outcome = f.outcome
    fits = outcome is not None and outcome.chosen is not None
    routing = outcome.chosen.routing if outcome and outcome.chosen else None
    v = outcome.validation if outcome and fits else None
    missed = None if v is None else 0.0 if f.whole else v.missed_mib_per_token
    return FileRow(
        file=f.copy.name,
        path=str(f.copy.path),
        experts_mib=f.copy.layout.all_expert_bytes / MIB,
        budget_experts=f.capacity,
        whole=f.whole,
        routing=str(routing) if routing else None,
        parameters=[r.parameters for r in routing.layers or (routing,)] if routing else None,
        missed_mib_per_token=missed,
        kl=v.kl.kl if v else None,
        kl_low=v.kl.kl_low if v else None,
        kl_high=v.kl.kl_high if v else None,
        ppl_increase=v.difference.ppl_increase if v else None,
        within=v.within if v else None,
        predicted_ts=speed(f.copy, own, missed, whole=f.whole) if own and missed is not None else None,
    )


def _of_whole(row: TrialRow, copy: Copy, rows: dict[str, FileRow]) -> dict[str, Any]:
    """The fields of a row; loaded whole a file misses nothing, and the first use of an expert is no miss."""
    nothing = {"missed_mib_per_token": 0.0, "original_missed_mib_per_token": 0.0, "miss_rate": 0.0}
    return asdict(row) | (nothing if rows[copy.fingerprint].whole else {})


def _saved(best: Found, goal: Goal, chosen: Chosen, source: Source, nbytes: int, n_chunks: int) -> Path | None:
    """Where the routing of the file was written; None where all experts fit, and nothing is routed."""
    from cacheroute.evals import tune as tuning

    if best.whole:
        return None
    assert best.outcome and best.capacity
    path = tuned.path(best.copy.path, best.capacity)
    made_from = {
        "fingerprint": gguf_file.fingerprint(best.copy.path),
        "text": source.name,
        "chunk": source.chunk,
        "n_chunks": n_chunks,
        "mass_past_k": best.past,
        "file": best.copy.name,
        "files": [c.name for c in chosen.copies],
        "reference": chosen.reference.name,
        "memory": nbytes,
    }
    own = replace(goal, budget=best.capacity)
    save(tuning.tuned_routing(best.outcome, own, best.copy.layout, made_from), path)
    return path


def _answer(row: FileRow, reference: Copy, goal: Goal, nbytes: int, flash_mbps: float | None) -> str:
    """One sentence."""
    what = "as it is, all its experts in memory" if row.whole else f"with {row.routing}"
    kl = f"a KL of {interval.mean_kl(row, tight=True)} millinats against {reference.name} on unseen text"
    change = "" if goal.max_kl is not None or row.ppl_increase is None else f", {row.ppl_increase:+.2f}% of perplexity"
    within = f"within {limit_of(goal.max_ppl_increase, goal.max_kl)}: {row.within}"
    pace = f" behind {flash_mbps:g} MB/s" if flash_mbps else ""
    ts = "" if row.predicted_ts is None else f", about {row.predicted_ts:.3g} tok/s{pace}"
    missed = "no misses" if row.whole else f"{row.missed_mib_per_token:.2f} MiB missed a token"
    return f"In {size(nbytes)} take {row.file} {what}: {kl}{change} ({within}), {missed}{ts}."


def _print(report: FilesReport, output: str, *, wide: bool) -> None:
    if output == "json":
        print(as_json(asdict(report), indent=2))
        return
    limit = limit_of(report.max_ppl_increase, report.max_kl)
    above = [
        f"{report.model}, {report.text}: {report.n_tokens} tokens against original of {report.reference}",
        f"{size(report.memory_mib * MIB)} for experts ({report.budget}), {report.eviction}; at most {limit}",
    ]
    answer = textwrap.wrap(report.answer, table.WIDTH, break_long_words=False, break_on_hyphens=False)
    table.write([], output, table.View(_brief(report), _whole(report), above, answer), wide=wide)
    if report.prompt:
        print()
        tune_prompt.show(report.prompt, output, wide=wide)


def _brief(report: FilesReport) -> list[list[str]]:
    cells = [["file", "of all", "routing", "Mean KLD [95%]", "MiB", "tok/s", "fits"]]
    for f in report.files:
        held = "none" if f.budget_experts is None else "all" if f.whole else str(f.budget_experts)
        if f.routing is None:
            tried = any(t.file == f.file for t in report.trials)
            cells.append([f.file, held, "too lossy as it is" if tried else "not searched", "", "", "", "no" if tried else ""])
            continue
        kl = interval.mean_kl(f, tight=True)
        numbers = [f"{f.missed_mib_per_token:.2f}", "?" if f.predicted_ts is None else f"{f.predicted_ts:.1f}"]
        cells.append([f.file, held, f.routing.removeprefix("cache-prior per layer, "), kl, *numbers, f.within or ""])
    return cells


def _whole(report: FilesReport) -> list[list[str]]:
    head = [
        "file",
        "routing",
        "text",
        "tokens",
        "ppl change % [95%]",
        "Mean KLD millinats [95%]",
        "99.0% KLD",
        "missed MiB/token",
    ]
    cells = [[*head, f"within {limit_of(report.max_ppl_increase, report.max_kl)}"]]
    for t in report.trials:
        kl = [interval.mean_kl(t), f"{1000 * t.kl_p99:.1f}"]
        cells.append(
            [t.file, t.routing, t.part, str(t.n_tokens), interval.ppl_change(t), *kl, f"{t.missed_mib_per_token:.2f}", t.within]
        )
    return cells


def _why_not(trials: Sequence[tuple[Copy, Trial]], goal: Goal) -> str:
    loss = (lambda pair: pair[1].difference.delta_nll) if goal.max_kl is None else (lambda pair: pair[1].kl.kl)
    copy, t = min(trials, key=loss)
    kl = f"{interval.mean_kl(t.kl)} millinats and {interval.ppl_change(t.difference)} % of perplexity"
    return (
        f"Nothing fits {limit_of(goal.max_ppl_increase, goal.max_kl)}: the mildest, {copy.name} with {t.routing}, loses {kl}; "
        "allow more, give a larger file or budget, or more text (--limit) if the interval is too wide."
    )
