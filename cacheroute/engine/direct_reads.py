"""Whether direct reads of a file give what is in it. Some filesystems answer them with other bytes (Android's shared storage)."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence

from cacheroute.errors import CacherouteError

_BYTES = 64 * 1024  # of one read; whole pages, as direct reads want them
_PLACES = 3  # in each file: begin, middle, end


def check(paths: Sequence[str]) -> None:
    """Raises CacherouteError where a direct read differs from one through the page cache, which some milliseconds tell.

    Says nothing where there are no direct reads: who opens the store is told why. What it has read leaves the page cache.
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is None or not hasattr(os, "preadv"):
        return
    for path in paths:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            files = [os.open(path, os.O_RDONLY | flag | os.O_CLOEXEC) for flag in (0, direct)]
            for file in files:
                stack.callback(os.close, file)
            if not _same(*files):
                raise CacherouteError(f"direct reads of {path} give other bytes than are in it: its filesystem does them wrong")


def _same(plain: int, direct: int) -> bool:
    page = mmap.PAGESIZE
    last = max(os.fstat(plain).st_size - _BYTES, 0) // page * page
    with mmap.mmap(-1, _BYTES) as aligned:
        for i in range(_PLACES):
            offset = last * i // (_PLACES - 1) // page * page
            n = os.preadv(direct, [aligned], offset)
            expected = os.pread(plain, n, offset)
            with contextlib.suppress(AttributeError, OSError):
                os.posix_fadvise(plain, offset, _BYTES, os.POSIX_FADV_DONTNEED)
            if n <= 0 or aligned[:n] != expected:
                return False
    return True
