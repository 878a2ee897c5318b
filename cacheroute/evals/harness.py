"""EleutherAI's lm-evaluation-harness (the extra `eval`) over this engine: any of its tasks, or your own from a folder.

Only this file imports it, and late: the import takes seconds, and the extra is often not installed.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, did_you_mean, pip_install
from cacheroute.evals import task_data
from cacheroute.evals.answers import CHOICES, ROLLING, TEXT, Question

SHORT_NAMES = {"arc": "arc_challenge", "mmlu_cloze": "mmlu_continuation"}
_MOST_TOKENS = 256  # of an answer, where a task has no limit

Ask = Callable[[Sequence[Question]], list[list[Any]]]
"""Given questions, returns the values of the answers (evals/answers.py)."""


@dataclass(frozen=True)
class Metric:
    """One figure of one task, as lm-evaluation-harness names them; `stderr` null where it has none."""

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Tasks:
    """Tasks that can be run any number of times.

    `names` as lm-evaluation-harness has them; `members`: the tasks of each that is a group; `samples`: the questions of each task
    that are asked, None for all; `shots`: examples before each question, None for each task's own number; `data`: files in place
    of the hub.
    """

    manager: Any
    names: list[str]
    members: dict[str, list[str]]
    samples: dict[str, list[int]] | None
    shots: int | None
    data: Path | None


def require() -> None:
    """Raises UsageError when the extra is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise CacherouteError(f"Tasks need lm-evaluation-harness; run {pip_install('lm-eval')}.") from None


def load_tasks(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    data: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """`folder` has task files (yaml) of your own; the files that these name are relative to the current folder. `data` has the
    data of all tasks, in place of the hub (evals/task_data.py). `limit`: so many questions of each task, drawn by `seed`.

    Raises UsageError for a task that does not exist or files that do not fit, CacherouteError for data that cannot be loaded.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder with task files.")
    if data is not None:
        task_data.check(data)
    require()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # the readers of data draw bars in a pipe, too
        import datasets
        import huggingface_hub.utils

        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    names = list(dict.fromkeys(SHORT_NAMES.get(n, n) for n in names))
    manager, known = _manager(folder, defaults=folder is None)
    if folder and not known.issuperset(names):
        manager, known = _manager(folder, defaults=True)
    for name in names:
        if name not in known:
            _check_yaml(folder)
            where = f" nor in {folder}" if folder else ""
            commands = ["perplexity", "prompt", "long", *SHORT_NAMES]
            meant = did_you_mean(name, [*commands, *known], "`lm-eval ls tasks` lists them.")
            raise UsageError(f"There is no task {name!r} in lm-evaluation-harness{where}; {meant}")
    with _local(data) if data else nullcontext():
        try:
            loaded = manager.load(names)
        except CacherouteError:
            raise
        except Exception as e:  # any error of a data reader: no network, a missing file, another format
            raise _not_loaded(names, folder, data, e) from None
    for task in loaded["tasks"].values():
        _check_examples(task, shots)
    samples = None
    if limit is not None:
        samples = {name: _drawn(name, len(task.eval_docs), limit, seed) for name, task in loaded["tasks"].items()}
    children = loaded.get("group_map", {})
    return Tasks(manager, names, {name: list(_leaves(name, children)) for name in children}, samples, shots, data)


def _check_yaml(folder: Path | None) -> None:
    """Raises UsageError for a task file that is no YAML, which lm-evaluation-harness passes over."""
    import yaml

    for file in sorted(folder.rglob("*.yaml")) if folder else ():
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise UsageError(f"{file} is no task file: {' '.join(str(e).split())}.") from None


def _not_loaded(names: Sequence[str], folder: Path | None, data: Path | None, error: Exception) -> CacherouteError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "").rstrip(".")
    reason = reason if " " in reason else f"{type(error).__name__}: {reason}"
    if folder and not isinstance(error, OSError):
        return UsageError(
            f"{', '.join(names)} of {folder} cannot be used ({reason}); mend its task file, or the data that it names."
        )
    if data and type(error).__name__ == "UndefinedError":
        return UsageError(f"The rows in {data} lack a column that {', '.join(names)} needs ({reason}).")
    return CacherouteError(
        f"The data of {', '.join(names)} cannot be loaded ({reason}); the hub needs the network once, and --data takes files "
        "instead."
    )


def _leaves(name: str, children: dict[str, list[str]]) -> Iterator[str]:
    for child in children.get(name, ()):
        if child in children:
            yield from _leaves(child, children)
        else:
            yield child


def _drawn(task: str, n: int, limit: int, seed: int) -> list[int]:
    """Which of n questions are asked: the same for each run with that seed, and for a larger limit these and more."""
    order = random.Random(f"{seed} {task}").sample(range(n), n)
    return sorted(order[:limit])


def _check_examples(task: Any, shots: int | None) -> None:
    """Raises UsageError where a task takes examples from a split that the user's files do not have."""
    splits, own = getattr(task, "dataset", None), task.get_config("num_fewshot")
    wanted = own if own == 0 or shots is None else shots
    split = task.fewshot_cfg.split if hasattr(task, "fewshot_cfg") else None
    if wanted and split and isinstance(splits, _Splits) and split in splits.absent:
        other = ", or run gsm8k_cot, whose examples are its own" if task.task_name == "gsm8k" else ""
        raise UsageError(
            f"{task.task_name} takes its {wanted} examples from the split {split!r}, which {splits.source} does not have; "
            f"add it, or give --shots 0{other}."
        )


class _Splits(dict[str, Any]):
    """The splits of a data set; one that is not there is empty, as a task looks at all of its splits when it is loaded."""

    def __init__(self, found: task_data.Found, source: Path) -> None:
        from datasets import Dataset

        super().__init__({split: Dataset.from_list(rows) for split, rows in found.rows.items()})
        self.source = source
        self.absent = {*task_data.SPLITS} - found.rows.keys()

    def __missing__(self, split: str) -> Any:
        if split in self.absent and split not in ("test", "validation"):
            return next(iter(self.values())).select([])
        raise UsageError(f"{self.source} has no split {split!r}.")


@contextmanager
def _local(data: Path) -> Iterator[None]:
    """Within it tasks get their data from files."""
    import datasets

    before = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        return _Splits(task_data.find(data, path, name), data)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = before


def _manager(folder: Path | None, *, defaults: bool) -> tuple[Any, set[str]]:
    """(task manager, all names it has). With `defaults` it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=defaults)
    return manager, {*manager.all_tasks, *manager.all_groups, *manager.all_tags}


def evaluate(tasks: Tasks, ask: Ask) -> dict[str, Any]:
    """lm-evaluation-harness's own results, with `samples`: what came of each question."""
    from lm_eval import simple_evaluate

    with _local(tasks.data) if tasks.data else nullcontext(), _quiet():
        results = simple_evaluate(
            model=adapter(ask),
            tasks=list(tasks.names),
            num_fewshot=tasks.shots,
            samples=tasks.samples,
            task_manager=tasks.manager,
            log_samples=True,
        )
    assert results is not None
    return dict(results)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-evaluation-harness draws a bar for each task, in a pipe as well, and asks git about the current folder, which
    complains where that is no repository."""
    from lm_eval import evaluator
    from lm_eval.api import task

    before = task.tqdm, evaluator.get_git_commit_hash
    task.tqdm, evaluator.get_git_commit_hash = lambda items, **_: items, lambda: None
    try:
        yield
    finally:
        task.tqdm, evaluator.get_git_commit_hash = before


def metrics(results: dict[str, Any]) -> list[Metric]:
    """The figures of all tasks and groups."""
    found = []
    for task, values in {**results["results"], **(results.get("groups") or {})}.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            found.append(Metric(task, _metric(name, kind), float(value), stderr if isinstance(stderr, float) else None))
    return found


def _metric(name: str, kind: str) -> str:
    return name if kind == "none" else f"{name},{kind}"


def right(results: dict[str, Any], tasks: Sequence[str], metric: str) -> dict[tuple[str, int], bool]:
    """By (task, number of the question), whether it was answered right by a metric; {} for one that is not 0 or 1."""
    found = {}
    for task in tasks:
        for sample in results["samples"].get(task, ()):
            for name in sample["metrics"]:
                if _metric(name, sample["filter"]) == metric:
                    if sample[name] not in (0, 1):
                        return {}
                    found[task, int(sample["doc_id"])] = bool(sample[name])
    return found


def adapter(ask: Ask) -> Any:
    """An lm_eval.api.model.LM that asks."""
    from lm_eval.api.model import LM

    class CacherouteLM(LM):  # type: ignore[misc, unused-ignore]
        """Instances in, what lm-evaluation-harness expects of each kind out."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return choices([r.args for r in requests], ask)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [values[0] for values in ask([Question(ROLLING, r.args[0]) for r in requests])]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [values[0] for values in ask([text_question(*r.args) for r in requests])]

    return CacherouteLM()


def choices(requests: Sequence[tuple[str, str]], ask: Ask) -> list[tuple[float, bool]]:
    """(log p, greedy) of each (context, continuation), in their order. A context with all of its continuations is one question;
    without a context each continuation is one."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for context, part in requests:
        groups.setdefault((context, "" if context else part), {})[part] = None
    questions = [Question(CHOICES, context, tuple(parts)) for (context, _), parts in groups.items()]
    found = {
        (question.context, part): (float(log_p), bool(greedy))
        for question, values in zip(questions, ask(questions), strict=True)
        for part, (log_p, greedy) in zip(question.parts, values, strict=True)
    }
    return [found[request] for request in requests]


def text_question(context: str, settings: dict[str, Any]) -> Question:
    """Raises UsageError for sampling, as its figures would change from run to run."""
    if settings.get("do_sample") and settings.get("temperature", 1.0):
        raise UsageError("This task samples its answers; only greedy ones are scored (do_sample: false).")
    until = settings.get("until") or []
    most = settings.get("max_gen_toks", _MOST_TOKENS)
    return Question(TEXT, context, tuple([until] if isinstance(until, str) else until), int(most))
