"""The files of a loaded model, held open: what is deleted or renamed over goes on to be read, what is overwritten is noticed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cacheroute.errors import CacherouteError


class OpenFiles:
    """`paths` by which the files can be opened again, whatever becomes of their names; the names themselves without /proc.

    Raises CacherouteError when one cannot be opened.
    """

    def __init__(self, names: Sequence[Path]) -> None:
        self._names = [name.absolute() for name in names]
        self._fds: list[int] = []
        try:
            for name in self._names:
                self._fds.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as e:
            self.close()
            raise CacherouteError(f"{e.filename} cannot be read ({e.strerror}).") from None
        links = [f"/proc/self/fd/{fd}" for fd in self._fds]
        self.paths = links if all(map(os.path.exists, links)) else [str(name) for name in self._names]
        self._seen = [self._look(fd) for fd in self._fds]

    @staticmethod
    def _look(fd: int) -> tuple[int, int]:
        s = os.fstat(fd)
        return s.st_size, s.st_mtime_ns

    def check(self) -> None:
        """Raises CacherouteError when the contents of a file have changed since it was opened."""
        for name, fd, seen in zip(self._names, self._fds, self._seen, strict=True):
            if self._look(fd) != seen:
                raise CacherouteError(f"{name} was changed after it was loaded; load the model again.")

    @contextlib.contextmanager
    def fetched(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[None]:
        """Within it, the kernel is asked for these ranges, in their order and many at a time, before they are used: a load that
        waits for each of its pages leaves a flash idle. `ranges`: file, offset, bytes. Changes nothing but the time."""
        over = threading.Event()

        def ask() -> None:
            for file, offset, nbytes in ranges:
                if over.is_set():
                    return
                with contextlib.suppress(OSError):  # a filesystem that takes no advice
                    os.posix_fadvise(self._fds[file], offset, nbytes, os.POSIX_FADV_WILLNEED)

        thread = threading.Thread(target=ask, daemon=True)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(RuntimeError):  # no thread to be had: the load waits for its pages
                thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
