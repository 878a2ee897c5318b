"""Finds the prompt routing that reads least within a limit on the KL of the tokens after the prompt.

The rungs are `keep` with ever smaller covers. Bisection finds the last one whose 95% interval of the KL ends within the limit; it
is then validated at places that took no part in it, and while its estimate fails there, the next milder one is.

Knows a PromptScorer; knows no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cacheroute.evals.prompts import ORIGINAL, PromptScore, PromptScorer, Summary, summary
from cacheroute.routing.prompt_routing import KEEP, PromptRouting

COVERS = (0.98, 0.95, 0.92, 0.9, 0.87, 0.85, 0.82, 0.8, 0.77, 0.75, 0.72, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Trial:
    """One rung at some places. `validates`: at the held-out ones, where the estimate has to be within the limit, not its end."""

    prompt_routing: PromptRouting
    summary: Summary
    passed: bool
    validates: bool


@dataclass(frozen=True)
class Outcome:
    """`chosen` is None when nothing fits; `validation` is its trial at the held-out places."""

    chosen: PromptRouting | None
    validation: Trial | None
    trials: tuple[Trial, ...]


@dataclass
class Search:
    """A search for one limit, `max_kl` in nats per token. `fit` and `held_out` are places."""

    scorer: PromptScorer
    budget: int
    eviction: str
    max_kl: float
    fit: Sequence[int]
    held_out: Sequence[int]
    seed: int = 0
    report: Callable[[Trial], None] = lambda trial: None
    trials: list[Trial] = field(default_factory=list)

    def run(self, covers: Sequence[float] = COVERS) -> Outcome:
        """Searches rungs, the mildest first. Loss is taken to rise along them."""
        rungs = [PromptRouting(KEEP, {"cover": cover}) for cover in covers]
        low, high = -1, len(rungs)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.trial(rungs[middle]).passed else (low, middle)
        for rung in reversed(rungs[: low + 1]):
            if not self.trial(rung).passed:
                continue
            validation = self.trial(rung, validates=True)
            if validation.passed:
                return Outcome(rung, validation, tuple(self.trials))
        return Outcome(None, None, tuple(self.trials))

    def trial(self, rung: PromptRouting, *, validates: bool = False) -> Trial:
        """Scores a rung, once."""
        for known in self.trials:
            if (known.prompt_routing, known.validates) == (rung, validates):
                return known
        own = self.held_out if validates else self.fit
        base: list[PromptScore] = []
        scores: list[PromptScore] = []
        for place in own:  # the lossless run of a place is kept for the lossy one
            for found, routing in ((base, ORIGINAL), (scores, rung)):
                found += self.scorer.scores(routing, self.budget, self.eviction, [place])
        s = summary(base, scores, len(self.scorer.llm.layout.layers), seed=self.seed)
        end = s.kl if validates else s.kl_high
        trial = Trial(rung, s, end is not None and end <= self.max_kl, validates)
        self.trials.append(trial)
        self.report(trial)
        return trial
