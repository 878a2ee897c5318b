"""A native hook without a model: recorded scores go through the code that llama.cpp calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from cacheroute.native import bindings
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.trace.trace_file import Records, record_dtype
from support.hook_abi import CHook, Floats, event

SOFTMAX, SIGMOID, SOFTMAX_WEIGHT = 1, 2, 3  # llama_expert_gating_func_type


class BareHook:
    """A cr_hook of `n_layers` layers without a store, traced. Made by `bare_hook`."""

    def __init__(self, shape: bindings.Shape, name: str, eviction: str) -> None:
        self.shape = shape
        layer_of = (ctypes.c_int32 * shape.n_layers)(*range(shape.n_layers))
        per_layer = strategies.to_native(strategies.parse(name), shape.n_used, shape.n_layers)
        self.handle = bindings.checked(bindings.lib.cr_hook_new, shape, per_layer, layer_of, shape.n_layers, None)
        self._native = CHook.from_address(bindings.lib.cr_hook_address(self.handle))
        bindings.lib.cr_hook_trace(self.handle, 1)

    def select(self, layer: int, scores: Floats, probs: Floats | None, gating: int, *, decode: bool) -> npt.NDArray[np.int32]:
        """One event of `len(scores)` tokens; `probs` None: the scores themselves."""
        scores = np.ascontiguousarray(scores, np.float32)
        probs = scores if probs is None else np.ascontiguousarray(probs, np.float32)
        ids = np.zeros((len(scores), self.shape.n_used), np.int32)
        bindings.lib.cr_hook_set_phase(self.handle, decode)
        self._native.select(self._native.user_data, ctypes.byref(event(layer, gating, scores, probs, ids)))
        return ids

    def counters(self, layer: int, prefill: bool = False) -> bindings.Counters:
        counters = bindings.Counters()
        bindings.lib.cr_hook_counters(self.handle, layer, prefill, counters)
        return counters

    def take(self) -> Records:
        """The records since the last call, with mass."""
        data = (ctypes.c_uint8 * bindings.lib.cr_hook_trace_take(self.handle, None, 0))()
        bindings.lib.cr_hook_trace_take(self.handle, data, len(data))
        return np.frombuffer(bytes(data), record_dtype(self.shape.n_expert, self.shape.n_used, mass=True))


@contextmanager
def bare_hook(shape: Sequence[int], name: str = "original", eviction: str = "lru") -> Iterator[BareHook]:
    """`shape`: layers, E, K, C. Freed at the end."""
    hook = BareHook(bindings.Shape(*shape, evictions.ONLINE[eviction]), name, eviction)
    try:
        yield hook
    finally:
        bindings.lib.cr_hook_free(hook.handle)
