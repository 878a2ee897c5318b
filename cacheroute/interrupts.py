"""Ctrl-C in the program `cacheroute`: exit 130 and one line, within a second, whatever runs. Imports nothing that takes time.

While the program starts, Ctrl-C ends it at once. While a command runs, it is a KeyboardInterrupt, so that what is open is
closed; a second one ends the program at once, and so does a thread after GRACE seconds, where C code does not return to Python
or something waits. A command that stops only what it is doing says went_on(), and has more seconds for it. Python code that C
calls (a policy, a log callback) must not raise: `shield` marks it, and what calls the C code asks check() afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

GRACE = 0.8
STOPPED = "Stopped."

_Function = TypeVar("_Function", bound=Callable[..., Any])

_shielded: set[CodeType] = set()
_ends: dict[int, tuple[float, int]] = {}
_running = False
_grace = GRACE
_survived = 0
_asked = False
_pending = False
_said = False
_repair = b""
_stderr = 2
_speaking = threading.Lock()


def install() -> None:
    """Takes SIGINT over, in the main thread; not where a shell has it ignored for a program in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    global _stderr
    _stderr = os.dup(2)  # llama-cpp-python turns 2 to /dev/null while it loads a model
    signal.signal(signal.SIGINT, _handle)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    with contextlib.suppress(RuntimeError):  # no thread to be had: C code is not interrupted, Python's is
        threading.Thread(target=_watch, args=(read,), daemon=True).start()


def command_begins() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt."""
    global _running, _grace
    _running, _grace = True, GRACE


def command_goes_on(seconds: float) -> None:
    """From now on the command has so many seconds to stop what it is doing, and to say went_on()."""
    global _grace
    _grace = seconds


def went_on() -> None:
    """What Ctrl-C was meant for has been stopped: the next one is a first one again."""
    global _asked, _pending, _survived
    _asked = _pending = False
    _survived += 1


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """What is printed within it is the line of an interruption: no other follows."""
    global _said
    with _speaking:
        yield
        _said = True


@contextlib.contextmanager
def repaired(text: str) -> Iterator[None]:
    """Within it, `text` is written to stderr before the program ends at once: to repair a terminal that is drawn on."""
    global _repair
    before, _repair = _repair, text.encode()
    try:
        yield
    finally:
        _repair = before


def shield(function: _Function) -> _Function:
    """Marks Python code that C calls: there Ctrl-C waits for check()."""
    _shielded.add(function.__code__)
    return function


@contextlib.contextmanager
def put_off(came: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it Ctrl-C waits for the end, where the handler that there was is called; `came` is called when it comes. In the main
    thread, and where Ctrl-C has a handler; elsewhere it does nothing."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        came()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def put_off_in_c() -> Iterator[None]:
    """put_off() in a program that has not called install(): Python drops what is raised in code that C calls.

    pending() tells of it where the handler is Python's, which raises; another one may go on, and then so must what runs within.
    """
    global _pending
    before = signal.getsignal(signal.SIGINT)
    if before is _handle:
        yield
        return

    told = False

    def came() -> None:
        global _pending
        nonlocal told
        told = _pending = before is signal.default_int_handler

    try:
        with put_off(came):
            yield
    finally:
        if told:
            _pending = False


def pending() -> bool:
    """Whether Ctrl-C waits for check()."""
    return _pending


def met() -> None:
    """What Ctrl-C waited for has been broken off, and raises KeyboardInterrupt itself."""
    global _pending
    _pending = False


def check() -> None:
    """Raises KeyboardInterrupt when Ctrl-C came within shielded code."""
    global _pending
    if _pending:
        _pending = False
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked, _pending
    if _asked or not _running:
        _leave()
    _asked = True
    while frame is not None:  # the shielded code may have called other code
        if frame.f_code in _shielded:
            _pending = True
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def ends(number: signal.Signals, seconds: float, code: int) -> Iterator[None]:
    """Within it a signal that has a handler ends the program after so many seconds at most, also where C code does not return to
    that handler."""
    _ends[number] = (seconds, code)
    try:
        yield
    finally:
        del _ends[number]


def _end(number: int) -> None:
    if number in _ends:
        os._exit(_ends[number][1])


def _watch(wakeup: int) -> None:
    """Is woken by the signal itself, also while the main thread is in C code."""
    while True:
        [number] = os.read(wakeup, 1)
        if number in _ends:
            timer = threading.Timer(_ends[number][0], _end, (number,))
            timer.daemon = True
            timer.start()
        if number != signal.SIGINT:
            continue
        before, until = _survived, time.monotonic() + _grace
        while _running and _survived == before and time.monotonic() < until:
            time.sleep(0.02)
        if _survived == before:
            _leave()


def _leave() -> None:
    heard = _speaking.acquire(timeout=0.1)  # or this is the main thread, within last_words()
    words = b"" if _said or not heard else f"cacheroute: {STOPPED}\n".encode()
    with contextlib.suppress(OSError):
        os.write(_stderr, _repair + words)
    os._exit(130)
