"""Runs the command line as a user's shell would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from cacheroute.cli import app


def cacheroute(
    *arguments: object, stdin: str | bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One command with its output as text; `stdin` is piped in."""
    done = subprocess.run(
        [sys.executable, "-m", "cacheroute", *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env={**os.environ, **(env or {})},
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def invoke(*arguments: object) -> Result:
    """One command in this process, so that a test can change what it calls."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def sentence(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence of a failure; checks that nothing else was said."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(lines) == 1 and lines[0].startswith("cacheroute: ") and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    return lines[0]
