"""How many tokens of a prompt are computed together: every pass over the layers reads their experts again.

So there are as few passes as the memory beside the budget allows. None is so short that llama.cpp would compute it in another
way: else the memory that is free would decide about the last bits of an answer. Knows sizes and free memory; knows no tokens and
no hook.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from cacheroute.engine.flash_attention import LEAST, FlashAttention
from cacheroute.install.machine import available_memory, memory, ulimit_room
from cacheroute.model import context_memory
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile
from cacheroute.routing.budget import Budget

UPSTREAM = 512
"""Tokens that llama.cpp computes together if nothing else is said."""
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

    def cuts(self) -> list[int]:
        """Where each pass begins, and the end; of passes that memory alone decides: all alike, to one token."""
        return [self.n_tokens * i // self.passes for i in range(self.passes + 1)]


class MicroBatches:
    """Of one context. `fixed`: the length of every pass but the last, None: as memory allows.

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
        most: int | None = None,
    ) -> None:
        """`n_ctx` tokens of context, 0: as the model was trained.

        `all_outputs`: scores of the vocabulary are wanted of every token. `length`: of every pass, None: as memory allows, and
        no longer than `most`.
        """
        self._header, self._layout, self._flash_attn, self._all_outputs = header, layout, flash_attn, all_outputs
        n_ctx = n_ctx or context_memory.trained_context(header)
        self.fixed = length
        self.ceiling = min(length or most or n_ctx, n_ctx)
        if length is None and most is None:
            # llama.cpp takes address space for the longest pass with all outputs, and llama-cpp-python for as many scores
            each = self._each(n_ctx, n_ctx, all_outputs=True) + context_memory.output_bytes(header, 1)
            self.ceiling = max(min(n_ctx, _address_space() // 2 // each), min(context_memory.ROOM, n_ctx))
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
        over = self._layout.prompt_reserve(budget.capacity)
        if free is None:
            length, left = self.ceiling, _UNLIMITED
        else:
            taken = max(budget.nbytes - resident_bytes, 0) + over + context_memory.least_bytes(self._header, n_tokens)
            left = free - max(int(free * _MARGIN), reserve) - taken + self._used
            length = self.fixed or max(min(left // each, self.ceiling), LEAST)
        if self.fixed:
            length = min(self.fixed, self.ceiling, n_tokens)
            passes = math.ceil(n_tokens / length)
        else:
            passes = passes_of(n_tokens, min(length, self.ceiling))
            length = math.ceil(n_tokens / passes)
        compute = length * each
        self._used = max(self._used, min(compute, max(left, 0)))
        return Plan(n_tokens, length, passes, min(max(left - compute, 0), over) if free is not None else over, compute)


def passes_of(n_tokens: int, length: int) -> int:
    """The fewest passes of at most `length` tokens; a few tokens more where they would be shorter than LEAST."""
    return min(math.ceil(n_tokens / length), max(n_tokens // LEAST, 1))


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
    return max(min(left // each, UPSTREAM), context_memory.ROOM)


def _address_space() -> int:
    """Bytes that may be reserved without being used: the machine's memory, or what is free where reserving counts as using."""
    try:
        if int(Path("/proc/sys/vm/overcommit_memory").read_text("ascii")) == 2:
            return available_memory() or sys.maxsize
        return min([memory()["MemTotal"], *ulimit_room()])
    except (OSError, ValueError, KeyError):
        return available_memory() or sys.maxsize
