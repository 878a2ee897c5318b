"""What each layer asks for its experts: the price of cache-prior per layer, and the per-layer lambdas of equal marginal price.

Measured on a few chunks, stepped. The cost of a layer is KL(original || routed) when only this layer (or its group of neighbours)
is routed: like the loss of likelihood it stands for, but always positive and far less noisy, as every position's whole
distribution speaks. For small changes KL is quadratic in the change, and changes of different layers are nearly independent, so
costs add up. What a layer reads at each lambda comes from runs with one lambda everywhere: it needs few tokens.

Minimising sum_l cost_l(lambda_l) + mu * read_l(lambda_l) for one multiplier mu at a time gives every layer the same marginal
price (Lagrange); a sweep of mu is a ladder of candidates from lossless to lossy, of which `tune` finds the rung by stepped
perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cacheroute.evals.scorer import Ask, Scorer
from cacheroute.evals.text import Chunk
from cacheroute.routing import Routing
from cacheroute.stats import MIB

LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8)  # lambda everywhere: misses and swaps of each layer
PROBES = (0.1, 0.4)  # lambda in one group of layers only: its price
_TRUST = 0.75  # in a group's own price against the mean of all
_GRID = np.concatenate([[0.0], np.geomspace(0.01, 1.0, 60)])

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """Per token, for each MoE layer and each of LEVELS: `misses` and `swapped` [layer, 1 + level] (lambda = 0 first).

    `price` [group, probe]: nats of KL per swapped slot, of each group at each of PROBES. `expert_mib` [layer]. `groups`: the
    layers of each group, counted from 0 over the MoE layers.
    """

    misses: Array
    swapped: Array
    price: Array
    expert_mib: Array
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """Lambdas per layer, with the prediction: nats of KL and MiB read per token."""

    lambdas: tuple[float, ...]
    cost: float
    read_mib: float

    def routing(self) -> Routing:
        layers = tuple(Routing("cache-prior", {"lambda": x}) for x in self.lambdas)
        mean = sum(self.lambdas) / len(self.lambdas)
        return Routing("cache-prior", layers=layers, text=f"cache-prior per layer, lambda {mean:.3f} on average")


def groups(n_layers: int, n_groups: int) -> tuple[tuple[int, ...], ...]:
    """Neighbouring layers that are priced together, at most `n_groups` of them, sizes as equal as can be."""
    return tuple(tuple(int(i) for i in part) for part in np.array_split(np.arange(n_layers), min(n_groups, n_layers)))


def n_chunks(n_tokens: int, chunks: Sequence[Chunk]) -> int:
    """How many chunks have so many scored tokens, at least one."""
    return max(math.ceil(n_tokens / chunks[0].n_scored), 1)


def n_runs(n_groups: int) -> int:
    """How often measure() scores each chunk."""
    return 2 + len(LEVELS) + len(PROBES) * n_groups


def measure(scorer: Scorer, budget: int, eviction: str, chunks: Sequence[int], n_groups: int) -> Prices:
    """Prices on the chunks of those indices. Cells that `scorer` has are not computed again."""
    layout = scorer.llm.layout
    n_layers = len(layout.layers)
    parts = groups(n_layers, n_groups)
    everywhere = [Routing("original"), *(_only(range(n_layers), n_layers, x) for x in LEVELS)]
    misses, swapped = np.zeros((n_layers, len(everywhere))), np.zeros((n_layers, len(everywhere)))
    kl, swaps = np.zeros((len(parts), len(PROBES))), np.zeros((len(parts), len(PROBES)))
    probes = {(g, p): _only(part, n_layers, x) for g, part in enumerate(parts) for p, x in enumerate(PROBES)}
    scorer.ahead(
        [
            Ask(routing, budget, eviction, chunk, kl)
            for chunk in chunks
            for routings, kl in ((everywhere, False), (probes.values(), True))
            for routing in routings
        ]
    )
    n_tokens = 0
    for chunk in chunks:
        for i, routing in enumerate(everywhere):
            cell = scorer.cell(routing, budget, eviction, chunk)
            misses[:, i] += cell.misses
            swapped[:, i] += cell.swapped
        n_tokens += cell.n
        for (g, p), routing in probes.items():
            cell = scorer.cell(routing, budget, eviction, chunk, kl=True)
            kl[g, p] += cell.kl or 0.0
            swaps[g, p] += sum(cell.swapped[i] for i in parts[g])
    return Prices(
        misses=np.minimum.accumulate(misses, axis=1) / n_tokens,  # more lambda never reads more; what says so is noise
        swapped=np.maximum.accumulate(swapped, axis=1) / n_tokens,
        price=np.maximum(kl, 0) / np.maximum(swaps, 1),
        expert_mib=np.array([layer.expert_bytes / MIB for layer in layout.layers]),
        groups=parts,
    )


def _only(layers: Sequence[int], n_layers: int, value: float) -> Routing:
    """cache-prior with lambda in some layers, `original` in the others."""
    each = tuple(Routing("cache-prior", {"lambda": value if i in layers else 0.0}) for i in range(n_layers))
    return Routing("cache-prior", layers=each, text=f"cache-prior:lambda={value:g} in {len(layers)} layers")


def ladder(prices: Prices, n_rungs: int = 32) -> list[Candidate]:
    """Candidates of equal marginal price, cheapest first, every one costing more and reading less than the one before."""
    cost, read = curves(prices)
    rungs: dict[tuple[int, ...], Candidate] = {}
    steps = np.diff(cost, axis=1)[np.diff(cost, axis=1) > 0]
    reads = -np.diff(read, axis=1)[np.diff(read, axis=1) < 0]
    if not len(steps) or not len(reads):
        return []
    for mu in np.geomspace(steps.min() / reads.max() / 10, steps.max() / reads.min() * 10, 600):
        pick = np.argmin(cost + mu * read, axis=1)
        if pick.any() and tuple(pick) not in rungs:
            rows = np.arange(len(pick))
            lambdas = tuple(round(float(_GRID[g]), 4) for g in pick)
            rungs[tuple(pick)] = Candidate(lambdas, float(cost[rows, pick].sum()), float(read[rows, pick].sum()))
    ordered = sorted(rungs.values(), key=lambda c: (c.cost, -c.read_mib))
    return _thin(ordered, n_rungs)


def rungs(scorer: Scorer, budget: int, eviction: str, chunks: Sequence[int], n_groups: int) -> tuple[list[Routing], list[float]]:
    """The ladder of what measure() finds on these chunks: routings, cheapest first, and their costs in nats of KL per token."""
    candidates = ladder(measure(scorer, budget, eviction, chunks, n_groups))
    return [c.routing() for c in candidates], [c.cost for c in candidates]


def curves(prices: Prices) -> tuple[Array, Array]:
    """(cost in nats of KL per token, MiB read per token) of each layer at each lambda of the grid, [layer, lambda]."""
    measured = np.array([0.0, *LEVELS])
    n_layers = len(prices.misses)
    cost, read = np.empty((n_layers, len(_GRID))), np.empty((n_layers, len(_GRID)))
    level, rising = _prices_by_lambda(prices.price)
    for g, part in enumerate(prices.groups):
        price = level[g] * rising
        for layer in part:
            cost[layer] = np.maximum.accumulate(price * np.interp(_GRID, measured, prices.swapped[layer]))
            read[layer] = np.interp(_GRID, measured, prices.misses[layer]) * prices.expert_mib[layer]
    return cost, read


def _prices_by_lambda(price: Array) -> tuple[Array, Array]:
    """Price of a swap as level [group] x a power of lambda [grid].

    A swap at a small lambda is between near-equals, so its price rises with lambda. Few tokens measure the exponent of one group
    badly: all groups share theirs, and the levels are drawn towards their mean.
    """
    logs = np.log(np.maximum(price, 1e-9))
    pooled = logs.mean(axis=0)
    exponent = float(np.clip((pooled[1] - pooled[0]) / np.log(PROBES[1] / PROBES[0]), 0.1, 1.0))
    level = np.exp(_TRUST * (logs - pooled).mean(axis=1) + pooled.mean())
    return level, (_GRID / np.sqrt(PROBES[0] * PROBES[1])) ** exponent


def _thin(candidates: list[Candidate], n: int) -> list[Candidate]:
    """About n candidates, evenly spaced in the logarithm of their cost."""
    if len(candidates) <= n:
        return candidates
    marks = np.geomspace(max(candidates[0].cost, 1e-9), candidates[-1].cost, n)
    costs = np.array([c.cost for c in candidates])
    return [candidates[i] for i in sorted({int(np.abs(costs - mark).argmin()) for mark in marks})]
