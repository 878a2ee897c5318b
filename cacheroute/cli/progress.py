"""Progress of long commands on stderr: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cacheroute.cli.terminal import say

if TYPE_CHECKING:
    from cacheroute.evals.runner import Cell, Request
    from cacheroute.evals.scorer import Scorer

Advance = Callable[[float, str], None]
"""Called with the units done since the last call and what happens now."""

_SECONDS_BEFORE_THE_FIRST, _SECONDS_BETWEEN_LINES = 5.0, 30.0


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
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
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
