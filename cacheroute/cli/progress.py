"""Progress of what takes more than two seconds, with the time left, on stderr: drawn on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cacheroute import interrupts
from cacheroute.cli.terminal import say
from cacheroute.engine import load_progress

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task

    from cacheroute.engine.progress import PromptProgress
    from cacheroute.evals.runner import Cell, Request
    from cacheroute.evals.scorer import Scorer

Advance = Callable[[float, str], None]
"""Called with the units done since the last call and what happens now."""

SECONDS_BEFORE_THE_FIRST = 2.0
_CLEAR, _SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"


@contextmanager
def bar(what: str, total: float) -> Iterator[Advance]:
    """Shows `total` units of work with an estimate of the time left; a line every half minute where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield Lines(what, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), time_left())
    # seldom: what is shown takes its time from what is measured
    drawn = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2)
    task = drawn.add_task(what, total=total)
    begin = threading.Timer(SECONDS_BEFORE_THE_FIRST, drawn.start)
    begin.daemon = True

    def advance(units: float, text: str) -> None:
        drawn.update(task, advance=units, description=text or what, at=time.monotonic())

    with interrupts.repaired(_CLEAR + _SHOW_CURSOR):
        begin.start()
        try:
            yield advance
        finally:
            begin.cancel()
            begin.join()
            drawn.stop()


class Lines:
    """How far some work has come, for a pipe or a file: a line at most every half minute, when a unit is done."""

    SECONDS_BETWEEN = 30.0

    def __init__(self, what: str, total: float) -> None:
        self._what, self._total, self._done = what, total, 0.0
        self._start = self._said = time.monotonic()

    def __call__(self, units: float, text: str) -> None:
        self._done += units
        now = time.monotonic()
        if now - self._said >= self.SECONDS_BETWEEN and self._done < self._total:
            self._said = now
            left = seconds_left(self._done, self._total, self._start, now, now)
            rest = "" if left is None else f", about {duration(left)} left"
            say(f"{self._what}: {100 * self._done / self._total:.0f}%{rest}")


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """As bar(), for steps of which each says that it begins."""
    begun = 0

    def begin(text: str) -> None:
        nonlocal begun
        advance(min(begun, 1), text)
        begun += 1

    with bar(what, total) as advance:
        yield begin


def time_left() -> ProgressColumn:
    """A column with the time left in words, by the whole time so far: steps may take longer than rich remembers."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: Task) -> Text:
            left = seconds_left(task.completed, task.total or 0.0, task.start_time, task.fields.get("at"), time.monotonic())
            return Text("" if left is None else f"about {duration(left)} left")

    return TimeLeft()


def seconds_left(done: float, total: float, start: float | None, at: float | None, now: float) -> float | None:
    """Of `total` units, `done` of which were done from `start` until `at`; None before the first."""
    if not done or not total or start is None or at is None:
        return None
    return max((at - start) * max(total - done, 0) / done - (now - at), 0)


def show_loads() -> None:
    """From now on a model that takes long to load shows how far it has come, on a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        load_progress.report_to(LoadLine())


class LoadLine:
    """How much of a model has been read, as a line that is rewritten in place; for engine/load_progress.py.

    It is written to a copy of stderr: llama-cpp-python turns stderr away while it loads a model.
    """

    def __init__(self) -> None:
        stderr = os.dup(sys.stderr.fileno())
        self._line = _Line(lambda text: os.write(stderr, text.encode()))
        self._start: float | None = None

    def __call__(self, share: float) -> None:
        """Shows it; 1 clears it."""
        now = time.monotonic()
        start = self._start = now if self._start is None else self._start
        if share >= 1:
            self._line.clear()
            self._start = None
        elif now - start >= SECONDS_BEFORE_THE_FIRST:
            self._line.draw(load_text(share, now - start))


def load_text(share: float, seconds: float) -> str:
    """What LoadLine shows after so many seconds."""
    left = f", about {duration(seconds * (1 - share) / share)} left" if share else ""
    return f"loading the model: {int(100 * share)}%{left}"


class _Line:
    """A line of a terminal that is rewritten in place."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write_to = write
        self._shown = contextlib.ExitStack()  # clears what is
        self._text = ""

    def draw(self, text: str) -> None:
        """Writes a text that is not there already."""
        if text == self._text:
            return
        if not self._text:
            self._shown.enter_context(interrupts.repaired(_CLEAR))
            self._shown.callback(self._write, _CLEAR)
        self._text = text
        self._write("\r" + text[: _columns() - 1] + "\x1b[K")

    def clear(self) -> None:
        self._text = ""
        self._shown.close()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._write_to(text)


def label(key: str) -> str:
    """A routing's key without what it has for each layer."""
    name, per_layer, _ = key.partition("[")
    return name + " per layer" if per_layer else name


def doing(cell: Cell) -> str:
    """What was computed of a cell."""
    return f"{label(cell.routing)} {cell.budget} experts"


@contextmanager
def scoring(scorer: Scorer, requests: Sequence[Request]) -> Iterator[None]:
    """Shows what is computed of those requests, in scored tokens; prints first how many of them are in the cache. Ctrl-C says
    that what is scored is kept there."""
    total, missing = sum(scorer.chunks[r.chunk].n_scored for r in requests), scorer.missing(requests)
    if missing < total:
        say(f"{total - missing} of {total} scored tokens are in the cache")
    if again := scorer.without_kl(requests):
        say(f"{again} scored tokens are in the cache without a KL, and are scored again")
    with bar("scoring", max(missing, 1)) as advance:
        scorer.after = lambda cell: advance(cell.n, doing(cell))
        with resumable():
            yield


@contextmanager
def resumable() -> Iterator[None]:
    """For work that is kept: Ctrl-C says that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; run the same command to resume.") from None


class PromptLine:
    """The progress of a prompt that takes more than two seconds, for Llama's prompt_progress; a context, which clears it.

    On a terminal a line that is rewritten in place. Elsewhere nothing or, with `verbose`, a line every five seconds.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, *, verbose: bool) -> None:
        self._line = _Line(_to_stderr) if sys.stderr.isatty() else None
        self._verbose = verbose
        self._next = SECONDS_BEFORE_THE_FIRST

    def __enter__(self) -> PromptLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line:
            self._line.clear()

    def __call__(self, progress: PromptProgress) -> None:
        """Shows it. Called from another thread."""
        if progress.tokens_done == progress.tokens:
            self.__exit__()
            self._next = SECONDS_BEFORE_THE_FIRST
        elif progress.seconds < self._next:
            return
        elif self._line:
            self._next = 0.0
            self._line.draw(prompt_text(progress))
        elif self._verbose:
            self._next = progress.seconds + self.SECONDS_BETWEEN_LINES
            say(prompt_text(progress))


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def prompt_text(progress: PromptProgress) -> str:
    """Tokens, MiB and the time left, as far as they are known."""
    parts = [f"prompt: {progress.tokens_done} of {progress.tokens} tokens"]
    if progress.needed_mib:
        parts.append(f"read {progress.read_mib:.1f} of about {progress.needed_mib:.1f} MiB")
    if progress.seconds_left is not None:
        parts.append(f"about {duration(progress.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """As in "7 s", "3 min 20 s" and "2 h 5 min"."""
    minutes, rest = divmod(max(round(seconds), 1), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
