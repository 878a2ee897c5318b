"""llama.cpp's log: the reason why it refuses a model, and silence about what Ctrl-C has broken off."""

from __future__ import annotations

import contextlib
import functools
import re
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from cacheroute import interrupts
from cacheroute.install import patched_llama_cpp

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level; llama-cpp-python takes 3, a warning, for an error
_UNINFORMATIVE = re.compile(r"failed to load model|failed to create")
_SPEAKER = re.compile(r"^\w+: ")  # the function that logs


@contextlib.contextmanager
def errors(*, verbose: bool) -> Iterator[list[str]]:
    """Within it the list gets llama.cpp's lines of level error; `verbose`: all lines go where they went before, too."""
    api = patched_llama_cpp.module()
    before: Any = api._logger.llama_log_callback
    lines: list[str] = []
    level_before = 0

    @interrupts.shield
    def log(level: int, text: bytes, data: Any) -> None:
        nonlocal level_before
        continued, level_before = level == _CONTINUED, level if level != _CONTINUED else level_before
        if level_before == _ERROR:
            said = text.decode("utf-8", "replace")
            if continued and lines:
                lines[-1] += said
            else:
                lines.append(said)
        if verbose:
            before(level, text, data)

    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        api.llama_log_set(before, None)
    interrupts.check()


class Hush(Protocol):
    """Says whether llama.cpp has been interrupted, so that its complaints of it need not be shown, and interrupts it."""

    def seen(self) -> bool: ...

    def ask(self) -> None: ...


_hushes: weakref.WeakSet[Hush] = weakref.WeakSet()


def hush_when(hush: Hush) -> None:
    """From now on llama.cpp's log is not shown while hush.seen()."""
    if not _hushes:
        _filter()
    _hushes.add(hush)


@functools.cache
def _filter() -> None:
    api = patched_llama_cpp.module()
    before: Any = api._logger.llama_log_callback

    @interrupts.shield
    def log(level: int, text: bytes, data: Any) -> None:
        if not any(hush.seen() for hush in _hushes):
            before(level, text, data)
        if interrupts.pending():  # Ctrl-C came in here, where it cannot be raised
            for hush in _hushes:
                hush.ask()

    api._logger.llama_log_callback = api.llama_log_callback(log)
    api.llama_log_set(api._logger.llama_log_callback, None)


def reason(lines: Sequence[str]) -> str:
    """The line that says most of those: the first one that is not only that it failed. "" without any."""
    lines = [_SPEAKER.sub("", line.strip()).removeprefix("error loading model: ").rstrip(".") for line in lines if line.strip()]
    return next((line for line in lines if not _UNINFORMATIVE.search(line)), lines[-1] if lines else "")
