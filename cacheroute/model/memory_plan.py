"""How the memory that is free is shared between a model's parts, and how many experts it leaves room for. Reads a header only."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cacheroute.errors import UsageError
from cacheroute.files import GIB, MIB, size
from cacheroute.install.machine import available_memory, ulimit_room
from cacheroute.model import context_memory
from cacheroute.model.catalogue import ModelEntry
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile

# tokens of a prompt for which compute buffers are counted, within a share of the free memory; longer passes take what is free
# when they come (engine/micro_batch.py)
_PASS_LEAST, _PASS_MOST, _PASS_SHARE = context_memory.ROOM, 2048, 1 / 16
_F16, _F32 = 2, 4
_UNCOUNTED_SPACE = GIB  # address space of threads, libraries and buffers
_PROCESS = 48 * MIB  # vocabulary, samplers, libraries: 32 to 45 MiB of the demo model's process beside what is counted
_RESERVE_SHARE, _RESERVE_LEAST, _RESERVE_MOST = 1 / 16, 64 * MIB, GIB  # for others, and for what is not counted


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part. `free`: what this process may use, None where the system does not tell; `space`: what `ulimit` leaves
    of its address space, less 1 GiB for libraries and threads, None without a limit; mapped: of the file and of slots for all
    experts, used or not, unless it is loaded whole, as `whole` allows.

    reserve: left to others. dense: always in memory, without the token embeddings, which `embedding` counts and which are in
    memory only where the model is loaded whole. context: keys and values. compute: buffers for `pass_tokens` of a prompt.
    resident_bytes: of one expert in every layer, whole pages; layer_bytes: of one expert in the largest layer; file_expert_bytes:
    of one expert in every layer where the model is loaded whole. given: the budget that was asked for, in experts of each layer.
    """

    free: int | None
    reserve: int
    dense: int
    embedding: int
    context: int
    compute: int
    pass_tokens: int
    resident_bytes: int
    layer_bytes: int
    file_expert_bytes: int
    n_expert: int
    n_used: int
    space: int | None = None
    mapped: int = 0
    whole: bool = True
    given: int | None = None

    def needed(self, capacity: int) -> int:
        """Bytes that the model takes at most with `capacity` experts of each layer in memory, the reserve not counted."""
        if capacity >= self.n_expert:
            return self.beside + self.embedding + self.n_expert * self.file_expert_bytes
        return self.beside + capacity * self.resident_bytes + self.prompt_reserve(capacity)

    @property
    def least(self) -> int:
        """Bytes of memory that must be free, the reserve of so much counted: with the experts of one token."""
        needed = self.needed(self.n_used)
        return min(max(needed + _RESERVE_LEAST, math.ceil(needed / (1 - _RESERVE_SHARE))), needed + _RESERVE_MOST)

    @property
    def beside(self) -> int:
        """Bytes beside the experts."""
        return self.dense + self.context + self.compute

    @property
    def lacks_space(self) -> bool:
        """Whether `ulimit` leaves too little address space to run the model at all."""
        return self.space is not None and self.space < self.least_space

    @property
    def least_space(self) -> int:
        """Bytes of address space that the model takes, used or not."""
        mapped = self.beside + self.mapped
        return min(self.needed(self.n_expert), mapped) if self.whole else mapped

    def prompt_reserve(self, capacity: int) -> int:
        """Bytes of experts that a prompt may have in memory above a budget: all of the layer that computes."""
        return self.layer_bytes * (self.n_expert - capacity) if capacity < self.n_expert else 0

    @property
    def capacity(self) -> int | None:
        """Experts of each layer to keep: those that were asked for, or as many as fit; None where they do not fit."""
        most, given = self.most, self.given
        if most is None or given is None:
            return most
        return given if given <= most else None

    @property
    def most(self) -> int | None:
        """The most experts of each layer that fit; None where not even the K of a token do. All of them where the free memory
        is not known: the kernel then takes back what it must."""
        everything = self.needed(self.n_expert)
        if self.lacks_space:
            return None
        if self.free is None or (everything <= self.free - self.reserve and (self.space is None or everything <= self.space)):
            return self.n_expert
        left = self.free - self.reserve - self.beside - self.layer_bytes * self.n_expert
        each = self.resident_bytes - self.layer_bytes
        most = left // each if each else (self.n_expert - 1 if left >= 0 else 0)
        most = min(most, self.n_expert - 1)
        return most if most >= self.n_used else None


def of(
    header: GgufFile,
    layout: ExpertLayout,
    *,
    n_ctx: int,
    flash_attn: bool = True,
    loaded: bool = False,
    whole: bool = True,
    free: int | None = None,
    pass_tokens: int | None = None,
) -> MemoryPlan:
    """Of a model with a context of `n_ctx` tokens (0: as it was trained).

    `flash_attn`: prompts are computed with flash attention. `loaded`: all but its experts is in memory already. `whole`: it may
    be loaded as llama.cpp does where all experts fit; else they stay in the file, and take whole pages in memory. `free`: bytes,
    by default what this machine, its control groups and `ulimit` leave this process now. `pass_tokens`: of a prompt, for which
    buffers are counted; by default as many as a share of the free memory has room for.
    """
    space = None if free is not None or loaded else min(ulimit_room(), default=None)
    space = None if space is None else space - _UNCOUNTED_SPACE
    free = available_memory(ulimits=False) if free is None else free
    n_ctx = n_ctx or context_memory.trained_context(header)
    each = context_memory.compute_bytes(header, layout, 1, n_ctx, flash_attn=flash_attn, n_outputs=0)
    n_pass = min(pass_tokens or _pass_tokens(free, each, n_ctx), n_ctx)
    plan = MemoryPlan(
        free=free,
        reserve=reserve(free),
        dense=0 if loaded else layout.dense_bytes,
        embedding=layout.embedding_bytes if whole else 0,
        context=0 if loaded else context_memory.least_bytes(header, n_ctx),
        compute=n_pass * each + context_memory.output_bytes(header, 1),
        pass_tokens=n_pass,
        resident_bytes=layout.resident_bytes,
        layer_bytes=layout.layer_bytes,
        file_expert_bytes=layout.expert_bytes if whole else layout.resident_bytes,
        n_expert=layout.n_expert,
        n_used=layout.n_used,
        space=space,
        mapped=header.nbytes + layout.n_expert * layout.resident_bytes,
        whole=whole,
    )
    return _shorter_pass(plan, each)


def of_entry(entry: ModelEntry, *, n_ctx: int, free: int | None = None) -> MemoryPlan:
    """Of a model of the catalogue, which has no header here: keys and values are taken to be half as wide as the hidden
    state. `free` as in of()."""
    free = available_memory() if free is None else free
    live = 8 * entry.n_embd + entry.used * (2 * entry.n_ff + entry.n_embd) + n_ctx
    n_pass = _pass_tokens(free, live * _F32, n_ctx)
    plan = MemoryPlan(
        free=free,
        reserve=reserve(free),
        dense=entry.dense_bytes,
        embedding=0,
        context=n_ctx * _F16 * entry.layers * entry.n_embd // 2,
        compute=n_pass * live * _F32,
        pass_tokens=n_pass,
        resident_bytes=entry.expert_bytes,
        layer_bytes=entry.expert_bytes // entry.layers,
        file_expert_bytes=entry.expert_bytes,
        n_expert=entry.experts,
        n_used=entry.used,
    )
    return _shorter_pass(plan, live * _F32)


def _pass_tokens(free: int | None, each: int, n_ctx: int) -> int:
    """Tokens of a prompt for which buffers are counted, `each` bytes for one."""
    wanted = _PASS_MOST if free is None else int(free * _PASS_SHARE) // max(each, 1)
    return min(max(wanted, _PASS_LEAST), _PASS_MOST, n_ctx)


def _shorter_pass(plan: MemoryPlan, each: int) -> MemoryPlan:
    """With buffers for the least tokens of a prompt, `each` bytes for one, where the model fits in no other way."""
    tokens = min(plan.pass_tokens, _PASS_LEAST)
    if plan.capacity is not None or tokens == plan.pass_tokens:
        return plan
    return replace(plan, compute=plan.compute - (plan.pass_tokens - tokens) * each, pass_tokens=tokens)


def reserve(free: int | None) -> int:
    """Bytes of `free` that a budget chosen by itself leaves: a sixteenth, at least 64 MiB, at most 1 GiB."""
    return int(min(max((free or 0) * _RESERVE_SHARE, _RESERVE_LEAST), _RESERVE_MOST))


def refusal(plan: MemoryPlan, name: str) -> UsageError:
    """Why a model cannot run in the memory that is free, with the figures and what would fit."""
    if plan.lacks_space:
        space = plan.space or 0
        return UsageError(
            f"{name} needs {size(plan.least_space + _UNCOUNTED_SPACE)} of address space, used or not, and `ulimit -v` leaves "
            f"{size(space + _UNCOUNTED_SPACE)}: raise it by {size(plan.least_space - space)} (`ulimit -v unlimited`), or take a "
            f"smaller model."
        )
    needed, free = plan.needed(plan.n_used), plan.free or 0
    if plan.given and plan.most:
        return UsageError(
            f"{name} needs {size(plan.needed(plan.given))} of memory with a budget of {plan.given} experts of each layer, and "
            f"{size(plan.reserve)} for other programs, and {size(free)} are free: {_advice(plan.most, plan.n_used)}."
        )
    parts = (
        f"{size(plan.dense)} of dense weights, {size(plan.context)} of context, {size(plan.compute)} to compute and "
        f"{size(plan.n_used * plan.resident_bytes + plan.prompt_reserve(plan.n_used))} for the {plan.n_used} experts of a token"
    )
    short = plan.least - free
    others = plan.least - needed
    advice = "give a smaller context with -c" if plan.context + plan.compute >= short + 64 * MIB else "take a smaller model"
    return UsageError(
        f"{name} needs at least {size(needed)} of memory ({parts}) and {size(others)} for other programs, and "
        f"{size(free)} are free: free {size(short)}, or {advice}."
    )


def check_budget(
    header: GgufFile, layout: ExpertLayout, n_ctx: int, capacity: int, *, flash_attn: bool = True, whole: bool = False
) -> None:
    """Raises UsageError when a budget of `capacity` experts of each layer does not fit the memory that is free, beside dense
    weights, a context of `n_ctx` tokens, the least buffers of a prompt, and the experts of a layer that is computed.

    A capacity of 0 has experts in the system's page cache only, which needs no room. `flash_attn`: prompts are computed with it.
    `whole`: the model is loaded whole, token embeddings too; the capacity is then all experts, and the advice is a smaller one.

    The free memory is that of the machine, of every enclosing control group and of `ulimit`.
    """
    free = available_memory()
    if free is None:
        return
    plan = of(header, layout, n_ctx=n_ctx, flash_attn=flash_attn, whole=whole, free=free, pass_tokens=_PASS_LEAST)
    beside, experts = plan.beside + _PROCESS, (plan.needed(capacity) - plan.beside if capacity else 0)
    if beside + experts <= free:
        return
    fits = max((n for n in range(1, layout.n_expert + 1 - whole) if plan.needed(n) + _PROCESS <= free), default=0)
    advice = _advice(fits, layout.n_used)
    if fits < layout.n_used and plan.context * 7 // 8 >= plan.needed(layout.n_used) + _PROCESS - free:
        advice = "give a smaller context with -c"
    embedding = plan.embedding if capacity == layout.n_expert else 0
    raise UsageError(
        f"{layout.paths[0].name} needs {size(beside + experts)} of memory ({size(plan.dense + embedding)} of dense weights, "
        f"{size(plan.context)} of context, {size(plan.compute + _PROCESS)} to compute, {size(experts - embedding)} of experts), "
        f"and {size(free)} are free: {advice}."
    )


def check_more(layout: ExpertLayout, budget_bytes: int, resident_bytes: int) -> None:
    """Raises UsageError when a loaded model's budget of so many bytes does not fit beside what is in memory."""
    free = available_memory()
    if free is None or budget_bytes <= free + resident_bytes:
        return
    experts = (free + resident_bytes) // layout.resident_bytes
    raise UsageError(
        f"A budget of {size(budget_bytes)} of experts does not fit: {size(free + resident_bytes)} are free for them; "
        f"{_advice(experts, layout.n_used)}."
    )


def _advice(experts: int, n_used: int) -> str:
    """`experts` of each layer would fit."""
    return f"--budget {experts} fits" if experts >= n_used else "no budget fits; free memory, or take a smaller model"
