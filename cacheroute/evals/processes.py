"""Processes that compute cells beside each other: one place that says how they start and how they end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any


@contextmanager
def pool(n: int, start: Callable[..., None] | None = None, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """`n` fresh processes, each of which begins with start(*arguments). What has not begun at the end is not computed.

    Ctrl-C is left to the parent, and they end when it does, however it does.
    """
    executor = ProcessPoolExecutor(n, get_context("spawn"), _begin, (start, *arguments))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None] | None, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def _end_with_parent() -> None:
    """Waiting for work, a process does not see that nobody is left to give it any."""
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)
