"""Ctrl-C: exit 130, one line, within a second, while the program starts, in a policy, in a prompt, with workers, and twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cacheroute import interrupts

pytestmark = pytest.mark.engine

POLICY = """
import numpy as np, time
class Slow:
    def __init__(self, n_expert, n_used, n_layers): self.k = n_used
    def choose(self, layer, z, mass, resident):
        time.sleep(0.002)
        return np.argsort(-z, kind="stable")[: self.k]
"""


def interrupted(folder: Path, *arguments: object, after: float | None, times: int = 1) -> tuple[list[str], float]:
    """(lines on stderr, seconds from Ctrl-C to the end); `after` seconds, or None: after the first byte on stdout."""
    command = [sys.executable, "-m", "cacheroute", *map(str, arguments)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, **pipes) as process:  # type: ignore[call-overload]
        if after is None:
            os.read(process.stdout.fileno(), 1)
        else:
            time.sleep(after)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors and b"ignored" not in errors, errors
    return errors.decode().splitlines(), time.monotonic() - start


def test_while_the_program_starts(tmp_path: Path) -> None:
    stopped = []
    for after in (0.1, 0.2, 0.3, 0.4):
        with contextlib.suppress(AssertionError):  # Python itself was not there yet, or the command was through
            stopped.append(interrupted(tmp_path, "models", after=after)[0])
    assert stopped and all(lines == ["cacheroute: Stopped."] for lines in stopped)


def test_in_a_policy(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "slow.py").write_text(POLICY)
    lines, seconds = interrupted(
        tmp_path, "generate", "-p", "Write a story.", "-n", 200, "-c", 512, "-t", 1, "--routing", "python:slow:Slow", after=None
    )
    assert "tok/s" in lines[-1] or "1 token" in lines[-1]
    assert seconds < 5 * interrupts.GRACE  # on a busy machine


def test_in_a_prompt(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    lines, seconds = interrupted(tmp_path, "generate", "-f", "long.txt", "-n", 2, "-c", 8192, "-t", 1, after=3)
    assert lines == ["cacheroute: Stopped."]
    assert seconds < 5 * interrupts.GRACE


def test_twice(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 3000)
    lines, _ = interrupted(tmp_path, "generate", "-f", "long.txt", "-n", 2, "-c", 8192, "-t", 1, after=3, times=2)
    assert lines == ["cacheroute: Stopped."]


def test_with_workers(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path / "cache"))
    words = ("eval", "perplexity", "-m", tiny, "--workers", 2, "-t", 2, "--routing", "cache-prior:lambda=0.1")
    lines, _ = interrupted(tmp_path, *words, after=4)
    assert lines[-1] == "cacheroute: Stopped."


def test_shielded_code_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_running", True)
    monkeypatch.setattr(interrupts, "_asked", False)

    @interrupts.shield
    def called_from_c() -> bool:
        interrupts._handle(signal.SIGINT, sys._getframe())
        return interrupts.pending()

    assert called_from_c()
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()
