"""Progress of long commands on stderr: a bar or a line that is rewritten on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cacheroute import interrupts
from cacheroute.cli.terminal import say

if TYPE_CHECKING:
    from cacheroute.engine.progress import PromptProgress
    from cacheroute.evals.runner import Cell, Request
    from cacheroute.evals.scorer import Scorer

Advance = Callable[[float, str], None]
"""Called with the units done since the last call and what happens now."""

_SECONDS_BEFORE_THE_FIRST, _SECONDS_BETWEEN_LINES = 5.0, 30.0
_CLEAR, _SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"


@contextmanager
def bar(what: str, total: float) -> Iterator[Advance]:
    """Shows `total` units of work with an estimate of the time left."""
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    drawn = Progress(*columns, console=Console(stderr=True), transient=True)
    with interrupts.repaired(_CLEAR + _SHOW_CURSOR), drawn as shown:
        task = shown.add_task(what, total=total)
        yield lambda units, text: shown.update(task, advance=units, description=text or what)


def _lines(what: str, total: float) -> Advance:
    start = last = time.monotonic()
    done = 0.0

    def advance(units: float, text: str) -> None:
        nonlocal last, done
        done += units
        now = time.monotonic()
        if now - last >= (_SECONDS_BETWEEN_LINES if last > start else _SECONDS_BEFORE_THE_FIRST) and done:
            last = now
            left = (now - start) * max(total - done, 0) / done
            say(f"{what}: {min(done / total, 1):.0%}, about {left / 60:.0f} min left; {text}")

    return advance


def label(key: str) -> str:
    """A routing's key without what it has for each layer."""
    name, per_layer, _ = key.partition("[")
    return name + " per layer" if per_layer else name


def doing(cell: Cell) -> str:
    """What was computed of a cell."""
    return f"{label(cell.routing)} {cell.budget} experts"


@contextmanager
def scoring(scorer: Scorer, requests: Sequence[Request]) -> Iterator[None]:
    """Shows what is computed of those requests, in scored tokens; prints first how many of them are in the cache."""
    total, missing = sum(scorer.chunks[r.chunk].n_scored for r in requests), scorer.missing(requests)
    if missing < total:
        say(f"{total - missing} of {total} scored tokens are in the cache")
    with bar("scoring", max(missing, 1)) as advance:
        scorer.after = lambda cell: advance(cell.n, doing(cell))
        yield


class PromptLine:
    """The progress of a prompt that takes more than two seconds, for Llama's prompt_progress; a context, which clears it.

    On a terminal a line that is rewritten in place. Elsewhere nothing or, with `verbose`, a line every five seconds.
    """

    SECONDS_BEFORE_THE_FIRST, SECONDS_BETWEEN_LINES = 2.0, 5.0

    def __init__(self, *, verbose: bool) -> None:
        self._terminal = sys.stderr.isatty()
        self._verbose = verbose
        self._next = self.SECONDS_BEFORE_THE_FIRST
        self._drawn = contextlib.ExitStack()  # clears what is

    def __enter__(self) -> PromptLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._drawn.close()

    def __call__(self, progress: PromptProgress) -> None:
        """Shows it. Called from another thread."""
        if progress.tokens_done == progress.tokens:
            self._drawn.close()
            self._next = self.SECONDS_BEFORE_THE_FIRST
        elif progress.seconds < self._next:
            return
        elif self._terminal:
            if self._next:
                self._drawn.enter_context(interrupts.repaired(_CLEAR))
                self._drawn.callback(self._write, _CLEAR)
            self._next = 0.0
            self._write("\r" + prompt_text(progress)[: _columns() - 1] + "\x1b[K")
        elif self._verbose:
            self._next = progress.seconds + self.SECONDS_BETWEEN_LINES
            say(prompt_text(progress))

    @staticmethod
    def _write(text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def prompt_text(progress: PromptProgress) -> str:
    """Tokens, MiB and the time left, as far as they are known."""
    parts = [f"prompt: {progress.tokens_done} of {progress.tokens} tokens"]
    if progress.needed_mib:
        parts.append(f"read {progress.read_mib:.1f} of about {progress.needed_mib:.1f} MiB")
    if progress.seconds_left is not None:
        parts.append(f"about {_duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """As in "7 s" and "3 min 20 s"."""
    minutes, rest = divmod(max(round(seconds), 1), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
