"""What else the machine did while something was timed, from files as Linux has them; and which rows are doubted for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cacheroute.bench import conditions, doubts
from cacheroute.bench.conditions import Conditions, Snapshot
from cacheroute.bench.runs import Run
from cacheroute.files import MIB
from cacheroute.native.counters import Counters
from support.systems import LINUX

TICK = os.sysconf("SC_CLK_TCK")
V2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)


def machine(root: Path, busy: int = 0, stolen: int = 0, held_us: int = 0, throttles: int = 0, cooling: int = 0) -> Path:
    """Ticks on each of four cores, of which two are this process's."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    core = f"{busy} 0 {busy} 999 5 7 7 {stolen} 0 0"
    (root / "proc/stat").write_text(f"cpu  1 2 3\n{''.join(f'cpu{i} {core}' + chr(10) for i in range(4))}intr 1 2\n")
    (root / "proc/self/mountinfo").write_text(V2)
    (root / "proc/self/cgroup").write_text("0::/app\n")
    for group, usec in (("sys/fs/cgroup", 0), ("sys/fs/cgroup/app", held_us)):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / "cpu.stat").write_text(f"usage_usec 5\nnr_throttled 1\nthrottled_usec {usec}\n")
    for i in (0, 2):
        folder = root / f"sys/devices/system/cpu/cpu{i}/thermal_throttle"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "core_throttle_count").write_text(f"{throttles}\n")
        (folder / "package_throttle_count").write_text(f"{throttles}\n")
    for i, (kind, state) in enumerate((("intel_powerclamp", 1), ("cpufreq-cpu0", cooling))):
        folder = root / f"sys/class/thermal/cooling_device{i}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "type").write_text(kind + "\n")
        (folder / "cur_state").write_text(f"{state}\n")
    return root


def test_the_difference_of_two_looks(tmp_path: Path) -> None:
    before = conditions.look(machine(tmp_path))
    after = conditions.look(machine(tmp_path, busy=TICK, stolen=TICK // 2, held_us=250_000, throttles=1))
    assert conditions.between(before, after, 1.5) == Conditions(2.5, 1.0, 0.25, True)  # two cores, user and system
    assert conditions.between(before, before, 1.0) == Conditions(0.0, 0.0, 0.0, False)
    cooled = conditions.look(machine(tmp_path, cooling=2))
    assert conditions.between(before, cooled, 0).throttled and not before.cooling


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    nothing = conditions.look(tmp_path)
    assert nothing == Snapshot(None, 0.0, 0.0, 0, False)
    assert conditions.between(nothing, nothing, 1.0) == Conditions()


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before, after = conditions.look(), conditions.look()
    assert (before.busy is None) == (after.busy is None) and (after.busy or 0) >= (before.busy or 0)
    assert before.busy is not None or not LINUX


def run(**changed: Any) -> Run:
    usual = {"tokens": 10, "seconds": 10.0, "device_bytes": 8 * MIB, "major_faults": 0, "counters": Counters(read_bytes=8 * MIB)}
    usual |= {"resident_bytes": 5 * MIB, "counted_bytes": 5 * MIB, "foreign_bytes": 0, "conditions": Conditions(0.1)}
    return Run(**usual | changed)


def reasons(*runs: Run, n_threads: int = 2, n_cores: int = 2, io: str = "buffered", hooked: bool = True) -> tuple[str, ...]:
    return doubts.of(runs, n_threads, n_cores, io=io, hooked=hooked)


def test_a_run_alone_is_trusted() -> None:
    assert reasons(run(), run()) == () and doubts.other_cores([run(), run()]) == pytest.approx(0.01)
    assert reasons(run(conditions=Conditions())) == () and doubts.other_cores([run(conditions=Conditions())]) is None


def test_other_programs_count_where_they_take_what_the_threads_need() -> None:
    beside = run(conditions=Conditions(8.0, 2.0))
    assert reasons(beside) == ("other programs kept 1.0 of 2 cores busy",)
    assert reasons(beside, n_cores=4) == (), "two cores were free for them"
    short = run(seconds=0.05, conditions=Conditions(0.02))
    assert reasons(short) == (), "the kernel counts in ticks"


def test_a_slow_processor_is_a_reason() -> None:
    assert reasons(run(conditions=Conditions(0.0, 0.0, 2.5))) == ("a limit on processor time (cgroup) made it wait 2.5 s",)
    assert reasons(run(conditions=Conditions(0.0, 0.0, 0.2))) == ()
    assert reasons(run(conditions=Conditions(0.0, throttled=True))) == (
        "the processor was slowed down by heat or for lack of power",
    )


@pytest.mark.parametrize("changed", [{"foreign_bytes": 3 * MIB}, {"resident_bytes": 8 * MIB}])
def test_pages_of_another_process_are_a_reason(changed: dict[str, int]) -> None:
    assert reasons(run(**changed)) == ("3.0 MiB of experts stayed in memory, as another process maps the file",)
    assert reasons(run(**changed), hooked=False) == ()


def test_misses_that_no_device_has_answered_are_a_reason() -> None:
    (said,) = reasons(run(device_bytes=MIB))
    assert said.startswith("the device delivered 1.0 MiB of 8.0 MiB: ")
    assert reasons(run(device_bytes=None)) == () and reasons(run(device_bytes=0, counters=Counters())) == ()


def test_a_page_cache_that_keeps_what_was_read_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts.stores, "drops_cached", lambda: False)  # macOS
    assert reasons(run()) == ("this system keeps what was read in its page cache, so a miss may be answered from memory",)
    assert reasons(run(), io="direct") == reasons(run(), hooked=False) == ()


def test_a_kernel_that_reads_far_ahead_is_a_reason_against_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    setting = conditions.read_ahead_setting(model, tmp_path)
    monkeypatch.setattr(doubts, "read_ahead_setting", lambda _: setting)
    monkeypatch.setattr(doubts, "read_ahead_kib", lambda path: conditions.read_ahead_kib(path, tmp_path))
    assert doubts.of_mapping(model) == (), "the kernel does not tell"
    setting.parent.mkdir(parents=True)
    setting.write_text("8192\n")
    (said,) = doubts.of_mapping(model)
    assert said.startswith("the kernel fetches 8192 KiB around a missing page here") and f"echo 128 >{setting}" in said
    setting.write_text("128\n")
    assert doubts.of_mapping(model) == ()
