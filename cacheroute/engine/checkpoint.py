"""A saved point of a sequence: the routing state and, if asked for, the model's state."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp
from cacheroute.native import bindings

if TYPE_CHECKING:
    from cacheroute.engine.hook import Hook


class Checkpoint:
    """After `tokens`: the caches and running means of a hook and, as `sequence`, the state of llama.cpp (the KV cache), or None.

    It can be brought back as often as one likes, also into another hook and context than it was taken from. A copy made by pickle
    has no routing state.
    """

    def __init__(self, hook: Hook | None, tokens: list[int], sequence: bytes | None) -> None:
        self.tokens, self.sequence = tokens, sequence
        self._handle = bindings.lib.cr_hook_save(hook.handle) if hook else None

    def fits(self, hook: Hook | None) -> bool:
        """Puts the routing state into a hook, unless its caches have another size or eviction."""
        if hook is None or self._handle is None:
            return hook is None and self._handle is None
        return bool(bindings.lib.cr_hook_resume(hook.handle, self._handle))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}

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
