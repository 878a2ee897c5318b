"""What a command says beside its results, and how wide the terminal is that it says it on."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import textwrap
from typing import IO

from cacheroute.files import printable

_LEAST = 20
_NARROW = 60  # columns, as a phone has them


def columns(stream: IO[str] | None) -> int | None:
    """Of the terminal at the end of `stream` ($COLUMNS replaces what it says); None where there is none, as in a pipe."""
    if stream is None or not stream.isatty():
        return None
    with contextlib.suppress(ValueError):
        return max(int(os.environ.get("COLUMNS", "")), _LEAST)
    try:
        own = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        own = 0
    return max(own, _LEAST) if own else 80


def folded(text: str, width: int | None, indent: int = 0) -> list[str]:
    """A text in lines of `width`, broken between words; None: one line. All lines but the first are indented, on a narrow
    terminal by 2. A word that is longer than a line, such as a path, stays whole."""
    if width is None:
        return [text]
    later = " " * (min(indent, 2) if width < _NARROW else indent)
    lines = textwrap.wrap(
        text, width, subsequent_indent=later, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return lines or [""]


def say(text: str) -> None:
    """A line on stderr; control characters in names and paths are shown as escapes. Lost where the disk behind it is full: the
    answer goes on."""
    try:
        print("\n".join(folded(printable(text), columns(sys.stderr))), file=sys.stderr, flush=True)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EIO):
            raise
