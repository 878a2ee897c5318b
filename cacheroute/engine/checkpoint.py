"""A saved point of a sequence: the routing state and, if asked for, the model's state."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp
from cacheroute.native import bindings


class Checkpoint:
    """After `tokens`: the caches and running means of a hook and, as `sequence`, the state of llama.cpp (the KV cache), or None.

    It can be restored any number of times, also into another hook and context than it was taken from.
    """

    def __init__(self, hook: int | None, tokens: list[int], sequence: bytes | None) -> None:
        self.tokens, self.sequence = tokens, sequence
        self._handle = bindings.lib.cr_hook_save(hook) if hook is not None else None

    def resume(self, hook: int | None) -> None:
        """Raises CacherouteError when the caches of the hook have another size or eviction."""
        if (hook is None) != (self._handle is None) or (hook is not None and not bindings.lib.cr_hook_resume(hook, self._handle)):
            raise CacherouteError("A checkpoint fits the budget and the eviction that it was taken with.")

    def __del__(self, free: Callable[[Any], None] = bindings.lib.cr_checkpoint_free) -> None:
        if getattr(self, "_handle", None) is not None:
            free(self._handle)


def save_sequence(context: Any) -> bytes:
    """The state of the first sequence of a llama_context."""
    api = patched_llama_cpp.module().llama_cpp
    state = (ctypes.c_uint8 * api.llama_state_seq_get_size(context, 0))()
    return bytes(memoryview(state)[: api.llama_state_seq_get_data(context, state, len(state), 0)])


def load_sequence(context: Any, state: bytes) -> None:
    """Replaces the state of the first sequence by it. Raises CacherouteError when it is of another model or too long."""
    api = patched_llama_cpp.module().llama_cpp
    if not api.llama_state_seq_set_data(context, (ctypes.c_uint8 * len(state)).from_buffer_copy(state), len(state), 0):
        raise CacherouteError("The state of a sequence does not fit this context.")
