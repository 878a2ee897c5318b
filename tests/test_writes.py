"""A result file is whole or the old one, whenever the process that writes it is killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Each rewrites FILE for ever, with content that is larger each time; the first line says what is checked afterwards.
_TUNED = """
from cacheroute.routing import tuned
n = 0
while True:
    n += 1
    made = tuned.TunedRouting("m", "a", 8, 2, (0,), "cache-prior", ({"lambda": 0.1},), {"n": n, "long": "x" * 200_000})
    tuned.save(made, path, force=True)
"""
_TASK = """
from cacheroute.trace import task_profile
while True:
    task_profile.save(task_profile.TaskProfile("m", "a", 9000, (0,), 1, ((7,) * 9000,)), path, force=True)
"""
_TRACE = """
import numpy as np
from cacheroute.trace import trace_file as t
h = t.Header("m", "a", 64, 2, (0,), (100,), "original", "lru", 4)
records = np.zeros(20_000, t.record_dtype(64, 2, mass=False))
while True:
    path.with_name(path.name + ".part").unlink(missing_ok=True)
    t.write(path, h, records, force=True)
"""
_PLOT = """
from cacheroute.plot import chart
def draw(figure):
    axes = figure.add_subplot()
    axes.plot(range(100))
while True:
    chart.save(chart.Chart([["a"]], draw, ""), path, force=True)
"""
_PROMPT = """
import os
from cacheroute.engine import prompt_cache
n = 0
while True:
    n += 1
    kept = prompt_cache.Kept([1, 2, n], [(3, b"r" * 1000, b"l" * n)], os.urandom(20_000_000))
    prompt_cache.write(path, kept, {"model": "m"})
"""


def read_tuned(path: Path) -> None:
    from cacheroute.routing import tuned

    assert tuned.load(path).notes["n"] >= 1


def read_task(path: Path) -> None:
    from cacheroute.trace import task_profile

    assert len(task_profile.load(path).uses[0]) == 9000


def read_trace(path: Path) -> None:
    from cacheroute.trace import trace_file

    trace = trace_file.read(path)
    assert trace.complete and len(trace.records) == 20_000


def read_prompt(path: Path) -> None:
    from cacheroute.engine import prompt_cache

    kept = prompt_cache.read(path, {"model": "m"})
    assert len(kept.points[0][2]) == kept.tokens[2] >= 1


def read_plot(path: Path) -> None:
    assert path.read_bytes().rstrip().endswith(b"</svg>")


@pytest.mark.parametrize(
    "program, name, read",
    [
        (_TUNED, "t.json", read_tuned),
        (_TASK, "p.json", read_task),
        (_TRACE, "t.trace", read_trace),
        (_PLOT, "f.svg", read_plot),
        (_PROMPT, "p", read_prompt),
    ],
    ids=["tuned", "task profile", "trace", "plot", "prompt cache"],
)
def test_a_killed_writer_leaves_a_whole_file(program: str, name: str, read: object, tmp_path: Path) -> None:
    path, rng = tmp_path / name, random.Random(name)
    code = f"from pathlib import Path\npath = Path({str(path)!r})\n" + program
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code])
        try:
            end = time.monotonic() + 60
            before = path.stat().st_mtime_ns if path.exists() else 0
            while time.monotonic() < end and (not path.exists() or path.stat().st_mtime_ns == before):
                time.sleep(0.01)
            time.sleep(0.3 * rng.random())  # somewhere within a write
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert callable(read)
        read(path)
