"""The control and the floor of `bench`: they run, their rows are labelled, and no process or group remains."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cacheroute.bench import memory_limit
from cacheroute.bench.floor import Floor
from cacheroute.bench.memory_limit import MemoryLimit
from cacheroute.bench.runs import Run
from cacheroute.engine.stats import Counters
from cacheroute.errors import CacherouteError
from support.cli import cacheroute

MIB = 2**20


def limit(nbytes: int) -> MemoryLimit:
    try:
        return MemoryLimit(nbytes)
    except CacherouteError as e:
        pytest.skip(f"no process can be limited here: {e}")


def rows(alone: Path, *arguments: object) -> tuple[list[dict[str, Any]], str]:
    arm = ("--routing", "original", "--eviction", "lru")
    done = cacheroute("bench", "-m", alone, "-p", 16, "-n", 8, "-r", 1, "-t", 1, *arm, "-o", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


# ---- the limit ------------------------------------------------------------------------------------


def takes(nbytes: int) -> list[str]:
    """A command that waits, allocates so much memory, prints a line, and ends."""
    return [sys.executable, "-c", f"input(); b = bytearray({nbytes}); b[::4096] = b[::4096]; print(len(b))"]


def groups_left() -> list[Path]:
    return [p for place in memory_limit._places() for p in place.folder.glob(f"cacheroute-{os.getpid()}*")]


def test_a_process_within_its_limit_runs_and_one_beyond_it_is_killed() -> None:
    small = limit(64 * MIB)
    with small.process(takes(16 * MIB)) as process:
        assert process.communicate("\n")[0] == f"{16 * MIB}\n"
    with small.process(takes(256 * MIB)) as process:
        process.communicate("\n")
    assert process.returncode == -signal.SIGKILL
    assert groups_left() == []


def test_the_process_and_its_group_end_with_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), limit(64 * MIB).process([sys.executable, "-c", "input()"]) as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL
    assert groups_left() == []


def test_without_a_way_to_limit_memory_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "_places", list)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CacherouteError, match=r"^there is no cgroup to write to and no systemd-run$"):
        MemoryLimit(MIB)


# ---- the arm --------------------------------------------------------------------------------------


def test_the_control_runs_the_same_tokens_and_is_labelled(alone: Path) -> None:
    limit(64 * MIB)
    table, said = rows(alone, "--control", "--control-repack", "off,on", "--budget", "25%")
    assert said == ""
    controls = [row for row in table if row["control"]]
    assert [(r["test"], r["repack"]) for r in controls] == [(t, k) for k in (False, True) for t in ("pp16", "tg8 @ d16")]
    for row in controls:
        assert (row["routing"], row["eviction"], row["io"]) == ("none", "none", "mmap")
        assert row["miss_rate"] is row["read_mib_per_token"] is row["counted_mib"] is None
        assert len(row["samples_ts"]) == 1 and row["avg_ts"] > 0 and row["vs_lru"] > 0
        assert row["memory_limit_mib"] > row["budget_mib"]
    hooked = [row for row in table if not row["control"]]
    assert len(hooked) == 2 and all(row["memory_limit_mib"] is None for row in hooked)


def test_a_control_that_cannot_run_is_one_line(alone: Path) -> None:
    program = "from cacheroute.bench import memory_limit as m; m._places = list; from cacheroute.cli import main; main()"
    arguments = ["bench", "-m", str(alone), "-p", "0", "-n", "4", "-r", "2", "-t", "1", "--control", "--flash-mbps", "500"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env={**os.environ, "PATH": "/nowhere"}
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "cacheroute: the control reads as fast as the device goes: the kernel's own reads are not paced.",
        "cacheroute: no control at 50%: there is no cgroup to write to and no systemd-run.",
    ]
    assert "control" not in done.stdout


def test_an_interrupted_control_leaves_no_process_and_no_group(alone: Path) -> None:
    if limit(64 * MIB)._place is None:
        pytest.skip("systemd makes the group, under a name of its own")
    command = [sys.executable, "-m", "cacheroute", "bench", "-m", str(alone), "-p", "32", "-n", "64", "-r", "99", "--control"]
    command += ["-t", "1", "--routing", "original"]
    bench = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folders = [place.folder / f"cacheroute-{bench.pid}" for place in memory_limit._places()]
    deadline = time.monotonic() + 60
    children: list[str] = []
    while not children and time.monotonic() < deadline:  # a control may end between a look at its group and the next
        time.sleep(0.02)
        with contextlib.suppress(OSError):
            children = [pid for f in folders if f.exists() for pid in (f / "cgroup.procs").read_text().split()]
    bench.send_signal(signal.SIGINT)
    _, said = bench.communicate(timeout=60)
    assert bench.returncode == 130 and "Traceback" not in said
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert not any(f.exists() for f in folders)


# ---- the floor ------------------------------------------------------------------------------------


def test_the_floor_is_the_larger_of_both_terms() -> None:
    floor = Floor(prompt_seconds=1.0, decode_seconds=2.0, bytes_per_second=100.0)
    reads = Run(10, 5.0, None, 0, 0.0, Counters(read_bytes=400))
    assert floor.ts(reads, prompt=True) == floor.ts(reads, prompt=False) == 10 / 4
    computes = Run(10, 5.0, None, 0, 0.0, Counters(read_bytes=50))
    assert floor.ts(computes, prompt=True) == 10 and floor.ts(computes, prompt=False) == 5


@pytest.mark.parametrize("pace", [None, 5])
def test_rows_report_their_share_of_the_floor(alone: Path, pace: float | None) -> None:
    table, _ = rows(alone, "--floor", *(["--flash-mbps", pace] if pace else []))
    assert len(table) == 2
    for row in table:
        assert row["floor_ts"] > 0 and row["floor_share"] > 0
        if pace:  # slower than any device: reading is the floor, and no run can read faster than its pace
            assert row["floor_ts"] == pytest.approx(pace * 1e6 / (row["read_mib_per_token"] * MIB), rel=0.01)
            assert row["floor_share"] <= 1
    table, _ = rows(alone)
    assert all(row["floor_ts"] is row["floor_share"] is None for row in table)
