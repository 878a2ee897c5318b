"""The files of a loaded model, held open: what is deleted or renamed over goes on to be read, what is overwritten is noticed."""

from __future__ import annotations

import os
from collections.abc import Sequence
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

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
