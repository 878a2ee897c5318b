"""A saved point of a sequence: the routing state and, if asked for, the model's state; and the points that a sequence keeps."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp
from cacheroute.native import bindings

if TYPE_CHECKING:
    from cacheroute.engine.hook import Hook

MOST_POINTS = 8  # of a sequence; each takes the logits of the vocabulary and some 25 bytes for each expert


class Checkpoint:
    """After `tokens`: the caches and running means of a hook and, as `sequence`, the state of llama.cpp (the KV cache), or None.

    It can be brought back as often as one likes, also into another hook and context than it was taken from. A copy made by pickle
    has no routing state.
    """

    def __init__(
        self,
        hook: Hook | None,
        tokens: list[int],
        sequence: bytes | None,
        capacity: int | None = None,
        *,
        two_budgets: bool = False,
    ) -> None:
        """`capacity`: of the caches, where it is known. `two_budgets`: it has changed since the first token."""
        self.tokens, self.sequence, self.capacity, self.two_budgets = tokens, sequence, capacity, two_budgets
        self._handle = bindings.lib.cr_hook_save(hook.handle) if hook else None

    def fits(self, hook: Hook | None) -> bool:
        """Puts the routing state into a hook, under its own budget, unless it is of another E, K or eviction."""
        if hook is None or self._handle is None:
            return hook is None and self._handle is None
        return bool(bindings.lib.cr_hook_resume(hook.handle, self._handle))

    def routing_bytes(self) -> bytes:
        """The routing state, for a machine of the same byte order; b"" without a hook."""
        if self._handle is None:
            return b""
        size = bindings.lib.cr_checkpoint_bytes(self._handle, None, 0)
        out = (ctypes.c_uint8 * size)()
        bindings.lib.cr_checkpoint_bytes(self._handle, out, size)
        return bytes(out)

    @staticmethod
    def of_bytes(tokens: list[int], routing: bytes) -> Checkpoint:
        """What routing_bytes() gave, after those tokens. Raises CacherouteError for what it cannot have given."""
        made = Checkpoint(None, tokens, None)
        if routing:
            data = (ctypes.c_uint8 * len(routing)).from_buffer_copy(routing)
            made._handle = bindings.checked(bindings.lib.cr_checkpoint_from, data, len(data))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}

    def __del__(self, free: Callable[[Any], None] = bindings.lib.cr_checkpoint_free) -> None:
        if getattr(self, "_handle", None) is not None:
            free(self._handle)


class Point:
    """The end of a prompt in the sequence that is in the KV cache: where an answer can begin again as it began the first time.

    mark: the routing state there; `logits`: float32[vocabulary] as bytes, of the token that follows.
    """

    def __init__(self, mark: Checkpoint, logits: bytes) -> None:
        self.mark, self.logits = mark, logits

    @property
    def n(self) -> int:
        """Tokens before it."""
        return len(self.mark.tokens)


class Points:
    """The points of a sequence, those that were used last; older ones are given up."""

    def __init__(self) -> None:
        self._points: list[Point] = []  # the last one was used last

    def __iter__(self) -> Iterator[Point]:
        """In the order of the sequence."""
        return iter(sorted(self._points, key=lambda point: point.n))

    def add(self, point: Point) -> None:
        """In place of another one at the same token."""
        self._points = [*(p for p in self._points if p.n != point.n), point][-MOST_POINTS:]

    def best(self, n: int) -> Point | None:
        """The last one that has at most `n` tokens before it; it counts as used."""
        found = max((p for p in self._points if p.n <= n), key=lambda point: point.n, default=None)
        if found:
            self.add(found)
        return found

    def cut(self, n: int) -> None:
        """The KV cache has other tokens than before from the n-th on."""
        self._points = [p for p in self._points if p.n <= n]


def save_sequence(context: Any) -> memoryview:
    """The state of the first sequence of a llama_context."""
    api = patched_llama_cpp.module().llama_cpp
    state = (ctypes.c_uint8 * api.llama_state_seq_get_size(context, 0))()
    return memoryview(state)[: api.llama_state_seq_get_data(context, state, len(state), 0)]


def load_sequence(context: Any, state: bytes | bytearray | memoryview) -> None:
    """Replaces the state of the first sequence by it. Raises CacherouteError when it is of another model or too long."""
    api = patched_llama_cpp.module().llama_cpp
    array = ctypes.c_uint8 * len(state)
    data = array.from_buffer_copy(state) if memoryview(state).readonly else array.from_buffer(state)
    if not api.llama_state_seq_set_data(context, data, len(state), 0):
        raise CacherouteError("The state of a sequence does not fit this context.")


def sample(sampler: Any, logits: bytes) -> int:
    """The token that a llama_cpp sampler chooses by those logits (float32[vocabulary]), as if they had just been computed.

    Raises CacherouteError where no token is possible.
    """
    api = patched_llama_cpp.module().llama_cpp
    values = np.frombuffer(logits, np.float32)
    data = np.zeros(len(values), np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
    data["id"], data["logit"] = np.arange(len(values)), values
    array = api.llama_token_data_array(ctypes.cast(data.ctypes.data, api.llama_token_data_p), len(data), -1, False)
    api.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
    chosen = array.data[array.selected]
    if chosen.logit == -math.inf:
        raise CacherouteError("No token of the model fits the grammar and the biases here; allow for more.")
    token = int(chosen.id)
    api.llama_sampler_accept(sampler.sampler, token)
    return token


def n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differ[0]) if len(differ) else n
