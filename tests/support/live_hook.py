"""A hook over a file of made-up experts, called as llama.cpp calls it, with bytes that really move."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from support import hook_abi
from support.expert_file import skipped_without_direct_reads
from support.hook_abi import CHook

LIB = bindings.lib
N_LAYERS, N_TENSORS, N_EXPERT, N_USED = 2, 3, 8, 2
EXPERT = 50_016  # bytes; 0.05 s at PACE, a little more in whole pages
PACE = 1e6
SLOW = 1.5e5  # where something must be over before the reads are: they take 2 s, and a busy machine is allowed for
HEADER = 1312
PAGE = mmap.PAGESIZE
WIDTH = 21  # of the hidden state: no multiple of anything


@dataclass
class Live:
    """A hook over expert tensors of random bytes, called as llama.cpp calls it."""

    handle: int
    path: Path
    address: int  # of the mapping
    content: bytes  # of the file
    starts: list[list[int]] = field(default_factory=list)  # [layer][tensor] offset of expert 0 in the file
    sizes: Sequence[Sequence[int]] = ()  # [layer][tensor] bytes of an expert

    def select(self, layer: int, *experts: int, hidden: Sequence[float] = (), run: Sequence[int] = (), gating: int = 1) -> None:
        """One decoded token whose best experts are these; `run` must run, these by default. `hidden` is the router's input."""
        scores = np.zeros(N_EXPERT, np.float32)
        scores[list(run)] = 0.5  # 0 would be masked
        scores[list(experts)] = 5 - np.arange(len(experts))
        LIB.cr_hook_set_phase(self.handle, 1)
        ids = hook_abi.select(LIB.cr_hook_address(self.handle), layer, scores[None], N_USED, hidden=hidden, gating=gating)
        assert set(ids[0]) == set(run or experts)

    def prompt(self, layer: int, rows: Sequence[Sequence[int]], hidden: npt.ArrayLike = ()) -> None:
        """A prompt's tokens, each with its best experts; `hidden`: [tokens, n_embd] inputs of the layer's router."""
        scores = np.zeros((len(rows), N_EXPERT), np.float32)
        for own, experts in zip(scores, rows, strict=True):
            own[list(experts)] = 5 - np.arange(len(experts))
        LIB.cr_hook_set_phase(self.handle, 0)
        hook_abi.select(LIB.cr_hook_address(self.handle), layer, scores, N_USED, hidden=hidden)

    def find(self, layer: int, tensor: int, expert: int, late: bool) -> int | None:
        source = self._native.source
        found: int | None = source.find(source.user_data, self.address + self._offset(layer, tensor, expert), late)
        return found

    def has(self, layer: int, tensor: int, expert: int, late: bool) -> bool:
        """Whether it is found in this round; if so, the bytes must be those of the file."""
        found = self.find(layer, tensor, expert, late)
        at, size = self._offset(layer, tensor, expert), self.sizes[layer][tensor]
        assert found is None or ctypes.string_at(found, size) == self.content[at : at + size]
        return found is not None

    def _offset(self, layer: int, tensor: int, expert: int) -> int:
        return self.starts[layer][tensor] + expert * self.sizes[layer][tensor]

    def pages(self, layer: int, tensor: int, expert: int) -> int:
        """Pages that an expert touches in one tensor."""
        at = self._offset(layer, tensor, expert)
        return (at + self.sizes[layer][tensor] - 1) // PAGE - at // PAGE + 1

    def slot_pages(self, layer: int) -> int:
        """The most pages that one expert of a layer touches in its tensors."""
        return sum(max(self.pages(layer, t, e) for e in range(N_EXPERT)) for t in range(N_TENSORS))

    @property
    def _native(self) -> Any:
        return CHook.from_address(LIB.cr_hook_address(self.handle))

    def error(self) -> str:
        return str(LIB.cr_hook_error(self.handle).decode())


class Ahead:
    """Reads ahead on a Live hook, with a router of random weights in layer 1."""

    def __init__(self, live: Live, n: int, *, norms: bool = True, bias: bool = True, selection_bias: npt.ArrayLike = ()) -> None:
        rng = np.random.default_rng(3)
        self.weight = rng.standard_normal((N_EXPERT, WIDTH)).astype(np.float32)
        self.bias = rng.standard_normal(N_EXPERT).astype(np.float32) * bias
        self.norms = rng.uniform(0.5, 2, (N_LAYERS, WIDTH)).astype(np.float32) if norms else np.ones((2, WIDTH), np.float32)
        layers = (bindings.RouterWeights * N_LAYERS)()
        layers[1].weight = self.weight.ctypes.data
        layers[1].bias = self.bias.ctypes.data if bias else None
        self.selection_bias = np.array(selection_bias, np.float32)
        layers[1].selection_bias = self.selection_bias.ctypes.data if self.selection_bias.size else None
        for layer, norm in zip(layers, self.norms, strict=True):
            layer.norm = norm.ctypes.data if norms else None
        LIB.cr_hook_prefetch(live.handle, n, WIDTH, layers)

    def hidden(self, *wanted: int) -> list[float]:
        """A state of layer 0 by which layer 1 would choose these experts, best first."""
        scores = np.full(N_EXPERT, -5.0)
        scores[list(wanted)] = 5 - np.arange(len(wanted))
        x, *_ = np.linalg.lstsq(self.weight.astype(float), scores - self.bias, rcond=None)
        return [float(v) for v in x / self.norms[1] * self.norms[0]]


def counters(live: Live) -> Counters:
    return bindings.counters(LIB.cr_hook_counters, live.handle, -1, prefill=False)


def compute(live: Live, layer: int, *needed: int) -> None:
    """What the matmuls of a layer do: each expert is found in one of the rounds, with the bytes of the file."""
    for tensor in range(N_TENSORS):
        for expert in needed:
            assert live.has(layer, tensor, expert, late=False) != live.has(layer, tensor, expert, late=True)


def settled(live: Live) -> None:
    """After a token: no error, and memory holds what the store has counted."""
    LIB.cr_hook_finish(live.handle, 1)
    assert live.error() == ""
    assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) > 0


@contextmanager
def hooked(
    path: Path, io: str, n_layers: int = N_LAYERS, sizes: Sequence[Sequence[int]] = (), routing: str = "original"
) -> Iterator[Live]:
    """`sizes`: [layer][tensor] bytes of an expert, by default EXPERT."""
    sizes = sizes or [[EXPERT] * N_TENSORS] * n_layers
    ends = np.cumsum([HEADER] + [N_EXPERT * size for layer in sizes for size in layer]).tolist()
    starts = [ends[i * N_TENSORS : (i + 1) * N_TENSORS] for i in range(n_layers)]
    content = np.random.default_rng(0).bytes(ends[-1])
    path.write_bytes(content)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = int(np.frombuffer(view, np.uint8).ctypes.data)
        tensors = [
            bindings.Tensor(i, 0, at, size, address + at)
            for i in range(n_layers)
            for at, size in zip(starts[i], sizes[i], strict=True)
        ]
        files = (ctypes.c_char_p * 1)(os.fspath(path).encode())
        own = (bindings.Tensor * len(tensors))(*tensors)
        with skipped_without_direct_reads():
            store = bindings.checked(LIB.cr_store_new, files, 1, own, len(tensors), n_layers, N_EXPERT, io == "direct")
        shape = bindings.Shape(n_layers, N_EXPERT, N_USED, 4, evictions.ONLINE["lru"])
        per_layer = strategies.to_native(strategies.parse(routing), N_USED, n_layers)
        hook = bindings.checked(LIB.cr_hook_new, shape, per_layer, (ctypes.c_int32 * n_layers)(*range(n_layers)), n_layers, store)
        try:
            LIB.cr_hook_reset(hook)
            LIB.cr_hook_set_pace(hook, PACE)
            yield Live(hook, path, address, content, starts, sizes)
        finally:
            LIB.cr_hook_free(hook)
