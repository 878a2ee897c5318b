"""Processes that compute cells: unbegun work is cancelled, and they end with their parent."""

from __future__ import annotations

import _multiprocessing
import concurrent.futures.process
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cacheroute.errors import UsageError
from cacheroute.evals import processes

# A parent that waits, and prints the id of its child process.
PARENT = """
import os, time
from cacheroute.evals import processes
if __name__ == "__main__":
    with processes.pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie has ended, too
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_work_that_has_not_begun_is_cancelled() -> None:
    with processes.pool(1) as pool:
        futures = [pool.submit(time.sleep, 0.5) for _ in range(20)]
        futures[0].result()
    assert futures[-1].cancelled()


def test_a_python_without_semaphores_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of Android is built without: its libc has no sem_open."""
    monkeypatch.delattr(_multiprocessing, "SemLock")
    monkeypatch.delitem(sys.modules, "multiprocessing.synchronize", raising=False)
    monkeypatch.setattr(concurrent.futures.process, "_system_limits_checked", False)
    monkeypatch.setattr(concurrent.futures.process, "_system_limited", None)
    with pytest.raises(UsageError, match=r"^This Python cannot share work out to processes \(.*\); leave out --workers\.$"):
        processes.pool(2).__enter__()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"  # a file: fresh processes import the main module again
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(how)
    for _ in range(300):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} outlived its parent")


def test_ctrl_c_goes_to_the_parent_only() -> None:
    with processes.pool(1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGINT)
        assert pool.submit(os.getpid).result() == pid


def test_ctrl_c_while_a_process_starts_waits_until_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another thread takes the signal; what is half-started cannot be killed and complains."""
    process = processes._Process()
    done = []

    def start(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        done.append(True)

    monkeypatch.setattr(processes.SpawnProcess, "start", start)
    with pytest.raises(KeyboardInterrupt):
        process.start()
    assert done and processes._Process.started.pop() is process
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
