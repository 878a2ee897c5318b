"""Replays a trace through the C++ router: any budget, routing and eviction, without the model.

Open-loop: the scores are always the recorded ones, while a lossy routing would have changed those of later layers
and tokens. Nothing is read, so only misses are counted.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB
from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import budget as budgets
from cacheroute.routing import custom_policy, strategies
from cacheroute.routing import eviction as evictions
from cacheroute.routing.eviction import BELADY
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.routing.strategies import Routing
from cacheroute.trace.trace_file import BATCH, DECODE, PRESCRIBED, Trace

_ORIGINAL = PromptRouting()
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Arm:
    """What is replayed; `budget` as it was typed."""

    budget: str
    routing: Routing
    eviction: str
    prompt_routing: PromptRouting = _ORIGINAL


@dataclass(frozen=True)
class Row:
    """One line of a report, over the decoded tokens; names that `bench` also uses have the same meaning.

    `layer` is llama.cpp's number, null for all layers together. `lost_mass` is the mean share of the top-K's router mass that
    did not run. `missed_mib_per_token` = misses x bytes of an expert. `lifetime_tokens` is how long an expert stays in the cache:
    tokens x experts held per eviction, null without one.

    Of the prompts, all together: `prompt_swap_rate`, and `prompt_reads`, the experts that their micro-batches used and that the
    cache did not have before the batch, with their bytes; null where the trace does not know the batches.
    """

    model: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    budget_mib: float
    shuffled: bool
    layer: int | None
    tokens: int
    hits: int
    misses: int
    swapped: int
    dropped: int
    evictions: int
    miss_rate: float
    swap_rate: float
    drop_rate: float
    lost_mass: float
    missed_mib_per_token: float
    lifetime_tokens: float | None
    prompt_routing: str
    prompt_tokens: int
    prompt_swap_rate: float
    prompt_reads: int | None
    prompt_read_mib: float | None


@dataclass(frozen=True)
class LayerEvents:
    """The records of one layer in one sequence, as the native router takes them.

    [n, E] scores `z` and `mass` (half floats), [n] `flags` (DECODE, BATCH), [n, K] ids where the trace prescribes them.
    """

    z: npt.NDArray[np.uint16]
    mass: npt.NDArray[np.uint16] | None
    flags: npt.NDArray[np.uint8]
    prescribed: npt.NDArray[np.int32] | None

    @property
    def decode(self) -> npt.NDArray[np.uint8]:
        """[n]: whether a token was decoded, 0 or 1."""
        return np.bitwise_and(self.flags, DECODE, dtype=np.uint8)


def _mass_past(events: LayerEvents, k: int) -> npt.NDArray[np.float64]:
    """Of each decoded token, the share of the router's mass past the K-th rank."""
    decoded = events.decode > 0
    z = events.z[decoded].view(np.float16).astype(np.float64)  # of each token minus the largest
    mass = np.exp(z) if events.mass is None else events.mass[decoded].view(np.float16).astype(np.float64)
    best = np.argsort(-z, axis=1, kind="stable")[:, :k]
    share: npt.NDArray[np.float64] = np.take_along_axis(mass, best, axis=1).sum(axis=1) / mass.sum(axis=1)
    return 1 - share


class Replay:
    """A trace, cut by sequence and layer once, to be replayed any number of times."""

    def __init__(self, trace: Trace, *, shuffle: int | None = None) -> None:
        """`shuffle`: seed of a random order of the decoded tokens of each sequence: the same experts without locality."""
        self.header = trace.header
        self.shuffled = shuffle is not None
        self._rng = np.random.default_rng(shuffle)
        self._knows_batches = bool(trace.records["flags"][0] & BATCH)
        self.sequences = [self._cut(part) for part in _sequences(trace.records)]
        if not any(layer.decode.any() for layers in self.sequences for layer in layers):
            raise UsageError("The trace has no decoded token; routings act on those alone.")

    def run(self, arm: Arm, *, per_layer: bool = False) -> list[Row]:
        """Raises UsageError for what does not fit the model, CacherouteError when a policy in Python fails."""
        h = self.header
        budget = budgets.parse(arm.budget, h.layout)
        arm.routing.check(h.n_expert, h.n_used, h.layers, h.model)
        strategies.capacities(arm.routing, budget, h.layout)
        evictions.check(arm.eviction, evictions.ALL)
        if arm.eviction == BELADY and arm.routing.lossy:
            raise UsageError(
                f"belady needs the future choices, which are known only with the routing `original`, not {arm.routing}."
            )
        if arm.routing.speculates:
            raise UsageError(
                f"{arm.routing} goes by predicted scores, which a trace does not have; `eval perplexity` and `bench` run it."
            )
        if arm.prompt_routing.lossy and not self._knows_batches:
            raise UsageError("The trace is of an earlier version and does not know which tokens shared a batch; trace again.")
        reads = np.zeros(len(h.layers), np.int64)
        with self._router(budget.capacity, arm.routing, arm.eviction, arm.prompt_routing) as router:
            for n, layers in enumerate(self.sequences):
                router.reset()
                for i, events in enumerate(layers):
                    ids = self._top(n, i) if arm.eviction == BELADY else events.prescribed
                    reads[i] += router.replay(i, replace(events, prescribed=ids), with_next_uses=arm.eviction == BELADY)[1]
            chosen = range(len(h.layers)) if per_layer else ()
            return [self._row(router, arm, budget, i, reads) for i in (-1, *chosen)]

    def mass_past_k(self) -> list[float]:
        """How flat the router of each layer is: the share of its mass that decoded tokens give to experts that are not among
        the best K, on average; 0 is the most peaked, 1 - K / E is flat."""
        means = []
        for i in range(len(self.header.layers)):
            own = [layers[i] for layers in self.sequences]
            means.append(float(np.concatenate([_mass_past(events, self.header.n_used) for events in own]).mean()))
        return means

    def resident(self, arm: Arm, sequence: int, layer: int) -> npt.NDArray[np.bool_]:
        """[n_events, E]: the cache before each event of one layer in one sequence."""
        capacity = budgets.parse(arm.budget, self.header.layout).capacity
        with self._router(capacity, arm.routing, arm.eviction) as router:
            return router.watch(layer, self.sequences[sequence][layer])

    def _top(self, sequence: int, layer: int) -> npt.NDArray[np.int32]:
        """[n_events, K]: what the model itself chooses."""
        with self._router(self.header.n_used, Routing("original"), "lru") as router:
            return router.replay(layer, self.sequences[sequence][layer])[0]

    def _router(self, capacity: int, routing: Routing, eviction: str, prompts: PromptRouting | None = None) -> _Router:
        h = self.header
        shape = bindings.Shape(len(h.layers), h.n_expert, h.n_used, capacity, evictions.ALL[eviction])
        return _Router(shape, routing, prompts or _ORIGINAL)

    def _cut(self, records: npt.NDArray[np.void]) -> list[LayerEvents]:
        decoded = np.unique(records["token"][records["flags"] & DECODE > 0])
        place = dict(zip(decoded.tolist(), self._rng.permutation(decoded).tolist(), strict=True)) if self.shuffled else {}
        layers = []
        for layer in range(len(self.header.layers)):
            own = records[records["layer"] == layer]
            if self.shuffled:
                own = own[np.argsort([place.get(t, -1) for t in own["token"].tolist()], kind="stable")]
            prescribed = own["flags"] & PRESCRIBED > 0
            layers.append(
                LayerEvents(
                    z=np.ascontiguousarray(own["z"]).view(np.uint16),
                    mass=np.ascontiguousarray(own["mass"]).view(np.uint16) if "mass" in (own.dtype.names or ()) else None,
                    flags=(own["flags"] & (DECODE | BATCH)).astype(np.uint8),
                    prescribed=np.where(prescribed[:, None], own["ids"].astype(np.int32), -1) if prescribed.any() else None,
                )
            )
        return layers

    def _row(self, router: _Router, arm: Arm, budget: budgets.Budget, layer: int, reads: npt.NDArray[np.int64]) -> Row:
        h, c, prompt = self.header, router.counters(layer), router.counters(layer, prefill=True)
        of = range(len(h.layers)) if layer < 0 else (layer,)
        missed = sum(router.counters(i).misses * h.expert_bytes[i] for i in of)
        return Row(
            model=h.model,
            routing=str(arm.routing),
            eviction=arm.eviction,
            budget=arm.budget,
            budget_experts=budget.capacity,
            budget_mib=budget.capacity * sum(h.expert_bytes[i] for i in of) / MIB,
            shuffled=self.shuffled,
            layer=None if layer < 0 else h.layers[layer],
            tokens=c.tokens,
            hits=c.hits,
            misses=c.misses,
            swapped=c.swapped,
            dropped=c.dropped,
            evictions=c.evictions,
            miss_rate=c.misses / max(c.hits + c.misses, 1),
            swap_rate=c.swapped / max(c.examined, 1),
            drop_rate=c.dropped / max(c.examined, 1),
            lost_mass=c.lost_mass * h.n_used / max(c.examined, 1),
            missed_mib_per_token=missed / MIB / max(c.tokens, 1),
            lifetime_tokens=c.held / c.evictions if c.evictions else None,
            prompt_routing=str(arm.prompt_routing),
            prompt_tokens=prompt.tokens,
            prompt_swap_rate=prompt.swap_rate,
            prompt_reads=sum(int(reads[i]) for i in of) if self._knows_batches else None,
            prompt_read_mib=sum(int(reads[i]) * h.expert_bytes[i] for i in of) / MIB if self._knows_batches else None,
        )


def miss_rate(
    scores: Sequence[npt.NDArray[np.float16]], n_used: int, capacity: int, routing: Routing, eviction: str, *, skip: int
) -> float:
    """Of decoded tokens with these scores, [n, E] of each layer: the share of their chosen experts that the cache did not hold.

    The first `skip` tokens fill the cache and are not counted. The routing must fit (Routing.check).
    """
    shape = bindings.Shape(len(scores), scores[0].shape[1], n_used, capacity, evictions.ONLINE[eviction])
    missed = 0
    with _Router(shape, routing, _ORIGINAL) as router:
        for i, z in enumerate(scores):
            decoded = np.full(len(z), DECODE, np.uint8)
            events = LayerEvents(np.ascontiguousarray(z).view(np.uint16), None, decoded, None)
            router.replay(i, replace(events, z=events.z[:skip], flags=events.flags[:skip]))
            before = router.counters(i).misses
            router.replay(i, replace(events, z=events.z[skip:], flags=events.flags[skip:]))
            missed += router.counters(i).misses - before
    return missed / (n_used * sum(len(z) - skip for z in scores))


def arms(
    budget: Sequence[str],
    routing: Sequence[Routing],
    eviction: Sequence[str],
    prompt_routing: Sequence[PromptRouting] = (_ORIGINAL,),
) -> list[Arm]:
    """All combinations; belady only once for each budget, with `original`."""
    found = []
    for b, r, e, p in itertools.product(budget, routing, eviction, prompt_routing):
        arm = Arm(b, Routing("original"), e) if e == BELADY else Arm(b, r, e, p)
        if arm not in found:
            found.append(arm)
    return found


def run(
    trace: Trace,
    wanted: Sequence[Arm],
    *,
    per_layer: bool = False,
    shuffle: int | None = None,
    progress: Callable[[Arm], None] = lambda arm: None,
) -> list[Row]:
    """Replays every arm over a trace."""
    replay = Replay(trace, shuffle=shuffle)
    rows = []
    for arm in wanted:
        progress(arm)
        rows += replay.run(arm, per_layer=per_layer)
    return rows


def next_uses(ids: npt.NDArray[np.int32], decode: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """[n, K]: the event in which each chosen expert is needed next.

    A use in a prompt counts as never, as only misses of decoded tokens are counted. So belady misses no more than any other
    eviction, over the decoded tokens.
    """
    n, k = ids.shape
    when = np.repeat(np.arange(n, dtype=np.int32), k)
    order = np.lexsort((when, ids.ravel()))
    later = np.full(n * k, _NEVER, np.int32)
    this, following = order[:-1], order[1:]
    same = (ids.ravel()[this] == ids.ravel()[following]) & (decode[when[following]] > 0)
    later[this[same]] = when[following[same]]
    return later.reshape(n, k)


def _sequences(records: npt.NDArray[np.void]) -> Iterator[npt.NDArray[np.void]]:
    cuts = np.flatnonzero(np.diff(records["sequence"])) + 1
    yield from np.split(records, cuts)


class _Router:
    """A cr_router, freed at the end of a `with`."""

    def __init__(self, shape: bindings.Shape, routing: Routing, prompts: PromptRouting) -> None:
        self._shape = shape
        per_layer = strategies.to_native(routing, shape.n_used, shape.n_layers)
        prompts.set(per_layer)
        self._policy: custom_policy.Policy | None = None
        if routing.policy:
            self._policy = custom_policy.Policy(routing.policy, shape.n_expert, shape.n_used, shape.n_layers)
        self._handle = bindings.checked(bindings.lib.cr_router_new, shape, per_layer)
        if self._policy:
            bindings.lib.cr_router_set_policy(self._handle, self._policy.callback, None)

    def __enter__(self) -> _Router:
        return self

    def __exit__(self, *_: object) -> None:
        bindings.lib.cr_router_free(self._handle)

    def reset(self) -> None:
        bindings.lib.cr_router_reset(self._handle)
        if self._policy:
            self._policy.reset()

    def replay(self, layer: int, events: LayerEvents, *, with_next_uses: bool = False) -> tuple[npt.NDArray[np.int32], int]:
        """The ids chosen, [n, K], and the experts that prompt batches read. `with_next_uses`, for belady: all ids are prescribed,
        and so is when each is needed next."""
        ids = np.empty((len(events.z), self._shape.n_used), np.int32)
        bits = np.empty((len(events.z), -(-self._shape.n_expert // 8)), np.uint8)
        following = next_uses(events.prescribed, events.decode) if with_next_uses and events.prescribed is not None else None
        self._replay(layer, events, following, ids, bits)
        return ids, self._prompt_reads(events, ids, bits)

    def watch(self, layer: int, events: LayerEvents) -> npt.NDArray[np.bool_]:
        """Which experts the cache held before each event, [n, E]."""
        n_expert = self._shape.n_expert
        bits = np.empty((len(events.z), -(-n_expert // 8)), np.uint8)
        self._replay(layer, events, None, None, bits)
        return np.unpackbits(bits, axis=1, count=n_expert, bitorder="little").view(np.bool_)

    def _prompt_reads(self, events: LayerEvents, ids: npt.NDArray[np.int32], bits: npt.NDArray[np.uint8]) -> int:
        """Experts that batches of a prompt used and the cache did not have before them; `bits`: the cache before each event."""
        prompt, batch = events.decode == 0, np.cumsum(events.flags & BATCH > 0)
        first = np.unique(batch[prompt], return_index=True)[1]
        if not len(first):
            return 0
        used = np.zeros((len(first), self._shape.n_expert), np.bool_)
        own = np.repeat(np.arange(len(first)), np.diff([*first, int(prompt.sum())]))
        used[own[:, None], ids[prompt]] = True
        before = np.unpackbits(bits[prompt][first], axis=1, count=self._shape.n_expert, bitorder="little")
        return int((used & (before == 0)).sum())

    def _replay(self, layer: int, events: LayerEvents, *more: npt.NDArray[Any] | None) -> None:
        arrays = (events.z, events.mass, events.flags, events.prescribed, *more)
        if bindings.lib.cr_router_replay(self._handle, layer, len(events.z), *(_address(a) for a in arrays)):
            raise CacherouteError("There is not enough memory to replay the trace.")
        if self._policy:
            self._policy.check()

    def counters(self, layer: int, *, prefill: bool = False) -> Counters:
        return bindings.counters(bindings.lib.cr_router_counters, self._handle, layer, prefill=prefill)


def _address(array: npt.NDArray[Any] | None) -> ctypes.c_void_p | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)
