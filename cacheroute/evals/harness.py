"""EleutherAI's lm-evaluation-harness (the extra `eval`) over this engine: any of its tasks, or your own from a folder.

Only this file imports it, and late: the import takes seconds, and the extra is often not installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, did_you_mean
from cacheroute.evals.tasks import TaskScorer

SHORT_NAMES = {"arc": "arc_challenge"}
_MOST_TOKENS = 256  # of an answer, where a task has no limit


@dataclass(frozen=True)
class Metric:
    """One figure of one task, as lm-evaluation-harness names them; `stderr` null where it has none."""

    task: str
    metric: str
    value: float
    stderr: float | None


def require() -> None:
    """Raises UsageError when the extra is missing."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("Tasks need lm-evaluation-harness; run `python -m pip install lm-eval`.") from None


def load_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """(task manager, task objects). `folder` has task files (yaml) of your own; data files are relative to the current folder.

    Raises UsageError for a task that does not exist, CacherouteError for one with data that cannot be loaded.
    """
    require()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder with task files.")
    names = [SHORT_NAMES.get(n, n) for n in names]
    manager, known = _manager(folder, defaults=folder is None)
    if folder and not known.issuperset(names):
        manager, known = _manager(folder, defaults=True)
    for name in names:
        if name not in known:
            where = f" nor in {folder}" if folder else ""
            meant = did_you_mean(name, ["perplexity", "prompt", *SHORT_NAMES, *known], "`lm-eval ls tasks` lists them.")
            raise UsageError(f"There is no task {name!r} in lm-evaluation-harness{where}; {meant}")
    try:
        return manager, manager.load(names)
    except Exception as e:  # any error of a data reader: no network, a missing file, another format
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise CacherouteError(
            f"The data of {', '.join(names)} cannot be loaded ({reason.rstrip('.')}); the hub needs the network once, and files "
            "of your own a path in data_files."
        ) from None


def _manager(folder: Path | None, *, defaults: bool) -> tuple[Any, set[str]]:
    """(task manager, all names it has). With `defaults` it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=defaults)
    return manager, {*manager.all_tasks, *manager.all_groups, *manager.all_tags}


def evaluate(
    scorer: TaskScorer,
    manager: Any,
    names: Sequence[str],
    shots: int | None,
    limit: int | None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """lm-evaluation-harness's own results. `advance` is called with (requests answered, requests of this kind)."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=adapter(scorer, advance),
        tasks=[SHORT_NAMES.get(n, n) for n in names],
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    assert results is not None
    return dict(results)


def metrics(results: dict[str, Any]) -> list[Metric]:
    """The figures of all tasks and groups."""
    found = []
    for task, values in {**results["results"], **(results.get("groups") or {})}.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{kind}")
            found.append(
                Metric(task, name if kind == "none" else key, float(value), stderr if isinstance(stderr, float) else None)
            )
    return found


def adapter(scorer: TaskScorer, advance: Callable[[int, int], None] = lambda done, total: None) -> Any:
    """An lm_eval.api.model.LM that calls `scorer`."""
    from lm_eval.api.model import LM

    class CacherouteLM(LM):  # type: ignore[misc, unused-ignore]
        """Instances in, what lm-evaluation-harness expects of each kind out."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return _answers(requests, lambda args: scorer.loglikelihood(*args), advance)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return _answers(requests, lambda args: scorer.loglikelihood_rolling(*args), advance)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return _answers(requests, lambda args: _generate(scorer, *args), advance)

    return CacherouteLM()


def _answers(requests: list[Any], answer: Callable[[tuple[Any, ...]], Any], advance: Callable[[int, int], None]) -> list[Any]:
    """Answers in the order of the texts, so that equal heads follow each other; returns in the order of the requests."""
    order = sorted(range(len(requests)), key=lambda i: str(requests[i].args[0]))
    answers: list[Any] = [None] * len(requests)
    for done, i in enumerate(order, 1):
        answers[i] = answer(requests[i].args)
        advance(done, len(requests))
    return answers


def _generate(scorer: TaskScorer, context: str, settings: dict[str, Any]) -> str:
    """Raises UsageError for sampling, as its figures would change from run to run."""
    if settings.get("do_sample") and settings.get("temperature", 1.0):
        raise UsageError("This task samples its answers; only greedy ones are scored (do_sample: false).")
    until = settings.get("until") or []
    most = settings.get("max_gen_toks", _MOST_TOKENS)
    return scorer.generate_until(context, [until] if isinstance(until, str) else list(until), int(most))
