"""The prompt of a command: what was typed, a file, what is piped in. The same text comes in the same from all three."""

from __future__ import annotations

import os
import select
import stat
import sys
from pathlib import Path

from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.files import decoded, read_text, unreadable

MAX_BYTES = 64 * 1024 * 1024
_SECONDS_BEFORE_WORD = 2.0


def text(typed: str | None, file: Path | None, *, stdin: bool = True) -> str:
    """What was typed, then the file, then what is piped in, a blank line between them.

    Standard input is read when it is a pipe, a socket or a file and `stdin` is not False. Beside -p or -f it is said what was
    read; a file of which something else has read a part, such as the loop of a shell, is left to that. Raises UsageError for a
    prompt that is empty, too long, or no UTF-8 text.
    """
    parts = [typed] if typed else []
    if file:
        parts.append(from_file(file))
    alone = typed is None and file is None
    if stdin:
        parts.append(_piped(alone=alone))
    whole = "\n\n".join(p for p in parts if p.strip())
    if not whole:
        chat = "; `cacheroute chat` holds a conversation" if alone and on_terminal() else ""
        raise UsageError(f"The prompt is empty; give one with -p, -f or a pipe{chat}.")
    return whole


def on_terminal() -> bool:
    """Whether somebody types what comes on standard input."""
    return sys.stdin is not None and sys.stdin.isatty()


def from_file(path: Path) -> str:
    """The text of a file. Raises UsageError when it cannot be read."""
    if path.is_fifo():
        return decoded(read_text(path), str(path))
    try:
        with path.open("rb", buffering=0) as opened:
            data = _read(opened.fileno(), str(path))
    except OSError as e:
        raise unreadable(path, e) from None
    return decoded(data, str(path))


def _piped(*, alone: bool) -> str:
    if sys.stdin is None:
        return ""
    try:
        number = sys.stdin.fileno()
    except (OSError, ValueError):  # no file at all: a test's
        return decoded(sys.stdin.buffer.read(), "The prompt on standard input")
    try:
        mode = os.fstat(number).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
            return ""  # a terminal, /dev/null
        if stat.S_ISREG(mode) and not alone and os.lseek(number, 0, os.SEEK_CUR) > 0:
            say("standard input is a file that something else has begun to read: it is left alone (-f takes all of a file)")
            return ""
        data = _read(number, "standard input", wait=not stat.S_ISREG(mode))
    except OSError as e:
        raise UsageError(f"Standard input cannot be read ({e.strerror}).") from None
    if data.strip() and not alone:
        say(f"{len(data)} bytes of standard input follow the prompt; --no-stdin leaves them out")
    return decoded(data, "The prompt on standard input")


def _read(number: int, name: str, *, wait: bool = False) -> bytes:
    """All bytes; after a while without any, a word on what is waited for."""
    data = bytearray()
    while True:
        if wait and not select.select([number], [], [], _SECONDS_BEFORE_WORD)[0]:
            say(f"waiting for the end of {name}, {len(data)} bytes so far (--no-stdin leaves it out)")
            wait = False
        chunk = os.read(number, 1 << 20)
        if not chunk:
            return bytes(data)
        data += chunk
        if len(data) > MAX_BYTES:
            raise UsageError(f"{name[0].upper()}{name[1:]} has more than {MAX_BYTES // 2**20} MiB: give less text.")
