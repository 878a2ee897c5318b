"""`cacheroute eval task`: runs tasks of lm-evaluation-harness with several routings, on the same questions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute.cli import options, progress, table
from cacheroute.cli.eval import IoOption
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.evals import mcnemar, rows
from cacheroute.evals.rows import Arm
from cacheroute.files import as_json
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.evals.answers import Answer, Answers, Question, Setting
    from cacheroute.evals.harness import Tasks


@dataclass(frozen=True)
class TaskRow:
    """One figure of one task with one routing; `stderr` null where lm-evaluation-harness has none.

    Of what is right or wrong, `n` questions; compared with `original` on the same ones, `gained` are right with this routing
    only and `lost` with `original` only, `p` is McNemar's and `visible` the least difference of `value` that such a run shows
    with a power of 80%; null where there is nothing to compare. `missed_mib_per_token` = misses x bytes of an expert, per decoded
    token, of all tasks of the run.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    n: int | None
    gained: int | None
    lost: int | None
    p: float | None
    visible: float | None
    miss_rate: float
    swap_rate: float
    missed_mib_per_token: float
    truncated: int
    seconds: float


def task(
    name: Annotated[str, typer.Argument(metavar="TASK", help="mmlu, mmlu_cloze, gsm8k, arc, ...; several separated by commas.")],
    model: options.ModelOption = None,
    budget: options.BudgetsOption = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; `original` is always asked as well.")
    ] = "cache-prior:lambda=0.1",
    eviction: options.EvictionsOption = DEFAULT,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="A folder or file with the questions (csv, jsonl, parquet). [default: from the hub]"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Questions of each task, drawn at random by --seed; a larger number asks the same and more. [default: all]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of the draw.")] = 0,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples before each question. [default: the task's own number]")
    ] = None,
    tasks: Annotated[Path | None, typer.Option("--tasks", help="A folder with your own task files (yaml).")] = None,
    ctx_size: Annotated[int, typer.Option("-c", "--ctx-size", min=16, help="Context in tokens.")] = 4096,
    workers: options.WorkersOption = 1,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    wide: options.WideOption = False,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="text, md, csv, jsonl or sql (a row per figure), or json (with lm-evaluation-harness's results).",
        ),
    ] = "text",
) -> None:
    """Run any task of lm-evaluation-harness. `cacheroute eval gsm8k` is short for `cacheroute eval task gsm8k`.

    The examples before a question are a prompt, routed by `original`; question and answers are decoded one token at
    a time, so that the routing acts on them. Where an answer is generated, the whole prompt is routed by `original`.

    All routings answer the same questions and are compared with `original` by McNemar's test. Prompts, examples, filters and
    metrics are the harness's own. With --data only the questions come from elsewhere: a folder of files named as the hub's
    (for MMLU test/anatomy_test.csv and dev/anatomy_dev.csv, or anatomy/test-00000-of-00001.parquet), or the file of the test
    split. mmlu_cloze scores the whole answers, of which small models know more than of letters.

    Answers are stored in the cache folder, so an interrupted run is resumed.
    """
    table.check(output, wide=wide)
    from cacheroute.evals import answers, harness
    from cacheroute.model import catalogue, experts, gguf_file

    names = options.names(name)
    if not names:
        raise UsageError("There is nothing to ask; name a task, as mmlu or gsm8k.")
    if tasks is None:
        _check_names(names)
    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    arms = rows.arms(path, layout, options.names(budget), options.names(eviction), options.names(routing))
    loaded = harness.load_tasks(names, tasks, data=data, shots=shots, limit=limit, seed=seed)
    settings = [answers.Setting(strategies.parse(a.routing), a.budget_experts, a.eviction) for a in arms]
    runs = []
    with (
        answers.session(path, ctx_size, settings, threads=threads, n_workers=workers, io=io) as session,
        progress.resumable(),
    ):
        for setting in settings:
            asked = _Asked(session, setting, first=setting is settings[0])
            runs.append(_Run(harness.evaluate(loaded, asked), asked.answers))
    found = list(_rows(loaded, layout.model or path.name, ctx_size, arms, runs))
    if output == "json":
        parts = [{name: value for name, value in run.results.items() if name != "samples"} for run in runs]
        own = [[asdict(row) for row in found if _arm(row) == a] for a in arms]
        whole = [results | {"cacheroute": part} for results, part in zip(parts, own, strict=True)]
        print(as_json(whole, indent=2, default=str))
    else:
        table.write(found, output, _view(found, loaded.names), wide=wide, name="tasks")


_OF_PERPLEXITY = ("kl", "kld", "mean-kld", "kl-divergence", "divergence", "same-top", "ppl", "perplexity", "nll")


def _check_names(names: Sequence[str]) -> None:
    """Raises UsageError for what `eval perplexity` reports, and is no task, before lm-evaluation-harness is imported."""
    for name in names:
        form = name.lower().replace("_", "-")
        if form in _OF_PERPLEXITY or difflib.get_close_matches(form, ("perplexity", "kl-divergence"), cutoff=0.85):
            raise UsageError(
                f"{name} is no task; `cacheroute eval perplexity` measures the perplexity and the KL (Mean KLD, 99.0% KLD, "
                "Same top p) of a text."
            )


@dataclass(frozen=True)
class _Run:
    """What lm-evaluation-harness made of the answers of one arm."""

    results: dict[str, Any]
    answers: list[Answer]


class _Asked:
    """Asks a session on behalf of one setting, and keeps the answers. The `first` shows what is computed, for all settings."""

    def __init__(self, session: Answers, setting: Setting, *, first: bool) -> None:
        self.answers: list[Answer] = []
        self._session, self._setting, self._first = session, setting, first

    def __call__(self, questions: Sequence[Question]) -> list[list[Any]]:
        total, missing = len({*questions}) * len(self._session.settings), self._session.missing(questions)
        if self._first and missing < total:
            say(f"{total - missing} of {total} answers are in the cache")
        with progress.bar("answering", max(missing, 1)) as advance:
            self._session.after = lambda answer: advance(1, f"{progress.label(answer.routing)} {answer.budget} experts")
            found = self._session.ask(self._setting, questions)
        self.answers += {a.place: a for a in found}.values()
        return [answer.values for answer in found]


def _rows(tasks: Tasks, model: str, n_ctx: int, arms: Sequence[Arm], runs: Sequence[_Run]) -> Iterator[TaskRow]:
    """Those of `original`, which comes first at each budget and eviction, and of the others compared with it."""
    from cacheroute.evals import answers, harness

    base: dict[str, Any] = {}
    for a, run in zip(arms, runs, strict=True):
        base = run.results if a.routing == "original" else base
        counts = answers.counts(run.answers)
        if counts.truncated:
            say(f"{counts.truncated} contexts were longer than the window of {n_ctx} tokens and lost their beginning")
        for m in harness.metrics(run.results):
            members = tasks.members.get(m.task, [m.task])
            own, other = (harness.right(results, members, m.metric) for results in (base, run.results))
            yield TaskRow(
                model=model,
                task=m.task,
                metric=m.metric,
                value=m.value,
                stderr=m.stderr,
                **asdict(a),
                **_compared(a, own, other),
                **asdict(counts),
            )


def _arm(row: TaskRow) -> Arm:
    return Arm(row.routing, row.eviction, row.budget, row.budget_experts)


def _compared(a: Arm, own: dict[Any, bool], other: dict[Any, bool]) -> dict[str, Any]:
    """The fields of a TaskRow that are about questions."""
    if not other or a.routing == "original" or own.keys() != other.keys():
        return {"n": len(other) or None, "gained": None, "lost": None, "p": None, "visible": None}
    c = mcnemar.compare([own[k] for k in other], [other[k] for k in other])
    return {"n": c.n, "gained": c.gained, "lost": c.lost, "p": c.p, "visible": c.visible}


def _view(found: list[TaskRow], names: Sequence[str]) -> table.View:
    """Brief: the tasks that were asked for, without the parts of a group."""
    brief = [r for r in found if r.task in names] if {r.task for r in found}.issuperset(names) else found
    one_budget, routings, _ = rows.in_common(brief)
    cells = [["task", "metric", *([] if one_budget else ["budget"]), "routing", "value", "+/-", "p", "visible", "miss %"]]
    for r, routing in zip(brief, routings, strict=True):
        value = f"{r.value:.3f}" + ("" if r.stderr is None else f" ± {r.stderr:.3f}")
        cells.append(
            [r.task, r.metric, *([] if one_budget else [r.budget]), routing, value, *_test(r), f"{100 * r.miss_rate:.1f}"]
        )
    return table.View(cells, _task_cells(found), below=_meaning(brief))


def _test(r: TaskRow) -> list[str]:
    if r.p is None:
        return ["", "", ""]
    return [f"+{r.gained}/-{r.lost}", f"{r.p:.2g}", "none" if r.visible is None else f"{100 * r.visible:.1f}%"]


def _meaning(found: Sequence[TaskRow]) -> list[str]:
    compared = [r for r in found if r.p is not None]
    if not compared:
        return []
    n = sorted({r.n or 0 for r in compared})
    return [
        f"+/-: of {' and '.join(map(str, n))} questions, those right with the routing only and with original only; p: McNemar's;",
        "visible: the least difference of the value that such a run shows with a power of 80%",
    ]


def _task_cells(found: list[TaskRow]) -> list[list[str]]:
    head = ["task", "metric", "value", "questions", "gained, lost", "p", "visible", "budget", "routing", "eviction"]
    cells = [[*head, "miss", "swapped", "missed MiB/token"]]
    for r in found:
        value = f"{r.value:.4f}" + ("" if r.stderr is None else f" ± {r.stderr:.4f}")
        shares = [f"{100 * r.miss_rate:.1f}%", f"{100 * r.swap_rate:.1f}%", f"{r.missed_mib_per_token:.2f}"]
        of = [f"{r.budget} ({r.budget_experts})", tuned.short(r.routing), r.eviction]
        cells.append([r.task, r.metric, value, "" if r.n is None else str(r.n), *_test(r), *of, *shares])
    return cells
