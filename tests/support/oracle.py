"""What cacheroute must do, once more, in the plainest numpy: the oracle that the C++ core is tested against.

Written from the paper (arXiv 2412.00099) and the definitions of our own strategies, not from the core. Knows no bytes and no
llama.cpp, and is not fast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

STRATEGIES = ("original", "pruning", "max-rank", "cumsum", "cache-prior", "drop-cold", "dynamic-k", "speculate")
EVICTIONS = ("lru", "lfu", "score", "soft-lfu")
SCORE_RATE = 0.1
SOFT_RATE, SOFT_WIDTH = 0.01, 0.02


@dataclass(frozen=True)
class Routing:
    """A strategy with its parameters; each strategy reads its own."""

    strategy: str = "original"
    k: int = 1
    m: int = 0
    j: int = 1
    p: float = 1.0
    lam: float = 0.0
    f: float = 0.0
    max_loss: float | None = None


@dataclass(frozen=True)
class Event:
    """One token in one layer. `run` are the experts that run, best score first."""

    run: list[int]
    missed: list[int]
    evicted: list[int]
    swapped: int
    lost_mass: float


def ranked(z: Vector) -> list[int]:
    """All experts, best first; ties go to the lower index."""
    return sorted(range(len(z)), key=lambda e: (-z[e], e))


def finite_range(z: Vector) -> float:
    """max(z) - min(z) over the finite entries."""
    finite = z[np.isfinite(z)]
    return float(finite.max() - finite.min()) if finite.size else 0.0


def cumsum_candidates(z: Vector, p: float) -> int:
    """cumsum: the least n for which the n largest softmax(z) sum to at least p."""
    finite = z[np.isfinite(z)]
    if not finite.size:
        return 0
    share = np.sort(np.exp(finite - finite.max()))[::-1]
    reached = np.cumsum(share) >= p * share.sum()
    return int(reached.argmax()) + 1 if reached.any() else len(finite)


def _max_rank(z: Vector, resident: set[int], n_used: int, m: int, j: int) -> set[int]:
    order = ranked(z)
    # a score of -inf: the model may not choose this expert, so it is no candidate
    kept, candidates = order[:j], [e for e in order[j : max(m, n_used)] if z[e] > -math.inf]
    cached = [e for e in candidates if e in resident]
    rest = [e for e in order[j:] if e not in cached]
    return set((kept + cached + rest)[:n_used])


def _cache_prior(z: Vector, resident: set[int], n_used: int, bonus: float, j: int) -> set[int]:
    always = ranked(z)[:j]  # with the full bonus no other expert can pass them, but for rounding
    biased = z + bonus * np.array([e in resident for e in range(len(z))], dtype=np.float64)
    return set((always + [e for e in ranked(biased) if e not in always])[:n_used])


def _drop_cold(z: Vector, mass: Vector, resident: set[int], n_used: int, f: float) -> set[int]:
    best, *others = ranked(z)[:n_used]
    least = f / n_used * mass[[best, *others]].sum()
    return {best} | {e for e in others if e in resident or mass[e] >= least}


def _dynamic_k(top: list[int], mass: Vector, p: float, k: int) -> set[int]:
    return set(top[:k]) if sequential_sum(mass[top[:k]]) >= p * sequential_sum(mass[top]) else set(top)


def _speculate(z: Vector, predicted: Vector, resident: set[int], n_used: int, lam: float, j: int) -> set[int]:
    bonus = lam * finite_range(predicted) * np.array([e in resident for e in range(len(z))], dtype=np.float64)
    there = resident | set(ranked(predicted + bonus)[: n_used - j]) | set(ranked(z)[:j])
    return set(sorted(ranked(z), key=lambda e: 2 if z[e] == -math.inf else e not in there)[:n_used])


def _guarded(chosen: set[int], top: list[int], mass: Vector, max_loss: float) -> set[int]:
    """Gives the heaviest lost experts their slots back, each for the lightest newcomer, until the loss is small enough."""
    lost = sorted(set(top) - chosen, key=lambda e: (-mass[e], e))
    newcomers = sorted(chosen - set(top), key=lambda e: (mass[e], -e))
    for n in range(len(lost)):
        repaired = chosen - set(newcomers[:n]) | set(lost[:n])
        loss = mass[top].sum() - mass[sorted(repaired)].sum()
        if max_loss > 0 and loss <= max_loss * mass[top].sum():
            return repaired
    return set(top)


def choose(
    routing: Routing,
    z: Vector,
    mass: Vector,
    resident: set[int],
    mean_range: float,
    n_used: int,
    predicted: Vector | None = None,
) -> list[int]:
    """The experts that run, best score first. `predicted`: scores that `speculate` goes by; None: it chooses as `original`."""
    top = ranked(z)[:n_used]
    j = min(routing.j, n_used)
    chosen = set(top)
    if routing.strategy == "pruning":
        chosen = set(top[: routing.k])
    elif routing.strategy == "max-rank":
        chosen = _max_rank(z, resident, n_used, routing.m, j)
    elif routing.strategy == "cumsum":
        chosen = _max_rank(z, resident, n_used, cumsum_candidates(z, routing.p), j)
    elif routing.strategy == "cache-prior":
        chosen = _cache_prior(z, resident, n_used, routing.lam * mean_range, j)
    elif routing.strategy == "drop-cold":
        chosen = _drop_cold(z, mass, resident, n_used, routing.f)
    elif routing.strategy == "dynamic-k":
        chosen = _dynamic_k(top, mass, routing.p, routing.k)
    elif routing.strategy == "speculate" and predicted is not None:
        chosen = _speculate(z, predicted, resident, n_used, routing.lam, j)
    if routing.max_loss is not None and chosen != set(top):
        chosen = _guarded(chosen, top, mass, routing.max_loss)
    return [e for e in ranked(z) if e in chosen]


def sequential_sum(values: Vector) -> float:
    """One after the other, so that equal masses stay equal."""
    return float(np.cumsum(values)[-1])


def allowed(tokens: Sequence[tuple[Vector, Vector]], resident: set[int], n_used: int, cover: float, last: int) -> set[int]:
    """The experts that a prompt's batch of (z, mass) may run: the resident and those of the last tokens, then those with most of
    the tokens' top-K mass."""
    share = np.zeros(len(tokens[0][0]))
    found = set(resident)
    for t, (z, mass) in enumerate(tokens):
        top = ranked(z)[:n_used]
        found |= {e for e in top if t >= len(tokens) - last and z[e] > -math.inf}
        if mass[top].any():
            share[top] += mass[top] / sequential_sum(mass[top])
    for e in ranked(share):
        if len(found) >= n_used and share[sorted(found)].sum() >= cover * share.sum():
            break
        found.add(e)
    return found


def keep_to(among: set[int], z: Vector, n_used: int) -> list[int]:
    """A token's K best of those; where too few of them are not masked, others, and masked ones last. Best score first."""

    def turn(e: int) -> int:
        return 2 if z[e] == -math.inf else int(e not in among)

    chosen = sorted(range(len(z)), key=lambda e: (turn(e), -z[e], e))[:n_used]
    return [e for e in ranked(z) if e in chosen]


@dataclass
class Cache:
    """Experts of one layer, at most `capacity` of them."""

    n_expert: int
    n_used: int
    capacity: int
    eviction: str
    recency: list[int] = field(default_factory=list)  # every expert ever used, the latest last
    uses: Counter[int] = field(default_factory=Counter)
    resident: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.score = np.zeros(self.n_expert)

    def observe(self, z: Vector) -> None:
        """The running mean of each expert's normalised score, or of how near it came to being used, at every token."""
        spread = finite_range(z)
        if spread > 0 and self.eviction == "soft-lfu":
            finite, near = np.isfinite(z), np.zeros(self.n_expert)
            with np.errstate(over="ignore"):
                near[finite] = 1 / (1 + np.exp((np.sort(z)[-self.n_used] - z[finite]) / (SOFT_WIDTH * spread)))
            self.score = self.score + SOFT_RATE * (near - self.score)
        elif spread > 0:
            normalised = np.where(np.isfinite(z), (z - z[np.isfinite(z)].min()) / spread, 0.0)
            self.score = self.score + SCORE_RATE * (normalised - self.score)

    def touch(self, expert: int) -> None:
        if expert in self.recency:
            self.recency.remove(expert)
        self.recency.append(expert)
        self.uses[expert] += 1
        self.resident.add(expert)

    def trim(self, keep: Sequence[int], by_recency: bool) -> list[int]:
        """Evicts down to the capacity, never one of `keep`; returns the evicted, in order."""
        evicted = []
        while len(self.resident) > self.capacity:
            # min() takes the first of equals: the least recently used
            oldest_first = [e for e in self.recency if e in self.resident and e not in keep]
            if by_recency or self.eviction == "lru":
                victim = oldest_first[0]
            elif self.eviction == "lfu":
                victim = min(oldest_first, key=lambda e: self.uses[e])
            else:
                victim = min(oldest_first, key=lambda e: float(self.score[e]))
            self.resident.remove(victim)
            evicted.append(victim)
        return evicted


class Layer:
    """The order of events for one token in one layer."""

    def __init__(self, n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str) -> None:
        self.n_used, self.routing = n_used, routing
        self.cache = Cache(n_expert, n_used, capacity, eviction)
        self.mean_range, self.n_tokens = 0.0, 0

    def prompt(self, tokens: Sequence[tuple[Vector, Vector]], cover: float, last: int) -> list[Event]:
        """One micro-batch of a prompt that keeps to few experts."""
        among = allowed(tokens, self.cache.resident, self.n_used, cover, last)
        return [self.step(z, mass, prefill=True, among=among) for z, mass in tokens]

    def step(
        self,
        z: Vector,
        mass: Vector,
        *,
        prefill: bool = False,
        prescribed: Sequence[int] | None = None,
        among: set[int] | None = None,
        predicted: Vector | None = None,
    ) -> Event:
        self.n_tokens += 1
        self.mean_range += (finite_range(z) - self.mean_range) / self.n_tokens
        self.cache.observe(z)
        before = set(self.cache.resident)
        top = ranked(z)[: self.n_used]
        if prescribed is not None:
            run = top = list(prescribed)
        elif among is not None:
            run = keep_to(among, z, self.n_used)
        else:
            routing = Routing() if prefill else self.routing
            run = choose(routing, z, mass, before, self.mean_range, self.n_used, predicted)
        missed = [e for e in run if e not in before]
        for e in sorted(run, key=lambda e: (mass[e], -e)):
            self.cache.touch(e)
        evicted = self.cache.trim(run, by_recency=prefill)
        top_mass, kept = mass[top].sum(), mass[run].sum()
        lost = max(0.0, 1 - kept / top_mass) if top_mass > 0 else 0.0
        return Event(run, missed, evicted, len(set(run) - set(top)), lost)


def belady_misses(events: Sequence[Sequence[int]], capacity: int) -> int:
    """Misses of the offline optimum: of the experts that this token does not use, the one needed last goes.

    Optimal when a token's experts must be resident together, as everywhere here.
    """
    resident: set[int] = set()
    misses = 0
    for t, ids in enumerate(events):
        misses += len(set(ids) - resident)
        resident |= set(ids)
        while len(resident) > capacity:

            def next_use(e: int, after: int = t + 1) -> int:
                return next((u for u in range(after, len(events)) if e in events[u]), len(events))

            resident.remove(max(sorted(resident - set(ids)), key=next_use))
    return misses


def last_distinct(touches: Sequence[int], capacity: int) -> set[int]:
    """The last `capacity` distinct experts of a sequence of uses."""
    return set(list(dict.fromkeys(reversed(touches)))[:capacity])
