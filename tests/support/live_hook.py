"""A hook over a file of made-up experts, called as llama.cpp calls it, with bytes that really move."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cacheroute.errors import CacherouteError
from cacheroute.native import bindings
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from support import hook_abi
from support.hook_abi import CHook

LIB = bindings.lib
N_LAYERS, N_TENSORS, N_EXPERT, N_USED = 2, 3, 8, 2
EXPERT = 50_016  # bytes; 0.05 s at PACE, a little more in whole pages
PACE = 1e6
SLOW = 1.5e5  # where something must be over before the reads are: they take 2 s, and a busy machine is allowed for
HEADER = 1312


@dataclass
class Live:
    """A hook over expert tensors of random bytes, called as llama.cpp calls it."""

    handle: int
    path: Path
    address: int  # of the mapping
    content: bytes  # of the file

    def select(self, layer: int, *experts: int, hidden: Sequence[float] = ()) -> None:
        """One decoded token whose best experts are these; `hidden` is the input of the layer's router."""
        scores = np.zeros(N_EXPERT, np.float32)
        scores[list(experts)] = 5 - np.arange(len(experts))
        LIB.cr_hook_set_phase(self.handle, 1)
        ids = hook_abi.select(LIB.cr_hook_address(self.handle), layer, scores[None], N_USED, hidden=hidden)
        assert set(ids[0]) == set(experts)

    def prompt(self, layer: int, rows: Sequence[Sequence[int]], hidden: npt.ArrayLike = ()) -> None:
        """A prompt's tokens, each with its best experts; `hidden`: [tokens, n_embd] inputs of the layer's router."""
        scores = np.zeros((len(rows), N_EXPERT), np.float32)
        for own, experts in zip(scores, rows, strict=True):
            own[list(experts)] = 5 - np.arange(len(experts))
        LIB.cr_hook_set_phase(self.handle, 0)
        hook_abi.select(LIB.cr_hook_address(self.handle), layer, scores, N_USED, hidden=hidden)

    def find(self, layer: int, tensor: int, expert: int, late: bool) -> int | None:
        place = self.address + HEADER + ((layer * N_TENSORS + tensor) * N_EXPERT + expert) * EXPERT
        source = self._native.source
        found: int | None = source.find(source.user_data, place, late)
        return found

    def has(self, layer: int, tensor: int, expert: int, late: bool) -> bool:
        """Whether it is found in this round; if so, the bytes must be those of the file."""
        found = self.find(layer, tensor, expert, late)
        at = HEADER + ((layer * N_TENSORS + tensor) * N_EXPERT + expert) * EXPERT
        assert found is None or ctypes.string_at(found, EXPERT) == self.content[at : at + EXPERT]
        return found is not None

    @property
    def _native(self) -> Any:
        return CHook.from_address(LIB.cr_hook_address(self.handle))

    def error(self) -> str:
        return str(LIB.cr_hook_error(self.handle).decode())


@contextmanager
def hooked(path: Path, io: str, n_layers: int = N_LAYERS) -> Iterator[Live]:
    content = np.random.default_rng(0).bytes(HEADER + n_layers * N_TENSORS * N_EXPERT * EXPERT)
    path.write_bytes(content)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = int(np.frombuffer(view, np.uint8).ctypes.data)
        starts = [HEADER + t * N_EXPERT * EXPERT for t in range(n_layers * N_TENSORS)]
        tensors = [bindings.Tensor(t // N_TENSORS, 0, at, EXPERT, address + at) for t, at in enumerate(starts)]
        files = (ctypes.c_char_p * 1)(os.fspath(path).encode())
        try:
            store = bindings.checked(
                LIB.cr_store_new,
                files,
                1,
                (bindings.Tensor * len(tensors))(*tensors),
                len(tensors),
                n_layers,
                N_EXPERT,
                io == "direct",
            )
        except CacherouteError as e:
            pytest.skip(str(e))
        shape = bindings.Shape(n_layers, N_EXPERT, N_USED, 4, evictions.ONLINE["lru"])
        per_layer = strategies.to_native(strategies.parse("original"), N_USED, n_layers)
        hook = bindings.checked(LIB.cr_hook_new, shape, per_layer, (ctypes.c_int32 * n_layers)(*range(n_layers)), n_layers, store)
        try:
            LIB.cr_hook_reset(hook)
            LIB.cr_hook_set_pace(hook, PACE)
            yield Live(hook, path, address, content)
        finally:
            LIB.cr_hook_free(hook)
