"""How far a prompt has come, told to a callback while llama.cpp computes it."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.files import MIB
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings

if TYPE_CHECKING:
    from cacheroute.engine.hook import Hook

_SECONDS_BETWEEN_CALLS = 0.5


@dataclass(frozen=True)
class PromptProgress:
    """The state of one eval() of a prompt.

    `tokens_done` of its `tokens`: layers that have been computed count in proportion. `read_mib`: MiB of experts that the device
    has delivered for it. `needed_mib`: what it will ask for in all, until its last layer has begun an estimate from those that
    have, mostly too high: later micro-batches find experts in memory. `seconds` since it began; `seconds_left` at this rate,
    None before the first layer has been computed.
    """

    tokens_done: int
    tokens: int
    read_mib: float
    needed_mib: float
    seconds: float
    seconds_left: float | None


PromptCallback = Callable[[PromptProgress], None]
"""Called twice a second, from a thread of its own, while a prompt is computed, and once at its end if it was called before."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in micro-batches of so many tokens, each of which passes `layers` MoE layers where a token uses K of E experts."""

    micro_batches: tuple[int, ...]
    layers: int
    n_used: int
    n_expert: int

    @staticmethod
    def of(lengths: Sequence[int], n_batch: int, n_ubatch: int, layout: ExpertLayout) -> Prompt:
        """Parts of so many tokens, as llama.cpp splits each: into batches, and those into micro-batches."""
        batches = (min(n_batch, n - i) for n in lengths for i in range(0, n, n_batch))
        parts = tuple(min(n_ubatch, n - i) for n in batches for i in range(0, n, n_ubatch))
        return Prompt(parts, len(layout.layers), layout.n_used, layout.n_expert)

    @property
    def tokens(self) -> int:
        return sum(self.micro_batches)

    def experts(self, begun: int) -> float:
        """How many experts the first `begun` layers of its tokens use, if all are used alike: each once in a micro-batch, so that
        a few tokens use almost as many as many do."""
        used = 0.0
        for n in self.micro_batches:
            part = min(begun, n * self.layers)
            used += part / n * self.n_expert * (1 - (1 - self.n_used / self.n_expert) ** n)
            begun -= part
        return used


def estimate(now: bindings.Progress, prompt: Prompt, seconds: float) -> PromptProgress:
    """What the hook has counted of a prompt, `seconds` after its beginning."""
    total = prompt.tokens * prompt.layers
    begun, read = min(now.begun, total), min(now.read_bytes, now.needed_bytes)
    done = min(now.done, begun)
    needed = now.needed_bytes * prompt.experts(total) / prompt.experts(begun) if begun else 0.0
    left = None
    if done:
        # of a layer that waits for reads, as much is done as has been read
        missing = min(now.needed_bytes - read, now.layer_bytes)
        share = 1 - missing / now.layer_bytes if now.layer_bytes else 0.0
        passed = done + share * (begun - done)
        left = seconds * max((total - passed) / passed, (needed - read) / read if read else 0.0)
    return PromptProgress(done // prompt.layers, prompt.tokens, read / MIB, needed / MIB, seconds, left)


@contextlib.contextmanager
def of_prompt(hook: Hook | None, first: int, prompt: Prompt, callback: PromptCallback | None) -> Iterator[None]:
    """Within it the hook, if there is one, is asked for a prompt, which begins with that token of its sequence."""
    if hook:
        hook.begin_prompt(first)
    if hook is None or callback is None:
        yield
        return
    with reported(callback, functools.partial(hook.progress, prompt)):
        yield


@contextlib.contextmanager
def reported(callback: PromptCallback, look: Callable[[float], PromptProgress]) -> Iterator[None]:
    """Within it `callback` is given look(seconds since the beginning).

    What the callback raises ends its calls, and is raised when the context has ended without an error of its own.
    """
    start, ended = time.monotonic(), threading.Event()
    errors: list[BaseException] = []
    called = False

    def call() -> None:
        nonlocal called
        called = True
        try:
            callback(look(time.monotonic() - start))
        except BaseException as e:
            errors.append(e)

    def run() -> None:
        while not errors and not ended.wait(_SECONDS_BETWEEN_CALLS):
            call()
        if called and completed and not errors:
            call()

    completed = False
    thread = threading.Thread(target=run, name="cacheroute-progress", daemon=True)
    try:
        with contextlib.suppress(RuntimeError):  # no thread to be had: the prompt is computed all the same
            thread.start()
        yield
        completed = True
    finally:
        ended.set()  # what was broken off does not wait for a callback that takes long
        if completed and thread.ident is not None:
            thread.join()
    if errors:
        raise errors[0]
