"""A terminal as wide as a phone's, and what has to be true of text on it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

COLUMNS = 45
_STYLE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


def on_a_terminal(*words: object, columns: int = COLUMNS) -> str:
    """What one command shows there: stdout and stderr together, without colours."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=True)
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"}
    call = [sys.executable, "-m", "cacheroute", *map(str, words)]
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env, cwd=root)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0, said.decode()
    return _STYLE.sub("", said.decode())


def words(text: str) -> set[str]:
    """Without the punctuation at their ends, which depends on where a line ends."""
    return {word.strip(",;") for word in _STYLE.sub("", text).split()} - {""}


def check(text: str, *, columns: int = COLUMNS) -> None:
    """No line is wider, unless a single word of it, such as a path, already is."""
    for line in _STYLE.sub("", text).splitlines():
        longest = max(map(len, line.split()), default=0)
        assert len(line) <= columns or longest > columns - 20, line
