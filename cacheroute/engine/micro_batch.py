"""How many tokens of a prompt are computed together: every pass over the layers reads their experts again.

So there are as few passes as the memory beside the budget allows. Knows sizes and free memory; knows no tokens and no hook.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from cacheroute.engine.flash_attention import FlashAttention
from cacheroute.install.machine import available_memory, memory, ulimit_room
from cacheroute.model import context_memory
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile
from cacheroute.routing.budget import Budget

UPSTREAM = 512
"""Tokens that llama.cpp computes together if nothing else is said."""
LEAST = 64
"""Tokens that are computed together whatever memory is free, as llama.cpp does with its own number."""
_MARGIN = 1 / 16  # of the free memory is left
_UNLIMITED = 2**62


@dataclass(frozen=True)
class Plan:
    """Of a prompt: `passes` over the layers of at most `length` tokens each.

    ahead: bytes of the next layer's experts that may be in memory beside those of the layer that computes.
    compute: bytes that a pass takes beside the experts.
    """

    n_tokens: int
    length: int
    passes: int
    ahead: int
    compute: int


class MicroBatches:
    """Of one context. `fixed`: the length of every pass, None: as memory allows.

    ceiling: the longest pass for which llama.cpp is to make room; it takes memory when it is used.
    """

    def __init__(
        self,
        header: GgufFile,
        layout: ExpertLayout,
        *,
        n_ctx: int,
        flash_attn: FlashAttention,
        all_outputs: bool,
        length: int | None = None,
    ) -> None:
        """`n_ctx` tokens of context, 0: as the model was trained.

        `all_outputs`: scores of the vocabulary are wanted of every token. `length`: of every pass, None: as memory allows.
        """
        self._header, self._layout, self._flash_attn, self._all_outputs = header, layout, flash_attn, all_outputs
        n_ctx = n_ctx or context_memory.trained_context(header)
        self.fixed = length
        self.ceiling = min(length or n_ctx, n_ctx)
        if length is None:
            # llama.cpp takes address space for the longest pass with all outputs, and llama-cpp-python for as many scores
            each = self._each(n_ctx, n_ctx, all_outputs=True) + context_memory.output_bytes(header, 1)
            self.ceiling = max(min(n_ctx, _address_space() // 2 // each), min(LEAST, n_ctx))
        self._used = 0  # by the longest pass so far: llama.cpp keeps it

    def _each(self, length: int, n_kv: int, *, all_outputs: bool) -> int:
        """Bytes for one token of a pass of `length` tokens that look back on `n_kv`."""
        flash_attn, n_outputs = self._flash_attn.computes(length), 1 if all_outputs else 0
        return context_memory.compute_bytes(self._header, self._layout, 1, n_kv, flash_attn=flash_attn, n_outputs=n_outputs)

    def plan(self, n_tokens: int, n_past: int, budget: Budget, resident_bytes: int, reserve: int = 0) -> Plan:
        """Of a prompt of `n_tokens` after `n_past` others. `resident_bytes`: of experts that are not counted as free memory;
        `reserve`: bytes to leave free at least."""
        free = available_memory()
        n_kv = n_past + n_tokens
        each = self._each(min(n_tokens, self.fixed or n_tokens), n_kv, all_outputs=self._all_outputs)
        over = _over(self._layout, budget)
        if free is None:
            length, left = self.ceiling, _UNLIMITED
        else:
            taken = max(budget.nbytes - resident_bytes, 0) + over + context_memory.least_bytes(self._header, n_tokens)
            left = free - max(int(free * _MARGIN), reserve) - taken + self._used
            length = self.fixed or max(min(left // each, self.ceiling), LEAST)
        passes = math.ceil(n_tokens / min(length, self.ceiling))
        length = min(self.fixed, self.ceiling, n_tokens) if self.fixed else math.ceil(n_tokens / passes)
        compute = length * each
        self._used = max(self._used, min(compute, max(left, 0)))
        return Plan(n_tokens, length, passes, min(max(left - compute, 0), over) if free is not None else over, compute)


def length_beside_all(
    header: GgufFile, layout: ExpertLayout, n_ctx: int, *, flash_attn: FlashAttention, all_outputs: bool
) -> int:
    """Tokens of a pass where the whole model is in memory, before it is loaded: UPSTREAM, as a longer pass would save no reads,
    or fewer where the model and its context leave no memory for so many."""
    free = available_memory()
    if free is None:
        return UPSTREAM
    n_ctx = n_ctx or context_memory.trained_context(header)
    n_outputs = 1 if all_outputs else 0
    each = context_memory.compute_bytes(header, layout, 1, n_ctx, flash_attn=flash_attn.computes(n_ctx), n_outputs=n_outputs)
    left = int(free * (1 - _MARGIN)) - header.nbytes - context_memory.least_bytes(header, n_ctx)
    return max(min(left // each, UPSTREAM), LEAST)


def _over(layout: ExpertLayout, budget: Budget) -> int:
    """The most bytes by which the experts of one layer can exceed the budget: all of them are in memory while it computes."""
    return max(layer.resident_bytes for layer in layout.layers) * (layout.n_expert - budget.capacity)


def _address_space() -> int:
    """Bytes that may be reserved without being used: the machine's memory, or what is free where reserving counts as using."""
    try:
        if int(Path("/proc/sys/vm/overcommit_memory").read_text("ascii")) == 2:
            return available_memory() or sys.maxsize
        return min([memory()["MemTotal"], *ulimit_room()])
    except (OSError, ValueError, KeyError):
        return available_memory() or sys.maxsize
