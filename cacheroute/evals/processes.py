"""Executors that compute cells in other processes: of this machine, or of a Dask cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import ClassVar

from cacheroute import interrupts
from cacheroute.errors import CacherouteError, UsageError, pip_install


@contextmanager
def pool(n: int) -> Iterator[Executor]:
    """`n` fresh processes of this machine. Work that has not begun at the end of the context is cancelled.

    Ctrl-C goes to the parent only; the processes end when it ends, also when it is killed. Raises UsageError where Python has
    nothing to share work out with: it needs semaphores, which Android's libc lacks.
    """
    try:
        executor = ProcessPoolExecutor(n, _Spawn(), _begin)
    except (ImportError, NotImplementedError, OSError) as e:
        raise UsageError(f"This Python cannot share work out to processes ({e}); leave out --workers.") from None
    first = len(_Process.started)
    try:
        yield executor
    except KeyboardInterrupt:
        for process in _Process.started[first:]:  # what they compute now is of no use
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


class _Process(SpawnProcess):
    """A fresh process that never sees Ctrl-C, not even while it imports."""

    started: ClassVar[list[_Process]] = []

    def start(self) -> None:
        # put off, too: masked here, any other thread takes the signal, such as those of numpy's BLAS, and a process that gets
        # only half of what it is to do ends with a traceback
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            with interrupts.put_off():
                super().start()
                self.started.append(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(SpawnContext):
    Process = _Process


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process with its parent: one that waits for work would not notice that the parent has ended."""
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


@contextmanager
def cluster(scheduler: str) -> Iterator[tuple[Executor, int]]:
    """(executor, number of workers) of a Dask cluster. Work that has not begun at the end of the context is cancelled.

    Raises CacherouteError when dask.distributed is missing, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise CacherouteError(f"--scheduler needs dask.distributed; run {pip_install('distributed')}.") from None
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError, TypeError) as e:  # TypeError: tls without certificates
        raise CacherouteError(f"No Dask scheduler answers at {scheduler} ({type(e).__name__}).") from None
    with closing(client):
        executor = client.get_executor(pure=False)
        try:
            yield executor, max(len(client.nthreads()), 1)
        finally:
            executor.shutdown(wait=False)  # cancels
