"""The control arm: the same tokens on the same engine without the hook, over a plain mapping, in the same memory.

It represents llama.cpp as it is usually run with a model larger than the memory. It runs in a process of its own; the memory of
that process, page cache included, is limited to what an arm with that budget may use: everything that the hooked process
holds beside its experts (dense weights, KV cache, buffers, interpreter), and the budget.

It starts with what loading and ten tokens have left in memory, so its page cache is not empty: an advantage for the control.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.bench.memory_limit import MemoryLimit
from cacheroute.bench.runs import Run, decode, timed, warm_up
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

# Waits before it imports anything: memory belongs to the group in which it was first used.
_CHILD = "import sys; request = sys.stdin.readline(); from cacheroute.bench import control; control.child(request)"


@dataclass(frozen=True)
class Request:
    """What the control process runs. `engine`: arguments of llama_cpp.Llama."""

    model_path: str
    engine: dict[str, Any]
    tokens: list[int]
    n_prompt: int
    n_gen: int


def own_memory() -> int:
    """Bytes of ordinary memory that this process holds (RssAnon). Raises CacherouteError where the kernel does not report it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise CacherouteError("this system does not report how much memory a process holds")


def limit_for(llm: Llama, budget: str) -> MemoryLimit:
    """The memory of an arm with that budget. Drops all experts. Raises CacherouteError where processes cannot be limited."""
    llm.configure(budget=budget)
    nbytes = own_memory() + llm.budget.nbytes
    # the limit also counts page tables (8 bytes a page, all of the mapped file at worst), stacks and open files
    return MemoryLimit(nbytes + sum(path.stat().st_size for path in llm.layout.paths) // 512 + 4 * MIB)


def run(
    llm: Llama, limit: MemoryLimit, tokens: Sequence[int], n_prompt: int, n_gen: int, *, repack: bool
) -> tuple[Run | None, Run | None]:
    """Runs the control once, after evicting the experts and the file's pages that `llm` has in memory.

    Args:
        repack: whether llama.cpp may copy weights into the layout that is fastest for its kernels.

    Raises CacherouteError when the control does not fit its memory, or fails.
    """
    llm.configure(budget=llm.budget.capacity)  # evicts: the control must not find pages that this process has read
    p = llm.context_params
    engine = {name: getattr(p, name) for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")}
    request = Request(llm.model_path, engine | {"use_extra_bufts": repack}, list(tokens), n_prompt, n_gen)
    with limit.process([sys.executable, "-c", _CHILD]) as process:
        out, _ = process.communicate(json.dumps(asdict(request)) + "\n")
    if process.returncode < 0:
        raise CacherouteError(f"the control was killed: it needs more than its {limit.nbytes / MIB:.0f} MiB")
    if process.returncode:
        raise CacherouteError("the control failed" + (f": {out.strip()}" if out.strip() else ""))
    prompt, decoded = (Run(**phase) if phase else None for phase in json.loads(out))
    return prompt, decoded


def child(request: str) -> None:
    """Runs in the control process: takes a JSON Request, prints both phases as JSON on stdout."""
    r = Request(**json.loads(request))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's own output goes to stderr
    from cacheroute.install import patched_llama_cpp

    try:
        llm = patched_llama_cpp.module().Llama(r.model_path, use_mmap=True, verbose=False, **r.engine)
    except ValueError as e:
        print(e, file=out, flush=True)
        raise SystemExit(1) from None
    warm_up(llm, r.tokens)
    llm.reset()
    prompt = timed(llm, lambda: llm.eval(r.tokens[: r.n_prompt])) if r.n_prompt else None
    decoded = timed(llm, lambda: decode(llm, r.tokens[r.n_prompt : r.n_prompt + r.n_gen])) if r.n_gen else None
    phases = [p and {k: getattr(p, k) for k in ("tokens", "seconds", "device_bytes", "major_faults")} for p in (prompt, decoded)]
    print(json.dumps(phases), file=out, flush=True)
