"""Token embeddings that stay in the file (patches/0002): a page that cannot be read is an error, not the end of the process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp
from cacheroute.model.experts import EMBEDDING, ExpertLayout
from cacheroute.native import bindings

_api = patched_llama_cpp.module().llama_cpp._lib
_api.llama_model_tensor_data.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_api.llama_model_tensor_data.restype = ctypes.c_void_p


def tensor_address(model: Any, name: str) -> int | None:
    """Of a tensor's data in the memory of a llama_model; None where it has no such tensor on the CPU."""
    address: int | None = _api.llama_model_tensor_data(model, name.encode())
    return address


class MappedEmbeddings:
    """Watches them as long as the model is loaded; of a model that reads them whole, nothing."""

    def __init__(self, layout: ExpertLayout, model: Any, *, loaded: bool) -> None:
        """`loaded`: the whole file was read, whatever the layout says."""
        at = tensor_address(model, EMBEDDING) if layout.embedding_bytes and not loaded else None
        self._path = layout.paths[0]
        self._guard = bindings.lib.cr_guard_new(at, layout.embedding_bytes) if at else None

    def check(self) -> None:
        """Raises CacherouteError when a row could not be read."""
        if self._guard and bindings.lib.cr_guard_hit(self._guard):
            raise CacherouteError(f"{self._path}: reading token embeddings failed; load the model again.")

    def close(self, free: Callable[[Any], None] = bindings.lib.cr_guard_free) -> None:
        """Before the model is freed. May be called twice."""
        if self._guard:
            free(self._guard)
            self._guard = None

    __del__ = close
