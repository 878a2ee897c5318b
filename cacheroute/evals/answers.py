"""Answers of a model to the requests of tasks, with several settings: each is computed once and kept in the user's cache.

All settings answer a question before the next one comes, so that an interrupted run has answers of all settings to the same
questions, and the head of a question (its few-shot examples) is evaluated once for the settings that share its state. They are
computed in this process or in several of this machine.

Knows a loaded model; knows nothing of lm-evaluation-harness (evals/harness.py does).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cacheroute.errors import CacherouteError
from cacheroute.evals.perplexity import missed_bytes
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Job, Loaded
from cacheroute.evals.session import kept_scores, opened
from cacheroute.evals.tasks import Heads, TaskScorer
from cacheroute.files import MIB, is_count, is_number
from cacheroute.routing.strategies import Routing, routing_key

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_FORMAT = "cacheroute-answers-1"
CHOICES, ROLLING, TEXT = "choices", "rolling", "text"


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    `kind` CHOICES: log p of each of `parts` after `context`, and whether greedy decoding gives it. ROLLING: log p of all of
    `context`. TEXT: the greedy text after `context`, at most `max_tokens`, up to the first of `parts`.
    """

    kind: str
    context: str
    parts: tuple[str, ...] = ()
    max_tokens: int = 0

    @cached_property
    def key(self) -> str:
        """sha256 of all of it, 16 hex digits."""
        content = json.dumps([self.kind, self.context, self.parts, self.max_tokens])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Setting(NamedTuple):
    """`budget` in experts per layer."""

    routing: Routing
    budget: int
    eviction: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To the question with that key, with a setting (`routing` as routing_key() writes it).

    `values`: of CHOICES a [log p in nats, greedy] for each part, of ROLLING and TEXT one value. The counts are of the `decoded`
    tokens: slots that were `selected`, `examined`, `swapped` and missed, and misses x bytes of an expert. `truncated`: contexts
    that lost their beginning to the window.
    """

    question: str
    routing: str
    budget: int
    eviction: str
    values: list[Any]
    truncated: int
    decoded: int
    selected: int
    examined: int
    swapped: int
    misses: int
    missed_bytes: int
    seconds: float

    @property
    def place(self) -> tuple[str, str, int, str]:
        return self.question, self.routing, self.budget, self.eviction


def _place(setting: Setting, question: Question) -> tuple[str, str, int, str]:
    return question.key, routing_key(setting.routing), setting.budget, setting.eviction


@dataclass(frozen=True)
class Counts:
    """Of the tokens that were decoded for some answers."""

    miss_rate: float
    swap_rate: float
    missed_mib_per_token: float
    truncated: int
    seconds: float


def counts(answers: Sequence[Answer]) -> Counts:
    """Sums and shares; 0 where nothing was decoded."""
    return Counts(
        miss_rate=sum(a.misses for a in answers) / max(sum(a.selected for a in answers), 1),
        swap_rate=sum(a.swapped for a in answers) / max(sum(a.examined for a in answers), 1),
        missed_mib_per_token=sum(a.missed_bytes for a in answers) / MIB / max(sum(a.decoded for a in answers), 1),
        truncated=sum(a.truncated for a in answers),
        seconds=sum(a.seconds for a in answers),
    )


class Respondent:
    """A loaded model that answers one question after the other, and whose settings it changes."""

    def __init__(self, llm: Llama, io: str) -> None:
        self.llm, self._io, self._heads = llm, io, Heads()
        self._scorer: tuple[Setting, TaskScorer] | None = None

    def answer(self, setting: Setting, question: Question) -> Answer:
        """Raises UsageError for what does not fit the context."""
        llm, scorer = self.llm, self._with(setting)
        start, decode, layers = time.perf_counter(), llm.stats().decode, llm.decoded_by_layer()
        scorer.truncated = 0
        values: list[Any]
        if question.kind == CHOICES:
            values = [[*scorer.loglikelihood(question.context, part)] for part in question.parts]
        elif question.kind == ROLLING:
            values = [scorer.loglikelihood_rolling(question.context)]
        else:
            values = [scorer.generate_until(question.context, question.parts, question.max_tokens)]
        c = llm.stats().decode - decode
        misses = [after.misses - before.misses for after, before in zip(llm.decoded_by_layer(), layers, strict=True)]
        key, routing, budget, eviction = _place(setting, question)
        return Answer(
            question=key,
            routing=routing,
            budget=budget,
            eviction=eviction,
            values=values,
            truncated=scorer.truncated,
            decoded=c.tokens,
            selected=c.hits + c.misses,
            examined=c.examined,
            swapped=c.swapped,
            misses=c.misses,
            missed_bytes=missed_bytes(misses, llm.layout),
            seconds=time.perf_counter() - start,
        )

    def _with(self, setting: Setting) -> TaskScorer:
        if self._scorer is None or self._scorer[0] != setting:
            routing, budget, eviction = setting
            self.llm.configure(budget=budget, routing=routing, eviction=eviction, io=self._io)
            self._scorer = setting, TaskScorer(self.llm, self._heads)
        return self._scorer[1]


class Answers:
    """The answers of one model with `settings`. `after` is called with each that is computed and not found in `results`."""

    def __init__(
        self,
        llm: Llama,
        job: Job,
        settings: Sequence[Setting],
        results: ResultsFile | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.llm = llm
        self.settings = list({(routing_key(s.routing), s.budget, s.eviction): s for s in settings}.values())
        self.after: Callable[[Answer], None] = lambda answer: None
        self._job, self._results, self._executor = job, results, executor
        self._respondent = Respondent(llm, job.io)
        self._known = {a.place: a for a in map(_from_json, results.lines if results else ())}

    def ask(self, setting: Setting, questions: Sequence[Question]) -> list[Answer]:
        """The answers of one setting; those of the others are computed beside them, question by question.

        Raises CacherouteError when a process that answers has ended.
        """
        order = sorted(dict.fromkeys(questions), key=lambda q: q.context)  # equal heads follow each other
        asked = [(question, missing) for question in order if (missing := self._missing(question))]
        try:
            for found in self._computed(asked):
                for answer in found:
                    self._add(answer)
        except BrokenExecutor:
            raise CacherouteError("A process that answers has ended, perhaps for lack of memory; give fewer --workers.") from None
        return [self._known[_place(setting, question)] for question in questions]

    def missing(self, questions: Sequence[Question]) -> int:
        """Answers to those questions, of all settings, that are still to be computed."""
        return sum(len(self._missing(question)) for question in dict.fromkeys(questions))

    def _missing(self, question: Question) -> list[Setting]:
        missing = []
        for setting in self.settings:
            place = _place(setting, question)
            kept = self._known.get(place)
            if kept and not _fits(kept, question):
                print("An answer in the cache is damaged: it is computed again.", file=sys.stderr)
                del self._known[place]
                kept = None
            if kept is None:
                missing.append(setting)
        return missing

    def _computed(self, asked: Sequence[tuple[Question, list[Setting]]]) -> Iterator[list[Answer]]:
        if self._executor is None:
            for question, settings in asked:
                for setting in settings:
                    yield [self._respondent.answer(setting, question)]
            return
        futures = [self._executor.submit(compute, self._job, settings, question) for question, settings in asked]
        for future in futures:
            yield future.result()

    def _add(self, answer: Answer) -> None:
        self._known[answer.place] = answer
        policies = {routing_key(s.routing) for s in self.settings if s.routing.policy}
        if self._results and answer.routing not in policies:  # the code of a policy may change under the same name
            self._results.append(asdict(answer))
        self.after(answer)


_respondents: Loaded[Respondent] = Loaded()


def compute(job: Job, settings: Sequence[Setting], question: Question) -> list[Answer]:
    """The answers of some settings, in a process of its own: it loads the model of `job` and keeps it for the next question."""
    respondent = _respondents.get(job, lambda llm: Respondent(llm, job.io))
    return [respondent.answer(setting, question) for setting in settings]


def _from_json(line: dict[str, Any]) -> Answer:
    """Raises ValueError, KeyError or TypeError for what no session has written."""
    a = Answer(**line)
    counts = (a.budget, a.truncated, a.decoded, a.selected, a.examined, a.swapped, a.misses, a.missed_bytes)
    texts = (a.question, a.routing, a.eviction)
    if not (is_count(*counts) and is_number(a.seconds) and all(isinstance(text, str) for text in texts)):
        raise TypeError("a value is of another type")
    if not isinstance(a.values, list) or not any(map(partial(_is_of, a.values), (CHOICES, ROLLING, TEXT))):
        raise TypeError("no values")
    return a


def _is_of(values: list[Any], kind: str) -> bool:
    """Whether these can be the values of a question of that kind."""
    if kind == CHOICES:
        return all(isinstance(v, list) and len(v) == 2 and is_number(v[0]) and isinstance(v[1], bool) for v in values)
    return len(values) == 1 and (is_number(values[0]) if kind == ROLLING else isinstance(values[0], str))


def _fits(answer: Answer, question: Question) -> bool:
    """Whether what is kept can be an answer to the question."""
    return _is_of(answer.values, question.kind) and len(answer.values) == (len(question.parts) if question.kind == CHOICES else 1)


@contextmanager
def session(
    path: Path,
    n_ctx: int,
    settings: Sequence[Setting],
    *,
    threads: int | None = None,
    n_workers: int = 1,
    io: str | None = None,
) -> Iterator[Answers]:
    """A model that answers, with all answers that this build has ever computed in a context of `n_ctx`, in the user's cache.

    `threads`: in total, None for all cores. `n_workers`: processes of this machine that answer, each with the model loaded.
    Raises UsageError for settings that do not fit, CacherouteError when the model cannot be loaded.
    """
    tried = [setting._asdict() for setting in settings]
    with opened(path, n_ctx, tried, threads=threads, n_workers=n_workers, io=io) as own:
        kept = kept_scores(path, f"requests in a context of {n_ctx} tokens", _FORMAT, _from_json)
        yield Answers(own.llm, own.job(""), settings, kept, own.executor)
