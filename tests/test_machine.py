"""The memory that is there: every cgroup of this process, of either version and at any depth, and `ulimit`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheroute.install import machine
from support.systems import LINUX

MIB = 1024**2
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_slow_cores_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 7}, raising=False)
    assert machine.big_cores(tmp_path) == 5  # nothing is said
    for i, speed in enumerate([160, 160, 160, 160, 600, 600, 1024, 1024]):
        path = tmp_path / f"sys/devices/system/cpu/cpu{i}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{speed}\n")
    assert machine.big_cores(tmp_path) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert machine.big_cores(tmp_path) == 2


def tree(root: Path, mounts: str, own: str, groups: dict[str, tuple[str, int, int]], v2: bool = True) -> Path:
    """A machine with 8000 MiB free; `groups`: folder -> (limit, bytes used, bytes of them page cache)."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {8000 * 1024} kB\n")
    (proc / "mountinfo").write_text(mounts)
    (proc / "cgroup").write_text(own)
    for name, (limit, used, cache) in groups.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        if v2:
            (folder / "memory.max").write_text(limit + "\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\nfile {cache}\nshmem 0\n")
        else:
            (folder / "memory.limit_in_bytes").write_text(limit + "\n")
            (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"cache {cache}\ntotal_active_file {cache}\ntotal_inactive_file 0\n")
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    assert machine.available_memory(tree(tmp_path, V2, "0::/\n", {})) == 8000 * MIB


@pytest.mark.parametrize("limited", ["user.slice", "user.slice/run-1.scope", "user.slice/run-1.scope/app"])
def test_any_enclosing_group_of_v2_counts(limited: str, tmp_path: Path) -> None:
    groups = {f"sys/fs/cgroup/{name}": ("max", 0, 0) for name in ("user.slice", "user.slice/run-1.scope")}
    groups[f"sys/fs/cgroup/{limited}"] = (str(512 * MIB), 300 * MIB, 100 * MIB)
    root = tree(tmp_path, V2, "0::/user.slice/run-1.scope/app\n", groups)
    assert machine.available_memory(root) == 312 * MIB, "the page cache of a group can be taken back"


@pytest.mark.parametrize("limited", ["", "docker", "docker/abc"])
def test_any_enclosing_group_of_v1_counts(limited: str, tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/memory/docker": ("9223372036854771712", 0, 0)}
    groups[f"sys/fs/cgroup/memory/{limited}"] = (str(512 * MIB), 300 * MIB, 100 * MIB)
    root = tree(tmp_path, V1 + HYBRID, "4:memory,hugetlb:/docker/abc\n0::/\n", groups, v2=False)
    assert machine.available_memory(root) == 312 * MIB


def test_the_high_mark_is_a_limit_too(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/a\n", {"sys/fs/cgroup/a": ("max", 0, 0)})
    (root / "sys/fs/cgroup/a/memory.high").write_text(f"{64 * MIB}\n")
    assert machine.available_memory(root) == 64 * MIB


@pytest.mark.parametrize("own", ["0::/docker/abc\n", "0::/../elsewhere\n"])
def test_a_mount_that_shows_only_the_containers_own_group(own: str, tmp_path: Path) -> None:
    mounts = V2.replace("0:26 / ", "0:26 /docker/abc ")
    root = tree(tmp_path, mounts, own, {"sys/fs/cgroup": (str(100 * MIB), 0, 0)})
    assert machine.available_memory(root) == 100 * MIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, "0::/a\n", {"sys/fs/cgroup/a": (str(MIB), 2 * MIB, 0)})
    assert machine.available_memory(root) == 0


@pytest.mark.parametrize("content", ["", "no such\n", "::\n", "4:memory\n", "0::\n"])
def test_files_of_proc_that_are_damaged(content: str, tmp_path: Path) -> None:
    root = tree(tmp_path, content + V2 + "1 2 3 - \n", content, {})
    assert machine.available_memory(root) == 8000 * MIB


def in_child(line: str) -> int:
    """What a process that bash has limited says is there."""
    code = "from cacheroute.install import machine; print(machine.available_memory())"
    done = subprocess.run(["bash", "-c", f"{line}; exec {sys.executable} -c '{code}'"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not LINUX, reason="needs /proc/self/statm")
def test_ulimit_counts() -> None:
    assert in_child("ulimit -v 2000000") < 2000000 * 1024
    assert in_child("ulimit -d 500000") < 500000 * 1024


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A real cgroup with a limit of 512 MiB; needs root and a memory controller."""
    for top, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(top) / f"cacheroute-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(512 * MIB))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("needs root and a cgroup with a memory controller")


def test_a_real_group(limited_group: Path) -> None:
    inner = limited_group / "inner"
    inner.mkdir()
    try:
        assert 0 < in_child(f"echo $$ >{inner}/cgroup.procs") <= 512 * MIB
    finally:
        inner.rmdir()
