"""Chooses among several quantisations of one model: the file and the routing that miss fewest bytes within a limit on loss.

All files get the same bytes of memory and are compared with `original` of one of them, the reference, so that the limit holds for
what quantising and rerouting lose together. A file is out where its own `original` exceeds the limit; one whose experts all
fit misses nothing, and the largest such file that is within the limit is the answer. Of the others each is searched as `tune`
searches a model: what its quantisation has left of the limit is what its routing may lose.

Knows scoring sessions; knows no command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cacheroute.engine.asked import Asked
from cacheroute.evals import pricing, tune
from cacheroute.evals.scorer import Scorer
from cacheroute.evals.text import Chunk
from cacheroute.evals.tune import Goal, Outcome, Search, Trial
from cacheroute.model.copies import Copy
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

ORIGINAL = Routing("original")
_TIMED = 12  # tokens that are decoded to tell how long all will take

Open = Callable[[Copy], AbstractContextManager[Scorer]]


@dataclass(frozen=True)
class Found:
    """What was found for one file. `capacity`: experts of each layer in the memory, None where those of one token do not fit.
    `outcome` None: not searched, as an earlier file misses nothing, or for lack of memory. `past`: mass_past_k() of a trace."""

    copy: Copy
    capacity: int | None
    whole: bool
    outcome: Outcome | None = None
    past: list[float] | None = None

    @property
    def missed(self) -> float:
        """MiB a token on the text that it was fitted to. Only where something fits."""
        assert self.outcome and self.outcome.chosen
        return 0.0 if self.whole else self.outcome.chosen.missed_mib_per_token


@dataclass
class Chooser:
    """A choice in `nbytes` of memory for experts. `goal`: its budget is each file's own.

    `compared` opens a session in which everything is compared with the reference, `own` one in which a file is compared with
    itself: rerouting a layer is priced there. `begin` is called with the seconds that all will take, about.
    """

    copies: Sequence[Copy]
    reference: Copy
    nbytes: int
    goal: Goal
    compared: Open
    own: Open
    report: Callable[[Copy, Trial], None] = lambda copy, trial: None
    chunks: Sequence[Chunk] = ()
    _base: list[float] = field(default_factory=list)
    _ladders: dict[tuple[object, ...], tuple[list[Routing], list[float], list[float] | None]] = field(default_factory=dict)

    def files(self) -> list[Found]:
        """Each file with what fits of it, in the order in which they are searched: those that are whole first, the largest of
        them first."""
        found = []
        for copy in self.copies:
            capacity = budgets.of_bytes(self.nbytes, copy.layout)
            found.append(Found(copy, capacity, capacity == copy.layout.n_expert))
        return sorted(found, key=lambda f: (not f.whole, -f.copy.header.nbytes))

    def expected_work(self, chunks: Sequence[Chunk]) -> float:
        """In decoded tokens, about: the reference, then of each file `original`, four rungs and the prices."""
        n, n_fit = len(chunks), len(tune.split(len(chunks), self.goal.seed)[0])
        units = float(n)
        priced = 0 if self.goal.uniform else min(pricing.n_chunks(self.goal.price_tokens, chunks), n_fit)
        for f in self.files():
            if f.capacity is not None:
                units += n if f.whole else 5 * n_fit + 2 * (n - n_fit) + priced * pricing.n_runs(self.goal.price_groups)
        return units * tune.work(chunks[0])

    def prepare(self, begin: Callable[[Scorer, float], None] = lambda session, seconds: None) -> None:
        """Scores the reference. `begin` is called before, with its session and the seconds that a decoded token takes."""
        with self.compared(self.reference) as session:
            self.chunks = session.chunks
            begin(session, seconds_per_token(session.llm, session.chunks[0]))
            cells = session.cells(ORIGINAL, self.reference.layout.n_expert, DEFAULT, range(len(session.chunks)), kl=True)
            session.keep_references()
            self._base = [c.nll_sum for c in cells]

    def run(self, fit: Sequence[int], held_out: Sequence[int]) -> list[Found]:
        """Searches every file. After prepare(), of which `fit` and `held_out` are indices of chunks."""
        found: list[Found] = []
        done = False
        for f in self.files():
            if f.capacity is None or done:
                found.append(f)
                continue
            outcome, past = self._search(f, f.capacity, fit, held_out)
            found.append(replace(f, outcome=outcome, past=past))
            done = f.whole and outcome.chosen is not None
        return found

    def _search(self, f: Found, capacity: int, fit: Sequence[int], held_out: Sequence[int]) -> tuple[Outcome, list[float] | None]:
        goal = replace(self.goal, budget=capacity)
        report = self._reporter(f.copy)
        alone: list[Trial] = []
        if f.whole or f.copy is not self.reference:
            with self.compared(f.copy) as session:
                search = Search(session, goal, fit, held_out, report, base_nll=self._base)
                if f.whole:
                    return search.run([ORIGINAL]), None
                alone = [search.trial(ORIGINAL, fit, early=True)]
            if not alone[0].passed:
                return Outcome(None, None, tuple(alone)), None
        rungs, costs, past = self._ladder(f, capacity, fit)
        with self.compared(f.copy) as session:
            search = Search(session, goal, fit, held_out, report, trials=alone, base_nll=self._base)
            start = 1 + tune.start_rung(costs, goal.limit - _loss(goal, alone)) if costs else None
            return search.run([ORIGINAL, *rungs], start), past

    def _ladder(self, f: Found, capacity: int, fit: Sequence[int]) -> tuple[list[Routing], list[float], list[float] | None]:
        """(routings from nearly lossless on, what each is predicted to lose, how flat the router is); made once for a file."""
        if self.goal.uniform:
            return tune.ladder(self.goal.strategy, f.copy.layout), [], None
        priced = tuple(fit[: pricing.n_chunks(self.goal.price_tokens, self.chunks)])
        key = (f.copy.fingerprint, capacity, priced)
        if key not in self._ladders:
            with self.own(f.copy) as session:
                candidates = pricing.candidates(session, capacity, self.goal.eviction, priced, self.goal.price_groups)
                past = session.replay(priced).mass_past_k()
            self._ladders[key] = [c.routing() for c in candidates], [c.cost for c in candidates], past
        return self._ladders[key]

    def _reporter(self, copy: Copy) -> Callable[[Trial], None]:
        return lambda trial: self.report(copy, trial)


def best(found: Sequence[Found]) -> Found | None:
    """The one that misses fewest bytes, of those with as many the one that loses least; None where nothing fits."""
    fitting = [f for f in found if f.outcome and f.outcome.chosen]
    return min(fitting, key=lambda f: (f.missed, _kl(f)), default=None)


def seconds_per_token(llm: Llama, chunk: Chunk) -> float:
    """Of decoding, measured on a few tokens."""
    llm.configure_as(Asked(llm.layout.n_expert, io="none"))
    llm.reset()
    llm.eval(chunk.tokens[:2])
    tokens = chunk.tokens[2 : 2 + _TIMED]
    start = time.perf_counter()
    with llm.decoding():
        for token in tokens:
            llm.eval([token])
    seconds = (time.perf_counter() - start) / max(len(tokens), 1)
    llm.reset()
    return seconds


def _loss(goal: Goal, alone: Sequence[Trial]) -> float:
    """What the quantisation alone loses of the limit, nats per token."""
    return sum(t.difference.delta_nll if goal.max_kl is None else t.kl.kl for t in alone)


def _kl(f: Found) -> float:
    assert f.outcome and f.outcome.chosen
    return f.outcome.chosen.kl.kl
