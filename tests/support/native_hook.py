"""A native hook without a model: recorded scores go through the code that llama.cpp calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import eviction as evictions
from cacheroute.routing import prompt_routing, strategies
from cacheroute.trace.trace_file import Records, record_dtype
from support import hook_abi

SOFTMAX, SIGMOID, SOFTMAX_WEIGHT, SQRT_SOFTPLUS = 1, 2, 3, 4  # llama_expert_gating_func_type
Floats = npt.NDArray[np.float32]


class BareHook:
    """A cr_hook of `n_layers` layers without a store, traced. Made by `bare_hook`."""

    def __init__(self, shape: bindings.Shape, name: str, prompts: str) -> None:
        self.shape = shape
        layer_of = (ctypes.c_int32 * shape.n_layers)(*range(shape.n_layers))
        per_layer = strategies.to_native(strategies.parse(name), shape.n_used, shape.n_layers)
        prompt_routing.parse(prompts).set(per_layer)
        self.handle = bindings.checked(bindings.lib.cr_hook_new, shape, per_layer, layer_of, shape.n_layers, None)
        self._address = bindings.lib.cr_hook_address(self.handle)
        bindings.lib.cr_hook_trace(self.handle, 1)

    def select(self, layer: int, scores: Floats, probs: Floats | None, gating: int, *, decode: bool) -> npt.NDArray[np.int32]:
        """One event of `len(scores)` tokens; `probs` None: the scores themselves."""
        bindings.lib.cr_hook_set_phase(self.handle, decode)
        return hook_abi.select(self._address, layer, scores, self.shape.n_used, probs=probs, gating=gating)

    def resident(self, layer: int) -> set[int]:
        mask = (ctypes.c_uint8 * self.shape.n_expert)()
        bindings.lib.cr_hook_resident(self.handle, layer, mask)
        return {e for e in range(self.shape.n_expert) if mask[e]}

    def counters(self, layer: int, prefill: bool = False) -> Counters:
        return bindings.counters(bindings.lib.cr_hook_counters, self.handle, layer, prefill=prefill)

    def take(self) -> Records:
        """The records since the last call, with mass."""
        data = (ctypes.c_uint8 * bindings.lib.cr_hook_trace_take(self.handle, None, 0))()
        bindings.lib.cr_hook_trace_take(self.handle, data, len(data))
        return np.frombuffer(bytes(data), record_dtype(self.shape.n_expert, self.shape.n_used, mass=True))


@contextmanager
def bare_hook(
    shape: Sequence[int], name: str = "original", eviction: str = "lru", prompts: str = "original"
) -> Iterator[BareHook]:
    """`shape`: layers, E, K, C. Freed at the end."""
    hook = BareHook(bindings.Shape(*shape, evictions.ONLINE[eviction]), name, prompts)
    try:
        yield hook
    finally:
        bindings.lib.cr_hook_free(hook.handle)
