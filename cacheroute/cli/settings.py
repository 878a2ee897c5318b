"""How experts are kept and chosen, as it was typed, for the commands that answer; and what they say of it at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.cli import options
from cacheroute.cli.terminal import say
from cacheroute.routing import tuned

if TYPE_CHECKING:
    from cacheroute.engine.asked import Asked
    from cacheroute.engine.llama import Llama
    from cacheroute.model.experts import ExpertLayout
    from cacheroute.routing.budget import Budget


def load(path: Path, settings: Asked, *, n_ctx: int, n_threads: int | None, flash_mbps: float | None, **more: Any) -> Llama:
    """The model of a command that answers. `n_threads` as options.threads() takes them; `more`: as Llama."""
    from cacheroute.engine.llama import Llama

    threads = options.threads(n_threads)
    own: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_threads": threads,
        "n_threads_batch": threads,
        "flash_mbps": flash_mbps,
        "verbose": False,
    }
    return Llama(str(path), **vars(settings), **own, **more)


def say_start(llm: Llama, *, quiet: bool = False) -> None:
    """What is in memory, how the rest is read, and what is lossy; from now on that the budget follows the free memory.

    `quiet`: only what costs quality, and that memory is short.
    """
    from cacheroute.forecast.line import first_line  # not at the start of every command

    if not quiet:
        own = {"routing": str(llm.routing), "eviction": llm.eviction, "n_threads": llm.n_threads, "flash_mbps": llm.flash_mbps}
        say(first_line(llm.header, llm.layout, llm.budget.capacity, llm.io, **own))
        nothing_read = llm.routing and not llm.routing.lossy and llm.budget.capacity == llm.layout.n_expert
        if llm.asked.routing == tuned.NAME and nothing_read:
            say("all experts are in memory: nothing is read, so a tuned routing has nothing to save")
    options.say_lossy(llm, quiet=quiet)
    llm.budget_changed = said_changes(llm.layout, llm.budget)


def said_changes(layout: ExpertLayout, budget: Budget) -> Callable[[Budget], None]:
    """For Llama.budget_changed: a line on stderr when a budget has become smaller, or as large as it was at first."""
    from cacheroute.forecast.line import held

    last = budget

    def changed(now: Budget) -> None:
        nonlocal last
        if now.capacity < last.capacity:
            say(f"memory is short: {held(layout, now.capacity)} of experts stay in memory")
        elif now.capacity == budget.capacity:
            say(f"there is memory again: {held(layout, now.capacity)} of experts may stay in memory")
        last = now

    return changed
