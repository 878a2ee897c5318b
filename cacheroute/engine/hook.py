"""The native hook of one context: made whole from checked settings, or not at all. Owns its store and, if there is one, a policy.

Knows ctypes and the native library; knows no tokens and no text.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cacheroute.engine import log, stores
from cacheroute.engine.asked import Asked
from cacheroute.engine.embeddings import tensor_address
from cacheroute.engine.progress import Prompt, PromptProgress, estimate
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import patched_llama_cpp
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import budget as budgets
from cacheroute.routing import custom_policy, prompt_routing, strategies
from cacheroute.routing import eviction as evictions
from cacheroute.routing.budget import Budget
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.routing.strategies import Routing
from cacheroute.trace.forced_scores import ForcedScores

_api = patched_llama_cpp.module().llama_cpp._lib
_api.llama_set_expert_hook.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_api.llama_set_expert_hook.restype = ctypes.c_bool
_lib = bindings.lib


@dataclass(frozen=True)
class Settings:
    """What a hook is made from, checked against a model. `routing` None: no hook; `io`: one of stores.ALL."""

    budget: Budget
    routing: Routing | None
    eviction: str
    io: str
    prefetch: int
    prompt_routing: PromptRouting

    @property
    def lossy(self) -> bool:
        """Whether the state of the caches may change logits."""
        return self.prompt_routing.lossy or (self.routing is not None and self.routing.lossy)

    @staticmethod
    def of(
        layout: ExpertLayout,
        asked: Asked,
        *,
        paced: bool = False,
        loaded: bool | None = None,
    ) -> Settings:
        """`loaded`: as stores.choose(). Raises UsageError for what does not exist or does not fit the model."""
        parsed = strategies.parse(asked.routing) if isinstance(asked.routing, str) else asked.routing
        prompts, prefetch = prompt_routing.parse(asked.prompt_routing), asked.prefetch
        if prompts.lossy and not parsed:
            raise UsageError("Without a routing prompts cannot be rerouted either.")
        if parsed:
            parsed.check(layout.n_expert, layout.n_used, layout.indices, layout.model)
        evictions.check(asked.eviction)
        if prefetch < 0:
            raise UsageError(f"{prefetch} experts cannot be prefetched; give 0 or more.")
        if prefetch and not layout.predictable:
            raise UsageError("Experts cannot be prefetched: the model keeps its routers in another type than F32.")
        if parsed and parsed.speculates and not layout.predictable:
            raise UsageError(f"{parsed} cannot predict: the model keeps its routers in another type than F32.")
        resolved = budgets.parse(asked.budget, layout)
        holds_all = set(strategies.capacities(parsed, resolved, layout)) == {layout.n_expert}
        reads = "a pace of reads" if paced else "a prefetch" if prefetch else ""
        io = stores.choose(asked.io, holds_all=holds_all, reads=reads, loaded=loaded)
        return Settings(resolved, parsed, asked.eviction, io, min(prefetch, layout.n_expert), prompts)


class Hook:
    """A cr_hook over a store. `handle` is the native one; `io` what the settings' has become."""

    def __init__(
        self, layout: ExpertLayout, settings: Settings, model: Any, forced: ForcedScores | None, paths: Sequence[str] = ()
    ) -> None:
        """`model`: the llama_model whose experts are routed, `paths`: of its files, by default those of the layout.

        Raises CacherouteError for what the filesystem cannot do, or a policy that cannot be made, UsageError for forced scores
        without the predictions that the routing needs.
        """
        routing, n = settings.routing, len(layout.layers)
        assert routing
        if forced and routing.speculates and not forced.predicted:
            raise UsageError(f"{forced.name} has no predictions for {routing} to go by; replay synthetic scores.")
        self._layout, self._model, self._owner = layout, model, os.getpid()
        self.handle: int | None = None
        self._freeing = threading.RLock()  # progress() is asked from another thread
        policy = custom_policy.Policy(routing.policy, layout.n_expert, layout.n_used, n) if routing.policy else None
        shape = bindings.Shape(n, layout.n_expert, layout.n_used, settings.budget.capacity, evictions.ONLINE[settings.eviction])
        layer_of = (ctypes.c_int32 * (layout.layers[-1].index + 1))(*[-1] * (layout.layers[-1].index + 1))
        for i, layer in enumerate(layout.layers):
            layer_of[layer.index] = i
        store, self.io = stores.open_store(settings.io, layout, self._address, paths)
        per_layer = strategies.to_native(routing, layout.n_used, n)
        settings.prompt_routing.set(per_layer)
        self.handle = bindings.checked(_lib.cr_hook_new, shape, per_layer, layer_of, len(layer_of), store)
        _lib.cr_hook_reset(self.handle)  # what the page cache holds of the experts is not ours to count on
        if settings.io == stores.LOAD and _lib.cr_hook_hold_all(self.handle):
            raise CacherouteError("The experts of the model were not loaded whole.")  # what Settings.of() lets nobody ask for
        self._policy = policy  # alive as long as the hook calls it
        if policy:
            _lib.cr_hook_set_policy(self.handle, policy.callback, None)
        if forced:
            self._force(forced)
        self._router_weights = self._routers()
        if settings.prefetch or routing.speculates:
            _lib.cr_hook_prefetch(self.handle, settings.prefetch, *self._router_weights)
        self._raise_error()

    def _force(self, forced: ForcedScores) -> None:
        none = (None,) * len(forced.z)
        for i, (z, *others) in enumerate(zip(forced.z, forced.mass or none, forced.predicted or none, strict=True)):
            mass, predicted = (None if x is None else x.ctypes.data for x in others)
            _lib.cr_hook_force(self.handle, i, len(z), z.ctypes.data, mass, predicted)

    def _routers(self) -> tuple[int, Any]:
        """(width of the hidden state, each layer's weights) in the model's memory; null where they are not F32."""
        routers = [layer.router for layer in self._layout.layers]
        weights = (bindings.RouterWeights * len(routers))()
        for own, router in zip(weights, routers, strict=True):
            if router:
                own.weight, own.bias, own.norm, own.selection_bias = (
                    self._address(name) for name in (router.weight, router.bias, router.norm, router.selection_bias)
                )
        return next((router.width for router in routers if router), 0), weights

    def read_ahead(self, limit: int) -> None:
        """While a layer computes on a prompt, up to `limit` bytes of the next layer's experts are read; 0: none."""
        _lib.cr_hook_read_ahead(self.handle, limit, *self._router_weights)

    def _address(self, tensor: str) -> int | None:
        """Of its data in memory; None where llama.cpp has no such tensor on the CPU."""
        return tensor_address(self._model, tensor) if tensor else None

    def attach(self, context: Any, interrupt: Interrupt) -> None:
        """From now on the context asks this hook, which no longer waits for reads once `interrupt` is seen.

        Raises CacherouteError when the engine is of another version.
        """
        self._interrupt = interrupt  # alive as long as the hook asks it
        _lib.cr_hook_set_interrupt(self.handle, interrupt.handle)
        if not _api.llama_set_expert_hook(context, _lib.cr_hook_address(self.handle)):
            raise CacherouteError("The engine and cacheroute were built from different versions; run `cacheroute setup`.")

    def close(self, context: Any) -> None:
        """Takes the hook from the context (None: it is gone already) and frees it."""
        if self.handle is None or os.getpid() != self._owner:  # a forked child has neither the threads nor the locks
            return
        if context is not None:
            _api.llama_set_expert_hook(context, None)
        with self._freeing:
            _lib.cr_hook_free(self.handle)
            self.handle = None

    def begin(self, token: int, *, decode: bool) -> None:
        """Before a batch, which begins with that token of the sequence."""
        _lib.cr_hook_set_phase(self.handle, decode)
        _lib.cr_hook_begin(self.handle, token)

    def begin_prompt(self, token: int) -> None:
        """Before the first batch of a prompt, which begins with that token of the sequence."""
        _lib.cr_hook_begin_prompt(self.handle, token)

    def progress(self, prompt: Prompt, seconds: float) -> PromptProgress:
        """Of the prompt, so long after its beginning. Any thread may ask."""
        now = bindings.Progress()
        with self._freeing:
            if self.handle is not None:
                _lib.cr_hook_progress(self.handle, now)
        return estimate(now, prompt, seconds)

    def finish(self, *, complete: bool) -> None:
        """After a batch: reads have ended, and memory is within the budget. `complete`: it ran to its end. After one that was
        interrupted, the sequence is forgotten and no expert is in memory.

        Raises CacherouteError when an expert could not be read, or when the model does not do what its file says.
        """
        _lib.cr_hook_finish(self.handle, complete)
        if complete:
            self._raise_error()
            if self._policy:
                self._policy.check()

    @property
    def failed(self) -> bool:
        """Whether something went wrong in this sequence; reset() forgets it."""
        return bool(_lib.cr_hook_error(self.handle))

    def _raise_error(self) -> None:
        error = _lib.cr_hook_error(self.handle).decode()
        if error:
            raise CacherouteError(f"{self._layout.paths[0]}: {error}.")

    def reset(self) -> None:
        """Forgets the sequence and what went wrong in it, and drops every expert."""
        _lib.cr_hook_reset(self.handle)
        if self._policy:
            self._policy.reset()

    def warm(self, layer: int, ids: Sequence[int]) -> None:
        """Brings experts of a layer into memory; they count as used, the last as the most recent."""
        _lib.cr_hook_warm(self.handle, layer, (ctypes.c_int32 * len(ids))(*ids), len(ids))
        self._raise_error()

    def set_capacity(self, capacity: int, *, at_once: bool) -> None:
        """From now on so many experts of each layer stay, what is above leaves before the next layer chooses.

        Any thread; `at_once` while nothing computes: memory has been freed on return.
        """
        with self._freeing:
            if self.handle is not None:
                _lib.cr_hook_set_capacity(self.handle, capacity)
                if at_once:
                    _lib.cr_hook_settle_capacity(self.handle)

    def set_pace(self, mbps: float | None) -> None:
        _lib.cr_hook_set_pace(self.handle, (mbps or 0) * 1e6)

    def trace(self, on: bool) -> None:
        """Starts or ends a trace; both ways the sequence is forgotten."""
        _lib.cr_hook_trace(self.handle, on)

    def take_trace(self) -> bytes:
        """The records since the last call (trace/trace_file.py)."""
        size = _lib.cr_hook_trace_take(self.handle, None, 0)
        records = (ctypes.c_uint8 * size)()
        _lib.cr_hook_trace_take(self.handle, records, size)
        return bytes(records)

    def counters(self, layer: int = -1, *, prefill: bool) -> Counters:
        """Of one layer, -1: of all together; reads are not counted by layer."""
        assert self.handle is not None
        return bindings.counters(_lib.cr_hook_counters, self.handle, layer, prefill=prefill)

    @property
    def peak_bytes(self) -> int:
        """The most that was resident since the last reset(), as counted."""
        return int(_lib.cr_hook_peak_bytes(self.handle))

    @property
    def resident_bytes(self) -> int:
        """As the store has counted them, whole pages."""
        return int(_lib.cr_hook_resident_bytes(self.handle))

    def measure_resident(self) -> int | None:
        """As the kernel says (mincore), whole pages; None where it does not."""
        measured = int(_lib.cr_hook_measure_resident(self.handle))
        return None if measured == bindings.UNKNOWN_BYTES else measured


class Interrupt:
    """Lets Ctrl-C, or another thread, end a llama_decode(), between two nodes of its graph and where one waits for an expert.

    `handle`: native.
    """

    def __init__(self) -> None:
        python = ("PyGILState_Ensure", "PyGILState_Release", "PyErr_CheckSignals", "PyErr_Clear")
        log.hush_when(self)
        functions = (ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in python)
        self.handle = _lib.cr_interrupt_new(*functions, threading.main_thread().ident)

    def attach(self, context: Any) -> None:
        set_callback = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(("llama_set_abort_callback", _api))
        set_callback(context, ctypes.cast(_lib.cr_interrupt_poll, ctypes.c_void_p), self.handle)

    def ask(self) -> None:
        """As if a signal handler had raised. Any thread may call it."""
        _lib.cr_interrupt_raise(self.handle)

    def seen(self) -> bool:
        """Whether a signal handler has raised since take() was last called."""
        return bool(_lib.cr_interrupt_seen(self.handle))

    def take(self) -> bool:
        """As seen(), which is false from then on."""
        return bool(_lib.cr_interrupt_take(self.handle))

    def __del__(self, free: Callable[[Any], None] = _lib.cr_interrupt_free) -> None:
        free(self.handle)
