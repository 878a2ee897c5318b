"""Long texts: whether a routing repeats itself or drifts, which the perplexity of given text does not show.

A model with a routing continues a prompt with its own tokens, and what it has written is scored by `original` (its perplexity
falls where a text loops, and rises where it drifts) and searched for repetitions. A text never ends early: tokens that end one
are not chosen. Sampled tokens are drawn with the same random numbers for every routing, so that texts differ only from where the
routing has changed one. Prompts are routed by `original`; the prompt's last token gives the first of the text.

Knows a loaded model; knows no command line.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cacheroute.engine import completion
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import loading, paired, repetition
from cacheroute.evals.perplexity import Floats, LogP, log_probabilities, score
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.rows import Arm
from cacheroute.evals.runner import Job, Loaded
from cacheroute.evals.session import floats32, kept_scores, opened
from cacheroute.evals.text import Chunk
from cacheroute.files import is_count
from cacheroute.routing.strategies import Routing, parse, routing_key

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_FORMAT = "cacheroute-long-2"
_COLD = 100  # the first tokens, or half of a shorter text


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: the likeliest with `temp` 0, else drawn from those with at least `min_p` of the likeliest's
    probability."""

    temp: float = 0.0
    min_p: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return f"temp {self.temp:g}" if self.temp else "greedy"

    @property
    def key(self) -> str:
        return f"{self.temp!r} {self.min_p!r} {self.seed}" if self.temp else "greedy"

    def choose(self, log_p: LogP, u: float) -> int:
        """A token by its log-probabilities; `u` of a uniform distribution over [0, 1)."""
        if not self.temp:
            return int(log_p.argmax())
        scaled = log_p.astype(np.float64) / self.temp
        p = np.exp(scaled - scaled.max())
        p[log_p < log_p.max() + math.log(self.min_p or 1e-30)] = 0
        upto = np.cumsum(p)
        return int(min(np.searchsorted(upto, u * upto[-1], side="right"), np.flatnonzero(p)[-1]))


class Request(NamedTuple):
    """One text; `budget` in experts per layer, `prompt` its number."""

    routing: Routing
    budget: int
    eviction: str
    decoding: Decoding
    prompt: int

    @property
    def place(self) -> tuple[str, int, str, str, int]:
        return routing_key(self.routing), self.budget, self.eviction, self.decoding.key, self.prompt


@dataclass(frozen=True, kw_only=True)
class Written:
    """The text of a request, named by the parts of its place.

    `tokens` [n]. `nll32`: bytes of little-endian float32, nats of each by `original`. `misses` and `selected`: slots of all
    layers for each token after the first, which the prompt gives, [n - 1].
    """

    routing: str
    budget: int
    eviction: str
    decoding: str
    prompt: int
    tokens: list[int]
    nll32: bytes
    misses: list[int]
    selected: list[int]

    @property
    def place(self) -> tuple[str, int, str, str, int]:
        return self.routing, self.budget, self.eviction, self.decoding, self.prompt

    @property
    def nll(self) -> Floats:
        return np.frombuffer(self.nll32, "<f4").astype(np.float64)


class Writer:
    """Writes texts of `n` tokens with a loaded model, whose settings it changes."""

    def __init__(self, llm: Llama, n: int, io: str) -> None:
        self.llm, self._n, self._io = llm, n, io

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens that end an answer, found once for all texts."""
        return [t for t in range(self.llm.n_vocab()) if completion.is_end(self.llm, t)]

    def write(self, request: Request, prompt: Sequence[int]) -> Written:
        """Raises what Llama.configure() and Llama.eval() raise."""
        self._configure(request, request.routing)
        tokens, nll, misses, selected = self._decode(request, prompt)
        if request.routing.lossy:  # by `original` it would have been another text, and other probabilities
            self._configure(request, Routing("original"))
            chunk = Chunk(0, (*prompt, *tokens), len(prompt) - 1)
            nll = next(score(self.llm, [chunk])).nll.tolist()
        routing, budget, eviction, decoding, number = request.place
        return Written(
            routing=routing,
            budget=budget,
            eviction=eviction,
            decoding=decoding,
            prompt=number,
            tokens=tokens,
            nll32=np.array(nll, "<f4").tobytes(),
            misses=misses,
            selected=selected,
        )

    def _configure(self, request: Request, routing: Routing) -> None:
        self.llm.configure(budget=request.budget, routing=routing, eviction=request.eviction, io=self._io)

    def _decode(self, request: Request, prompt: Sequence[int]) -> tuple[list[int], list[float], list[int], list[int]]:
        """(tokens, nats of each, missed and selected slots of each after the first)."""
        llm, decoding = self.llm, request.decoding
        draws = np.random.default_rng([decoding.seed, request.prompt]).random(self._n)
        llm.reset()
        llm.eval(prompt)
        tokens: list[int] = []
        nll: list[float] = []
        counted = [llm.stats().decode]
        for u in draws:
            log_p = log_probabilities(llm)
            allowed = log_p.copy()
            allowed[self._ends] = -np.inf
            token = decoding.choose(allowed, float(u))
            tokens.append(token)
            nll.append(-float(log_p[token]))
            if len(tokens) < self._n:
                with llm.decoding():
                    llm.eval([token])
                counted.append(llm.stats().decode)
        each = [after - before for before, after in itertools.pairwise(counted)]
        return tokens, nll, [c.misses for c in each], [c.hits + c.misses for c in each]


class LongTexts:
    """Texts of `n` tokens after `prompts`, by one model. `after` is called with each that is not found in `results`."""

    def __init__(
        self, llm: Llama, prompts: Sequence[Chunk], n: int, job: Job, results: ResultsFile | None, executor: Executor | None
    ) -> None:
        self.llm, self.prompts = llm, prompts
        self.after: Callable[[Written], None] = lambda written: None
        self._n, self._job, self._results, self._executor = n, job, results, executor
        self._writer = Writer(llm, n, job.io)
        self._known = {w.place: w for w in map(_from_json, results.lines if results else ())}

    def missing(self, requests: Sequence[Request]) -> int:
        """Requests that are still to be written."""
        return sum(r.place not in self._known for r in requests)

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """The texts of the requests. Raises CacherouteError when a process that writes has ended."""
        left = [r for r in requests if r.place not in self._known]
        try:
            for request, written in zip(left, self._written(left), strict=True):
                self._known[request.place] = written
                if self._results and not request.routing.policy:  # the code of a policy may change under the same name
                    self._results.append(asdict(written) | {"nll32": base64.b64encode(written.nll32).decode()})
                self.after(written)
        except BrokenExecutor:
            raise CacherouteError("A process that writes has ended, perhaps for lack of memory; give fewer --workers.") from None
        return [self._known[r.place] for r in requests]

    def _written(self, requests: Sequence[Request]) -> Iterator[Written]:
        if self._executor is None:
            yield from (self._writer.write(r, self.prompts[r.prompt].tokens) for r in requests)
            return
        futures = [self._executor.submit(compute, self._job, self._n, r, self.prompts[r.prompt].tokens) for r in requests]
        yield from (future.result() for future in futures)


_writers: Loaded[Writer] = Loaded()


def compute(job: Job, n: int, request: Request, prompt: Sequence[int]) -> Written:
    """A text, in a process of its own: it loads the model of `job` and keeps it for the next one."""
    return _writers.get(job, lambda llm: Writer(llm, n, job.io)).write(request, prompt)


def _from_json(line: dict[str, Any]) -> Written:
    """Raises ValueError, KeyError or TypeError for what no session has written."""
    written = Written(**line | {"nll32": floats32(line["nll32"])})
    counts = (written.budget, written.prompt, *written.tokens, *written.misses, *written.selected)
    if not (is_count(*counts) and all(isinstance(t, str) for t in (written.routing, written.eviction, written.decoding))):
        raise TypeError("a value is of another type")
    if not len(written.tokens) == len(written.nll) == len(written.misses) + 1 == len(written.selected) + 1:
        raise ValueError("the lengths differ")
    return written


def _check(line: dict[str, Any], n_prompts: int, n: int, n_vocab: int) -> None:
    """Raises ValueError, KeyError or TypeError for a line that is not of these prompts and this model."""
    written = _from_json(line)
    if written.prompt >= n_prompts or len(written.tokens) != n or max(written.tokens) >= n_vocab:
        raise ValueError("it is of another text or model")


@contextmanager
def session(
    path: Path,
    source: loading.Source,
    n_prompts: int,
    n: int,
    arms: Sequence[Arm],
    *,
    threads: int | None = None,
    n_workers: int = 1,
    io: str | None = None,
) -> Iterator[LongTexts]:
    """Texts of `n` tokens after prompts of source.chunk tokens, evenly spread over its text, with all that this build has ever
    written for them, in the user's cache.

    Raises UsageError for settings or text that do not fit, CacherouteError when the model cannot be loaded.
    """
    tried = [{"budget": arm.budget_experts, "routing": parse(arm.routing), "eviction": arm.eviction} for arm in arms]
    with opened(path, source.chunk + n, tried, threads=threads, n_workers=n_workers, io=io) as own:
        prompts = spread(loading.chunks(own.llm, source), n_prompts)
        job = own.job(loading.text_fingerprint(prompts))
        check = partial(_check, n_prompts=len(prompts), n=n, n_vocab=own.llm.n_vocab())
        kept = kept_scores(path, f"{n} tokens after {job.text}", _FORMAT, check)
        yield LongTexts(own.llm, prompts, n, job, kept, own.executor)


def spread(chunks: Sequence[Chunk], n: int) -> list[Chunk]:
    """n of them, evenly spread. Raises UsageError where there are fewer."""
    if len(chunks) < n:
        raise UsageError(
            f"The text has {len(chunks)} prompts of {len(chunks[0].tokens)} tokens, and {n} are wanted; give more text."
        )
    return [chunks[round(i * (len(chunks) - 1) / max(n - 1, 1))] for i in range(n)]


@dataclass(frozen=True)
class Summary:
    """The texts of one routing. Means over texts, but `longest_repeat_most`, the longest of all of them.

    `distinct1`, 2 and 4: different n-grams over all; `longest_repeat`: tokens of the longest piece that comes twice. `same`:
    tokens before a text departs from that of `original`. Perplexities and nats per token are those of the texts by `original`,
    and so `delta_nll` with its 95% interval of resampled prompts, against the texts of `original`; `ppl_cold` and `miss_cold` of
    the first `n_cold` tokens, `ppl_warm` and `miss_warm` of those after them.
    """

    n_texts: int
    n_tokens: int
    n_cold: int
    distinct1: float
    distinct2: float
    distinct4: float
    longest_repeat: float
    longest_repeat_most: int
    same: float
    ppl: float
    ppl_cold: float
    ppl_warm: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    miss_cold: float
    miss_warm: float


def summary(base: Sequence[Written], own: Sequence[Written], *, seed: int = 0) -> Summary:
    """`base`: the texts of `original` after the same prompts."""
    n = len(own[0].tokens)
    cold = min(_COLD, n // 2)
    nll = np.stack([w.nll for w in own])
    d = paired.compare([w.nll.sum() for w in base], nll.sum(axis=1).tolist(), [n] * len(own), seed=seed)
    repeats = [repetition.longest_repeat(w.tokens) for w in own]
    distinct = [float(np.mean([repetition.distinct(w.tokens, k) for w in own])) for k in (1, 2, 4)]
    return Summary(
        n_texts=len(own),
        n_tokens=n,
        n_cold=cold,
        distinct1=distinct[0],
        distinct2=distinct[1],
        distinct4=distinct[2],
        longest_repeat=float(np.mean(repeats)),
        longest_repeat_most=max(repeats),
        same=float(np.mean([_same(a.tokens, b.tokens) for a, b in zip(base, own, strict=True)])),
        ppl=float(np.exp(nll.mean())),
        ppl_cold=float(np.exp(nll[:, :cold].mean())),
        ppl_warm=float(np.exp(nll[:, cold:].mean())),
        delta_nll=d.delta_nll,
        delta_nll_low=d.low,
        delta_nll_high=d.high,
        miss_cold=_miss_rate(own, slice(None, cold)),
        miss_warm=_miss_rate(own, slice(cold, None)),
    )


def _miss_rate(texts: Sequence[Written], part: slice) -> float:
    return sum(sum(w.misses[part]) for w in texts) / max(sum(sum(w.selected[part]) for w in texts), 1)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@dataclass(frozen=True)
class LongSettings:
    """What a row of `eval long` is of: `budget` as typed and its experts per layer, tokens of each prompt, and the decoding."""

    model: str
    text: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    n_prompt: int
    decoding: str


@dataclass(frozen=True)
class LongRow(Summary, LongSettings):
    """One routing and decoding over all prompts, as `eval long` reports it: the settings, then the figures."""
