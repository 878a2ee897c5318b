"""The control arm: the same tokens on the same engine without the hook, over a plain mapping, in the same memory.

It represents llama.cpp as it is usually run with a model larger than the memory. It runs in a process of its own; the memory of
that process, page cache included, is limited to what it needs beside the experts (dense weights, KV cache, buffers,
interpreter), and the budget of experts.

It starts with what loading and ten tokens have left in memory, so its page cache is not empty: an advantage for the control.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.bench.conditions import Conditions
from cacheroute.bench.memory_limit import MemoryLimit
from cacheroute.bench.runs import Run, decode, timed, warm_up
from cacheroute.engine.asked import Asked
from cacheroute.errors import CacherouteError
from cacheroute.files import MIB, size
from cacheroute.install.machine import available_memory

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

# Waits before it imports anything: memory belongs to the group in which it was first used.
_CHILD = "import sys; request = sys.stdin.readline(); from cacheroute.bench import control; control.child(request)"


_MEASURED = {"tokens", "seconds", "device_bytes", "major_faults", "cpu_seconds", "conditions"}  # the rest a hook has counted
_COMMAND = [sys.executable, "-c", _CHILD]
_PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@dataclass(frozen=True)
class Request:
    """What the control process runs. `engine`: arguments of llama_cpp.Llama."""

    model_path: str
    engine: dict[str, Any]
    tokens: list[int]
    n_prompt: int
    n_gen: int


class _KilledError(CacherouteError):
    """By a signal: where memory is limited, by the limit."""


def own_memory() -> int:
    """Bytes of ordinary memory that this process holds (RssAnon). Raises CacherouteError where the kernel does not report it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise CacherouteError("this system does not report how much memory a process holds")


def limit_for(llm: Llama, budget: str, tokens: Sequence[int], n_prompt: int) -> MemoryLimit:
    """The memory of the control at that budget: its own ordinary memory, found by running the prompt without a limit, the dense
    weights, which it maps, and the budget. Drops all experts. Raises CacherouteError where processes cannot be limited.
    """
    llm.configure_as(Asked(budget=budget))
    unlimited = subprocess.Popen(_COMMAND, **_PIPES)
    own = int(_finished(unlimited, _request(llm, tokens[: n_prompt + 10], n_prompt, 1, repack=False))["own_memory"])
    size = sum(path.stat().st_size for path in llm.layout.paths)
    dense = size - llm.layout.all_expert_bytes
    # the limit also counts page tables (8 bytes a page, all of the mapped file at worst), stacks and open files
    return MemoryLimit(own + dense + llm.budget.nbytes + size // 512 + 4 * MIB)


def _request(llm: Llama, tokens: Sequence[int], n_prompt: int, n_gen: int, *, repack: bool) -> Request:
    p = llm.context_params
    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type")
    engine = {name: getattr(p, name) for name in names}
    return Request(llm.model_path, engine | {"use_extra_bufts": repack}, list(tokens), n_prompt, n_gen)


def _finished(process: subprocess.Popen[str], request: Request) -> dict[str, Any]:
    """What the control process prints for a request. Raises CacherouteError when it fails."""
    out, _ = process.communicate(json.dumps(asdict(request)) + "\n")
    if process.returncode < 0:
        raise _KilledError("the control was killed")
    if process.returncode:
        raise CacherouteError("the control failed" + (f": {out.strip()}" if out.strip() else ""))
    found: dict[str, Any] = json.loads(out)
    return found


def run(
    llm: Llama, limit: MemoryLimit, tokens: Sequence[int], n_prompt: int, n_gen: int, *, repack: bool
) -> tuple[MemoryLimit, tuple[Run | None, Run | None]]:
    """Runs the control once, after evicting the experts and the file's pages that `llm` has in memory.

    A process may need more for a moment than it holds at its end: a control that is killed runs again with 4 MiB more, at most
    three times.

    Args:
        repack: whether llama.cpp may copy weights into the layout that is fastest for its kernels.

    Returns the limit that it ran with, and the prompt and the decoding.

    Raises CacherouteError when the control does not fit its memory, or fails.
    """
    for attempt in range(4):
        if attempt:
            limit = MemoryLimit(limit.nbytes + 4 * MIB)
        # evicts: the control must not find pages that this process has read
        llm.configure_as(Asked(budget=llm.budget.capacity))
        if llm.io == "load":
            _make_room(llm, limit)
        with limit.process(_COMMAND) as process:
            try:
                found = _finished(process, _request(llm, tokens, n_prompt, n_gen, repack=repack))
            except _KilledError:
                continue
        prompt, decoded = (
            Run(**phase | {"conditions": Conditions(**phase["conditions"])}) if phase else None for phase in found["phases"]
        )
        return limit, (prompt, decoded)
    raise CacherouteError(f"the control was killed: it needs more than its {size(limit.nbytes)}")


def _make_room(llm: Llama, limit: MemoryLimit) -> None:
    """Beside a model that was loaded whole. Raises CacherouteError where both do not fit."""
    for path in llm.layout.paths:
        with contextlib.suppress(AttributeError), path.open("rb") as file:  # macOS has no such call
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    free = available_memory()
    if free is not None and free < limit.nbytes:
        needed = f"{size(limit.nbytes)} beside the loaded model, and {size(free)} are free"
        raise CacherouteError(f"the control needs {needed}")


def child(request: str) -> None:
    """Runs in the control process: takes a JSON Request, prints both phases and what memory it holds as JSON on stdout."""
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
    phases = [p and {k: v for k, v in asdict(p).items() if k in _MEASURED} for p in (prompt, decoded)]
    print(json.dumps({"phases": phases, "own_memory": own_memory()}), file=out, flush=True)
