"""The cost of rerouting each layer, and from it the lambda of cache-prior and the share of the memory of each layer.

Measured on a few chunks. The cost of a layer is KL(original || routed) when only this layer (or its group of neighbours) is
routed, stepped. It stands for the loss of likelihood, but is always positive and far less noisy, as it takes in the whole
distribution at every position. For small changes KL is quadratic in the change, and changes of different layers are nearly
independent, so costs add up. How much a layer misses and swaps with each lambda and each number of experts in memory comes from a
replay of what its router saw.

Minimising sum_l cost_l(lambda_l, C_l) + mu * missed_l(lambda_l, C_l) + nu * bytes_l(C_l) gives every layer the same marginal
price of a missed byte and of a byte of memory (Lagrange): layers that lose most by rerouting get more cache. nu is such that all
layers together stay within the budget; a sweep of mu is a ladder of candidates from lossless to lossy, of which `tune` finds the
rung by stepped perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cacheroute.evals.runner import Request
from cacheroute.evals.scorer import Scorer
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing.strategies import EXPERTS, Routing
from cacheroute.trace import simulate

LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8)  # lambda everywhere: misses and swaps of each layer
_CAPACITIES = 14  # numbers of experts in memory that are tried, about
PROBES = (0.1, 0.4)  # lambda in one group of layers only: its price
_TRUST = 0.75  # weight of a group's own price against the mean of all
_GRID = np.concatenate([[0.0], np.geomspace(0.01, 1.0, 60)])

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """Per token, for each MoE layer, each of LEVELS and each of `capacities`: `misses` and `swapped` [layer, 1 + level, capacity]
    (lambda = 0 first).

    `price` [group, probe]: nats of KL per swapped slot, of each group at each of PROBES. Of one expert, [layer]: `expert_mib` in
    the file, `resident_mib` in memory. `groups`: the layers of each group, counted from 0 over the MoE layers. `budget`: experts
    of a layer, on average by bytes.
    """

    misses: Array
    swapped: Array
    price: Array
    expert_mib: Array
    resident_mib: Array
    groups: tuple[tuple[int, ...], ...]
    capacities: tuple[int, ...]
    budget: int


@dataclass(frozen=True)
class Candidate:
    """Lambdas and experts in memory per layer, with the prediction: nats of KL and MiB missed per token."""

    lambdas: tuple[float, ...]
    experts: tuple[int, ...]
    cost: float
    missed_mib: float

    def routing(self) -> Routing:
        each = zip(self.lambdas, self.experts, strict=True)
        layers = tuple(Routing("cache-prior", {"lambda": x, EXPERTS: float(n)}) for x, n in each)
        mean = sum(self.lambdas) / len(self.lambdas)
        held = f"{min(self.experts)}..{max(self.experts)} experts"
        return Routing("cache-prior", layers=layers, text=f"cache-prior per layer, lambda {mean:.3f} on average, {held}")


def groups(n_layers: int, n_groups: int) -> tuple[tuple[int, ...], ...]:
    """Neighbouring layers that are priced together, at most `n_groups` of them, sizes as equal as can be."""
    return tuple(tuple(int(i) for i in part) for part in np.array_split(np.arange(n_layers), min(n_groups, n_layers)))


def n_chunks(n_tokens: int, chunks: Sequence[Chunk]) -> int:
    """Number of chunks with so many scored tokens together, at least one."""
    return max(math.ceil(n_tokens / chunks[0].n_scored), 1)


def n_runs(n_groups: int) -> int:
    """How often measure() scores each chunk."""
    return 2 + len(PROBES) * n_groups


def capacities(budget: int, layout: ExpertLayout) -> tuple[int, ...]:
    """Numbers of experts from K to E that a layer may be given, the budget's own among them."""
    step = max((layout.n_expert - layout.n_used) // (_CAPACITIES - 2), 1)
    return tuple(sorted({*range(layout.n_used, layout.n_expert + 1, step), budget, layout.n_expert}))


def measure(scorer: Scorer, budget: int, eviction: str, chunks: Sequence[int], n_groups: int) -> Prices:
    """Prices on the chunks of those indices. Cells that `scorer` has are not computed again."""
    layout = scorer.llm.layout
    n_layers = len(layout.layers)
    parts = groups(n_layers, n_groups)
    probes = {(g, p): _only(part, n_layers, x) for g, part in enumerate(parts) for p, x in enumerate(PROBES)}
    scorer.submit_next([Request(routing, budget, eviction, chunk, True) for chunk in chunks for routing in probes.values()])
    held = capacities(budget, layout)
    misses, swapped = _replayed(scorer.replay(chunks), eviction, held)
    kl, swaps = np.zeros((len(parts), len(PROBES))), np.zeros((len(parts), len(PROBES)))
    for chunk in chunks:
        for (g, p), routing in probes.items():
            cell = scorer.cell(routing, budget, eviction, chunk, kl=True)
            kl[g, p] += float(cell.kl.sum())
            swaps[g, p] += sum(cell.swapped[i] for i in parts[g])
    return Prices(
        misses=np.minimum.accumulate(misses, axis=1),  # more lambda never misses more, beyond noise
        swapped=np.maximum.accumulate(swapped, axis=1),
        price=np.maximum(kl, 0) / np.maximum(swaps, 1),
        expert_mib=np.array([layer.expert_bytes / MIB for layer in layout.layers]),
        resident_mib=np.array([layer.resident_bytes / MIB for layer in layout.layers]),
        groups=parts,
        capacities=held,
        budget=budget,
    )


def _replayed(replay: simulate.Replay, eviction: str, held: Sequence[int]) -> tuple[Array, Array]:
    """(misses, swapped) per token, [layer, 1 + level, capacity]."""
    shape = (len(replay.header.layers), 1 + len(LEVELS), len(held))
    misses, swapped = np.empty(shape), np.empty(shape)
    for i, x in enumerate((0.0, *LEVELS)):
        routing = Routing("cache-prior", {"lambda": x}) if x else Routing("original")
        for c, n in enumerate(held):
            _, *layers = replay.run(simulate.Arm(str(n), routing, eviction), per_layer=True)
            misses[:, i, c] = [row.misses / row.tokens for row in layers]
            swapped[:, i, c] = [row.swapped / row.tokens for row in layers]
    return misses, swapped


def _only(layers: Sequence[int], n_layers: int, value: float) -> Routing:
    """cache-prior with lambda in some layers, `original` in the others."""
    each = tuple(Routing("cache-prior", {"lambda": value if i in layers else 0.0}) for i in range(n_layers))
    return Routing("cache-prior", layers=each, text=f"cache-prior:lambda={value:g} in {len(layers)} layers")


def ladder(prices: Prices, n_rungs: int = 32) -> list[Candidate]:
    """Candidates of equal marginal price, cheapest first, each costing more and missing less than the one before."""
    cost, missed = curves(prices)
    found: dict[tuple[tuple[float, ...], tuple[int, ...]], Candidate] = {}
    steps = np.diff(cost, axis=1)[np.diff(cost, axis=1) > 0]
    fewer = -np.diff(missed, axis=1)[np.diff(missed, axis=1) < 0]
    if not len(steps) or not len(fewer):
        return []
    sizes = np.outer(prices.resident_mib, prices.capacities)
    room = prices.budget * prices.resident_mib.sum()
    rows = np.arange(len(cost))
    for mu in np.geomspace(steps.min() / fewer.max() / 10, steps.max() / fewer.min() * 10, 600):
        priced = cost + mu * missed
        held = _share_out(priced.min(axis=1), sizes, room)
        pick = priced[rows, :, held].argmin(axis=1)
        lambdas = tuple(round(float(_GRID[g]), 4) for g in pick)
        experts = tuple(prices.capacities[c] for c in held)
        candidate = Candidate(lambdas, experts, float(cost[rows, pick, held].sum()), float(missed[rows, pick, held].sum()))
        if pick.any():
            found.setdefault((lambdas, experts), candidate)
    ordered: list[Candidate] = []
    for candidate in sorted(found.values(), key=lambda c: (c.cost, c.missed_mib)):
        if not ordered or (candidate.cost > ordered[-1].cost and candidate.missed_mib < ordered[-1].missed_mib):
            ordered.append(candidate)
    return _thin(ordered, n_rungs)


def _share_out(priced: Array, sizes: Array, room: float) -> npt.NDArray[np.intp]:
    """The capacity of each layer, as an index: least `priced` [layer, capacity] where `sizes` [layer, capacity] fit `room`.

    By one price for all memory, and what that leaves over to the layers that gain most by a step.
    """
    rows = np.arange(len(priced))
    room += 1e-6
    low, high = 0.0, 1.0
    while sizes[rows, (priced + high * sizes).argmin(axis=1)].sum() > room:
        high *= 4
    for _ in range(40):
        middle = (low + high) / 2
        fits = sizes[rows, (priced + middle * sizes).argmin(axis=1)].sum() <= room
        low, high = (low, middle) if fits else (middle, high)
    held: npt.NDArray[np.intp] = (priced + high * sizes).argmin(axis=1)
    while True:
        left = room - sizes[rows, held].sum()
        extra = sizes - sizes[rows, held][:, None]
        gain = (priced[rows, held][:, None] - priced) / np.where(extra > 0, extra, np.inf)
        gain[(extra <= 0) | (extra > left)] = 0.0
        layer, c = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[layer, c] <= 0:
            break
        held[layer] = c
    return held


def candidates(scorer: Scorer, budget: int, eviction: str, chunks: Sequence[int], n_groups: int) -> list[Candidate]:
    """The ladder of what measure() finds on these chunks; measured once in a session."""
    key = ("candidates", budget, eviction, tuple(chunks), n_groups)
    if key not in scorer.memo:
        scorer.memo[key] = ladder(measure(scorer, budget, eviction, chunks, n_groups))
    found: list[Candidate] = scorer.memo[key]
    return found


def curves(prices: Prices) -> tuple[Array, Array]:
    """(cost in nats of KL per token, MiB missed per token) at each lambda of the grid, [layer, lambda, capacity]."""
    measured = np.array([0.0, *LEVELS])
    n_layers, _, n_capacities = prices.misses.shape
    cost, missed = np.empty((2, n_layers, len(_GRID), n_capacities))
    level, rising = _prices_by_lambda(prices.price)
    for g, part in enumerate(prices.groups):
        price = level[g] * rising
        for layer in part:
            for c in range(n_capacities):
                cost[layer, :, c] = np.maximum.accumulate(price * np.interp(_GRID, measured, prices.swapped[layer, :, c]))
                missed[layer, :, c] = np.interp(_GRID, measured, prices.misses[layer, :, c]) * prices.expert_mib[layer]
    return cost, missed


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
