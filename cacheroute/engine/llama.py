"""A loaded model that generates: llama_cpp.Llama with experts on flash, a budget, and a routing.

One token passes: command -> Llama -> llama.cpp -> hook -> router -> store (native/). Knows no command line.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from cacheroute.engine import stores
from cacheroute.engine.checkpoint import Checkpoint, load_sequence, save_sequence
from cacheroute.engine.stats import Stats
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import patched_llama_cpp
from cacheroute.model import experts, gguf_file
from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import budget as budgets
from cacheroute.routing import custom_policy, strategies
from cacheroute.routing import eviction as evictions
from cacheroute.trace.forced_scores import ForcedScores
from cacheroute.trace.task_profile import TaskProfile

_llama_cpp = patched_llama_cpp.module()
_LAZY_MODE_EXPERTS = 3  # patches/0002-lazy-experts.patch

_api = _llama_cpp.llama_cpp._lib
_api.llama_set_expert_hook.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_api.llama_set_expert_hook.restype = ctypes.c_bool
_api.llama_model_tensor_data.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_api.llama_model_tensor_data.restype = ctypes.c_void_p


class Llama(_llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """`llama_cpp.Llama` whose routed experts stay in the file, at most `budget` of them in memory.

    Args:
        model_path: a GGUF file, or the first shard of a split one.
        budget: "50%" or 30 (of the experts of each layer), "2GiB" (all layers together), "all".
        routing: "original", "cache-prior:lambda=0.2", ... (`cacheroute routing`); None leaves the hook unset: experts are
            mapped and left to the kernel, and the budget is not enforced.
        eviction: "lru", "lfu", "score" or "soft-lfu".
        io: how misses are read; "mmap" (through the page cache) or "direct" (past it, where the filesystem can), "auto"
            (the faster one, measured once for each filesystem and shown on stderr), "none" (misses are counted, memory is left to
            the kernel: scores and counts are the same, sooner, where the model fits).
        flash_mbps: paces reads to a flash of that many MB (10^6 bytes) per second.
        prefetch: while a layer computes on a decoded token, up to so many experts are read that the next layer would miss if its
            router were given this layer's hidden state. They take memory beside the budget; what is chosen stays the same.
        Everything else: as llama_cpp.Llama.

    Policies act on decoded tokens; prompts are routed by `original`. generate() and everything above it know which tokens are
    decoded; tokens given to eval() directly are prompt, except within `decoding()`.

    Routing state belongs to a sequence: reset() and, with a lossy routing, any generate() that does not continue the
    tokens already evaluated start from an empty cache, so that a run can be repeated exactly.

    Raises UsageError for arguments that do not fit the model, CacherouteError when the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str,
        *,
        budget: str | int = "50%",
        routing: str | strategies.Routing | None = "original",
        eviction: str = evictions.DEFAULT,
        io: str = "mmap",
        flash_mbps: float | None = None,
        prefetch: int = 0,
        **kwargs: Any,
    ) -> None:
        self._hook: int | None = None
        self._policy: custom_policy.Policy | None = None  # alive as long as the hook calls it
        self._task: TaskProfile | None = None
        self.forced: ForcedScores | None = None  # force() sets it
        self._untouched = False  # no token since the last reset: resetting once more would read a warm cache twice
        self._trace_sink: Callable[[bytes], None] | None = None
        self._stack = contextlib.ExitStack()  # close() works on a half-made object
        self._flash_mbps = flash_mbps
        self.layout = experts.layout(gguf_file.read(model_path))
        settings = self._settings(budget, routing, eviction, io, prefetch)
        for name in ("use_mmap", "use_mlock", "lazy_mode"):
            if name in kwargs:
                raise UsageError(f"{name} cannot be set: experts are always mapped and dense weights are always read.")
        try:
            super().__init__(str(model_path), use_mmap=False, lazy_mode=_LAZY_MODE_EXPERTS, **kwargs)
        except ValueError as e:
            raise CacherouteError(f"llama.cpp cannot load {model_path}: {e} (verbose=True shows why).") from e
        self._attach(*settings)

    def configure(
        self,
        *,
        budget: str | int = "50%",
        routing: str | strategies.Routing | None = "original",
        eviction: str = evictions.DEFAULT,
        io: str = "mmap",
        prefetch: int = 0,
    ) -> None:
        """Changes the settings of a loaded model: experts are evicted, the sequence is cleared, counters start at 0."""
        settings = self._settings(budget, routing, eviction, io, prefetch)
        self._detach()
        self._attach(*settings)
        super().reset()
        self._warm()

    def _settings(
        self, budget: str | int, routing: str | strategies.Routing | None, eviction: str, io: str, prefetch: int
    ) -> tuple[budgets.Budget, strategies.Routing | None, str, str, int]:
        """Checks settings against the model before anything is changed."""
        parsed = strategies.parse(routing) if isinstance(routing, str) else routing
        if parsed:
            parsed.check(self.layout.n_expert, self.layout.n_used, self.layout.indices, self.layout.model)
        if eviction not in evictions.ONLINE:
            raise UsageError(f"There is no eviction {eviction!r}; there are {', '.join(evictions.ONLINE)}.")
        if io not in stores.ALL:
            raise UsageError(f"There is no io {io!r}; there are {', '.join(stores.ALL[:-1])} and {stores.ALL[-1]}.")
        if prefetch and not any(layer.router for layer in self.layout.layers[1:]):
            raise UsageError("Experts cannot be prefetched: the model keeps its routers in another type than F32.")
        resolved = budgets.parse(budget, self.layout)
        strategies.capacities(parsed, resolved, self.layout)
        return resolved, parsed, eviction, io, prefetch

    def _attach(self, budget: budgets.Budget, routing: strategies.Routing | None, eviction: str, io: str, prefetch: int) -> None:
        self.budget, self.routing, self.eviction, self.io, self.prefetch = budget, routing, eviction, io, prefetch
        if not routing:
            return
        layout = self.layout
        n = len(layout.layers)
        policy = custom_policy.Policy(routing.policy, layout.n_expert, layout.n_used, n) if routing.policy else None
        shape = bindings.Shape(n, layout.n_expert, layout.n_used, budget.capacity, evictions.ONLINE[eviction])
        per_layer = strategies.to_native(routing, layout.n_used, n)
        ids = [-1] * (layout.layers[-1].index + 1)
        for i, layer in enumerate(layout.layers):
            ids[layer.index] = i
        layer_of = (ctypes.c_int32 * len(ids))(*ids)
        store, self.io = stores.open_store(io, layout, self._address)
        self._hook = bindings.checked(bindings.lib.cr_hook_new, shape, per_layer, layer_of, len(ids), store)
        bindings.lib.cr_hook_reset(self._hook)  # experts that the page cache holds already would not count as misses
        if policy:
            self._policy = policy
            bindings.lib.cr_hook_set_policy(self._hook, policy.callback, None)
        if not _api.llama_set_expert_hook(self._ctx.ctx, bindings.lib.cr_hook_address(self._hook)):
            raise CacherouteError("The engine and cacheroute were built from different versions; run `cacheroute setup`.")
        self.flash_mbps = self._flash_mbps
        if self.forced:
            none = (None,) * n
            for i, (z, *others) in enumerate(
                zip(self.forced.z, self.forced.mass or none, self.forced.predicted or none, strict=True)
            ):
                mass, predicted = (None if x is None else x.ctypes.data for x in others)
                bindings.lib.cr_hook_force(self._hook, i, len(z), z.ctypes.data, mass, predicted)
        if prefetch:
            self._prefetch()

    def _prefetch(self) -> None:
        routers = [layer.router for layer in self.layout.layers]
        weights = (bindings.RouterWeights * len(routers))()
        for own, router in zip(weights, routers, strict=True):
            if router:
                own.weight, own.bias, own.norm = (self._address(name) for name in (router.weight, router.bias, router.norm))
        width = next(router.width for router in routers if router)
        bindings.lib.cr_hook_prefetch(self._hook, self.prefetch, width, weights)

    def _address(self, tensor: str) -> int | None:
        """Of its data in memory; None where llama.cpp has no such tensor on the CPU."""
        address: int | None = _api.llama_model_tensor_data(self._model.model, tensor.encode()) if tensor else None
        return address

    def _detach(self) -> None:
        if self._hook is not None:
            if self._ctx.ctx is not None:  # the garbage collector may have closed it first
                _api.llama_set_expert_hook(self._ctx.ctx, None)
            bindings.lib.cr_hook_free(self._hook)
            self._hook = self._policy = None

    def close(self) -> None:
        """Frees the hook, which uses the model's mappings, then the model."""
        self._detach()
        super().close()

    @property
    def flash_mbps(self) -> float | None:
        """The pace of reads in MB/s, None for as fast as the device goes."""
        return self._flash_mbps

    @flash_mbps.setter
    def flash_mbps(self, value: float | None) -> None:
        self._flash_mbps = value
        if self._hook is not None:
            bindings.lib.cr_hook_set_pace(self._hook, (value or 0) * 1e6)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, tokens given to eval() count as decoded: the routing acts on them."""
        self._set_decode(True)
        try:
            yield
        finally:
            self._set_decode(False)

    def _set_decode(self, decode: bool) -> None:
        if self._hook is not None:
            bindings.lib.cr_hook_set_phase(self._hook, decode)

    def eval(self, tokens: Sequence[int]) -> None:
        """As llama_cpp.Llama.eval.

        Raises CacherouteError when the context is full, or when the model routes in another way than its header says.
        """
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise CacherouteError(
                f"{self.n_tokens + len(tokens)} tokens do not fit the context of {self._n_ctx}; give a larger one (-c, n_ctx=)."
            )
        self._untouched = False
        if self._hook is not None:
            bindings.lib.cr_hook_set_position(self._hook, self.n_tokens)
        try:
            super().eval(tokens)
        finally:
            if self._hook is not None:
                bindings.lib.cr_hook_finish(self._hook)
        if self._hook is not None:
            error = bindings.lib.cr_hook_error(self._hook).decode()
            if error:
                raise CacherouteError(f"{self.model_path}: {error}.")
            if self._policy:
                self._policy.check()
            if self._trace_sink:
                self._trace_sink(self._take_trace())

    def reset(self) -> None:
        """Clears the sequence and evicts all experts."""
        super().reset()
        if self._hook is not None and not self._untouched:
            bindings.lib.cr_hook_reset(self._hook)
            if self._policy:
                self._policy.reset()
            self._warm()

    def rewind(self) -> None:
        """Clears the tokens; experts stay in memory."""
        super().reset()

    def checkpoint(self, *, sequence: bool = False) -> Checkpoint:
        """Keeps the routing state, for return_to(); with `sequence` also the model's, so that it outlives this sequence."""
        state = save_sequence(self._ctx.ctx) if sequence else None
        return Checkpoint(self._hook, [int(t) for t in self.input_ids[: self.n_tokens]], state)

    def return_to(self, mark: Checkpoint) -> None:
        """Resumes after the tokens of a checkpoint of the same budget and eviction; the routing may differ. Counters stay.

        Without its `sequence`, those tokens must still be the first ones here, and the model must not be recurrent: its state
        cannot be cut back. Not for a policy in Python, which keeps its own state. Raises CacherouteError for what does not fit.
        """
        mark.resume(self._hook)
        self._untouched = False
        if mark.sequence is not None:
            load_sequence(self._ctx.ctx, mark.sequence)
            self.input_ids[: len(mark.tokens)] = mark.tokens
        self.n_tokens = len(mark.tokens)

    def load_experts(self, layer: int, ids: Sequence[int]) -> None:
        """Brings experts of a layer (by its place in `layout`) into memory; they count as used, the last as the most recent."""
        if self._hook is not None:
            self._untouched = False
            bindings.lib.cr_hook_warm(self._hook, layer, (ctypes.c_int32 * len(ids))(*ids), len(ids))

    def warm(self, task: TaskProfile | None) -> None:
        """From now on every sequence starts with the experts that a task uses most in the cache; None: with an empty one.

        Clears the sequence. Raises UsageError when the profile is of another model.
        """
        if task:
            task.check(self.layout)
        self._task = task
        self._untouched = False
        self.reset()

    def _warm(self) -> None:
        if self._task and self._hook is not None:
            for layer, capacity in enumerate(strategies.capacities(self.routing, self.budget, self.layout)):
                self.load_experts(layer, self._task.best(layer, capacity))
        self._untouched = True

    def force(self, scores: ForcedScores | None) -> None:
        """From now on layers rank these scores, a row for each token of a sequence, instead of the model's; None: the model's.

        The generated text is then meaningless; gate weights stay the model's. Resets what configure() resets. Raises UsageError
        for scores of another E or number of layers; eval() raises CacherouteError for a token that they do not have.
        """
        layout = self.layout
        if scores and (len(scores.z), scores.z[0].shape[1]) != (len(layout.layers), layout.n_expert):
            raise UsageError(f"{scores.name} does not fit {len(layout.layers)} layers of {layout.n_expert} experts.")
        self.forced = scores
        self.configure(
            budget=self.budget.capacity, routing=self.routing, eviction=self.eviction, io=self.io, prefetch=self.prefetch
        )

    @contextlib.contextmanager
    def tracing(self, sink: Callable[[bytes], None]) -> Iterator[None]:
        """Within it `sink` is given the records (trace_file.py) of every token, after each eval(); starts with a new sequence."""
        if self._hook is None:
            raise UsageError("There is nothing to trace without a routing.")
        bindings.lib.cr_hook_trace(self._hook, 1)
        self._trace_sink = sink
        self._untouched = False
        self.reset()
        try:
            yield
        finally:
            self._trace_sink = None
            if self._hook is not None:
                bindings.lib.cr_hook_trace(self._hook, 0)

    def _take_trace(self) -> bytes:
        size = bindings.lib.cr_hook_trace_take(self._hook, None, 0)
        records = (ctypes.c_uint8 * size)()
        bindings.lib.cr_hook_trace_take(self._hook, records, size)
        return bytes(records)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As llama_cpp.Llama.generate; the prompt is prefill, what follows is decode."""
        tokens = list(tokens)
        if self.routing and self.routing.lossy and list(self.input_ids[: self.n_tokens]) != tokens[: self.n_tokens]:
            self.reset()
        inner = super().generate(tokens, *args, **kwargs)
        try:
            token = next(inner)
            while True:
                self._set_decode(True)
                more = yield token
                if self.n_tokens >= self._n_ctx:
                    return  # full: the last token was sampled and cannot be evaluated
                token = inner.send(more)
        except StopIteration:
            return
        finally:
            self._set_decode(False)
            inner.close()

    def stats(self) -> Stats:
        """Counters since the model was loaded."""
        resident = bindings.lib.cr_hook_resident_bytes(self._hook) if self._hook is not None else 0
        return Stats(
            routing=str(self.routing) if self.routing else "none",
            eviction=self.eviction,
            io=self.io,
            n_expert=self.layout.n_expert,
            n_used=self.layout.n_used,
            n_layers=len(self.layout.layers),
            capacity=self.budget.capacity,
            budget_bytes=self.budget.nbytes,
            resident_bytes=resident,
            prefill=self._counters(prefill=True),
            decode=self._counters(prefill=False),
        )

    def decoded_by_layer(self) -> list[Counters]:
        """Counters of the decoded tokens, one per MoE layer; reads are not counted by layer."""
        return [self._layer_counters(i, prefill=False) for i in range(len(self.layout.layers))] if self._hook is not None else []

    def measure_resident(self) -> int | None:
        """Bytes of expert tensors in memory by the kernel's count, whole pages; None where mincore is not reliable (a file
        of another user)."""
        if self._hook is None:
            return None
        measured = int(bindings.lib.cr_hook_measure_resident(self._hook))
        return None if measured == bindings.UNKNOWN_BYTES else measured

    def _counters(self, *, prefill: bool) -> Counters:
        """Of all layers together."""
        return self._layer_counters(-1, prefill=prefill) if self._hook is not None else Counters()

    def _layer_counters(self, layer: int, *, prefill: bool) -> Counters:
        assert self._hook is not None
        return bindings.counters(bindings.lib.cr_hook_counters, self._hook, layer, prefill=prefill)
