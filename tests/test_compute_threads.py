"""The number of compute threads follows what other programs leave. Machines are simulated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.engine import compute_threads
from cacheroute.engine.compute_threads import Busy, ComputeThreads, busy
from support import tiny_models


class Machine:
    """Processors shared fairly between compute threads, readers of this process, and others. A token takes 0.1 s of work, which
    threads share, and where they are more than the processors left to them, `stall` times as long."""

    def __init__(self, cores: int, most: int, readers: float = 0.0, stall: float = 4.0) -> None:
        self.cores, self.readers, self.stall, self.others = cores, readers, stall, 0.0
        self.now = self.own = self.all = 0.0
        self.threads = ComputeThreads(most, cores, lambda: Busy(self.own, self.all), lambda: self.now)

    def run(self, seconds: float) -> list[int]:
        """The numbers of threads, token by token."""
        seen, end = [], self.now + seconds
        while self.now < end:
            n = self.threads.look()
            seen.append(n)
            share = min(1.0, self.cores / (n + self.readers + self.others))
            took = 0.1 / n * (self.stall if n + self.others > self.cores and n > 1 else 1.0)
            self.now += took
            self.own += (n + self.readers) * took * share
            self.all += (n + self.readers + self.others) * took * share
            self.threads.took(took)
        return seen


def test_nothing_changes_on_a_quiet_machine_whatever_this_process_does() -> None:
    assert set(Machine(2, 2).run(60)) == {2}
    assert set(Machine(8, 8, readers=4).run(60)) == {8}
    assert set(Machine(8, 3).run(10)) == {3}


@pytest.mark.parametrize("cores, others, fewer", [(2, 2, 1), (2, 1, 1), (8, 2, 6), (4, 1, 3)])
def test_fewer_threads_are_kept_where_they_are_faster(cores: int, others: int, fewer: int) -> None:
    machine = Machine(cores, cores, stall=8.0)
    machine.run(5)
    machine.others = others
    machine.run(5)
    seen = machine.run(60)
    assert set(seen) <= {fewer, cores} and seen.count(fewer) > 0.8 * len(seen)
    machine.others = 0
    machine.run(3)
    assert set(machine.run(10)) == {cores}


def test_all_threads_are_kept_where_they_are_faster() -> None:
    machine = Machine(2, 2, stall=1.2)
    machine.run(5)
    machine.others = 2
    machine.run(5)
    seen = machine.run(60)
    assert set(seen) == {1, 2} and seen.count(2) > 0.8 * len(seen)


def test_what_others_did_while_this_process_was_idle_does_not_count() -> None:
    machine = Machine(2, 2)
    machine.run(5)
    for _ in range(10):
        machine.now, machine.all = machine.now + 3, machine.all + 6
        assert set(machine.run(0.5)) == {2}


def test_a_little_load_changes_nothing() -> None:
    machine = Machine(2, 2)
    machine.others = 0.3
    assert set(machine.run(30)) == {2}


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(-1, 2), st.floats(-1, 20)), max_size=60), st.integers(1, 16), st.integers(1, 16)
)
def test_whatever_the_system_says_the_number_is_possible(steps: list[tuple[float, float, float]], most: int, cores: int) -> None:
    now = own = every = 0.0
    threads = ComputeThreads(most, cores, lambda: Busy(own, every), lambda: now)
    for passed, more_own, more in steps:
        now, own, every = now + passed, own + more_own, every + more
        assert 1 <= threads.look() <= most
        threads.took(passed)


def test_a_system_that_does_not_tell_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compute_threads, "_STAT", tmp_path / "nowhere")
    assert busy() is None
    now = iter(range(100))
    threads = ComputeThreads(4, 4, busy, lambda: next(now))
    assert {threads.look() for _ in range(20)} == {4}


@pytest.mark.skipif(busy() is None, reason="this system does not tell (/proc/stat)")
def test_this_process_is_a_part_of_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = busy()
    sum(range(3_000_000))
    second = busy()
    assert first and second and second.own > first.own and second.all >= first.all
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 1 1 1 1 1 1 1 1 1\ncpu0 100 10 20 500 7 1 2 50 0 0\ncpu1 200 0 0 0 0 0 0 0 0 0\nintr 1\n")
    monkeypatch.setattr(compute_threads, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    found = busy()
    assert found and found.all == pytest.approx(133 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.engine
def test_a_change_of_threads_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    asked: list[int] = []

    def answer(look: Callable[[ComputeThreads], int]) -> list[int]:
        monkeypatch.setattr(ComputeThreads, "look", look)
        with contextlib.closing(Llama(str(path), budget="50%", n_ctx=128, n_threads=3, n_threads_batch=3, verbose=False)) as llm:
            set_threads = llm._ctx.set_n_threads
            llm._ctx.set_n_threads = lambda n, batch: (asked.append(n), set_threads(n, batch))
            tokens = llm.generate([5, 6, 7, 8], temp=0.0)
            return [next(tokens) for _ in range(40)]

    turns = iter([1, 2, 3] * 100)
    assert answer(lambda self: next(turns)) == answer(lambda self: 3)
    assert {1, 2, 3} <= set(asked)
