"""How far a prompt has come, told to a callback while llama.cpp computes it."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.files import MIB
from cacheroute.native import bindings

if TYPE_CHECKING:
    from cacheroute.engine.hook import Hook

_SECONDS_BETWEEN_CALLS = 0.5


@dataclass(frozen=True)
class PromptProgress:
    """The state of one eval() of a prompt.

    `tokens_done` of its `tokens`: layers that have been computed count in proportion. `read_mib`: MiB of experts that the device
    has delivered for it. `needed_mib`: what it will ask for in all, an estimate from the layers that have begun until the last
    one has. `seconds` since it began; `seconds_left` at this rate, None before the first layer has been computed.
    """

    tokens_done: int
    tokens: int
    read_mib: float
    needed_mib: float
    seconds: float
    seconds_left: float | None


PromptCallback = Callable[[PromptProgress], None]
"""Called twice a second, from a thread of its own, while a prompt is computed, and once at its end if it was called before."""


def estimate(now: bindings.Progress, n_layers: int, n_tokens: int, seconds: float) -> PromptProgress:
    """What the hook has counted of a prompt of n_tokens, `seconds` after its beginning; n_layers: MoE layers of the model."""
    total = n_tokens * n_layers
    begun, read = min(now.begun, total), min(now.read_bytes, now.needed_bytes)
    done = min(now.done, begun)
    needed = now.needed_bytes * total / begun if begun else 0.0
    left = None
    if done:
        # of a layer that waits for reads, as much is done as has been read
        missing = min(now.needed_bytes - read, now.layer_bytes)
        share = 1 - missing / now.layer_bytes if now.layer_bytes else 0.0
        passed = done + share * (begun - done)
        left = seconds * (total - passed) / passed
    return PromptProgress(done // n_layers, n_tokens, read / MIB, needed / MIB, seconds, left)


@contextlib.contextmanager
def of_prompt(hook: Hook | None, first: int, n_tokens: int, callback: PromptCallback | None) -> Iterator[None]:
    """Within it the hook, if there is one, is asked for a prompt of n_tokens, which begins with that token of its sequence."""
    if hook:
        hook.begin_prompt(first)
    if hook is None or callback is None:
        yield
        return
    with reported(callback, functools.partial(hook.progress, n_tokens)):
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

    thread = threading.Thread(target=run, name="cacheroute-progress", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread to be had: the prompt is computed all the same
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
    if called and not errors:
        call()
    if errors:
        raise errors[0]
