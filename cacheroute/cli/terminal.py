"""What a command says beside its results."""

from __future__ import annotations

import sys

from cacheroute.files import printable


def say(text: str) -> None:
    """A line on stderr; control characters in names and paths are shown as escapes."""
    print(printable(text), file=sys.stderr, flush=True)
