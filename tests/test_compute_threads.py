"""The number of compute threads follows what the scheduler gives them. Times are simulated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.engine import compute_threads
from cacheroute.engine.compute_threads import ComputeThreads, Schedule, own_schedule
from support import tiny_models


class Machine:
    """Processors shared fairly with other processes; tokens of 50 ms."""

    def __init__(self, cores: int, most: int) -> None:
        self.cores, self.others, self.now, self.ran, self.waited = cores, 0, 0.0, 0.0, 0.0
        self.threads = ComputeThreads(most, lambda: Schedule(self.ran, self.waited), lambda: self.now)

    def run(self, seconds: float) -> list[int]:
        """The numbers of threads, token by token."""
        seen = []
        for _ in range(round(seconds / 0.05)):
            n = self.threads.look()
            seen.append(n)
            share = min(1.0, self.cores / (n + self.others))
            self.now += 0.05
            self.ran += n * 0.05 * share
            self.waited += n * 0.05 * (1 - share)
        return seen


def test_nothing_changes_on_a_quiet_machine() -> None:
    assert set(Machine(2, 2).run(60)) == {2}
    assert set(Machine(8, 8).run(60)) == {8}


@pytest.mark.parametrize("cores, others, fewer", [(2, 2, 1), (8, 2, 6), (8, 8, 4), (4, 4, 2), (4, 1, 3)])
def test_threads_are_lowered_to_what_they_get_and_raised_again(cores: int, others: int, fewer: int) -> None:
    machine = Machine(cores, cores)
    machine.run(5)
    machine.others = others
    seen = machine.run(60)
    assert max(set(seen[20:]), key=seen[20:].count) <= fewer + (cores > 4), "most of the time"
    assert seen[10:].count(cores) < 0.1 * len(seen), "tried again seldom"
    machine.others = 0
    assert machine.run(120)[-1] == cores


def test_one_thread_stays_one() -> None:
    machine = Machine(1, 1)
    machine.others = 3
    assert set(machine.run(10)) == {1}


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(-0.1, 2), st.floats(-0.1, 2)), max_size=60), st.integers(1, 16))
def test_whatever_the_system_says_the_number_is_possible(steps: list[tuple[float, float, float]], most: int) -> None:
    now = ran = waited = 0.0
    threads = ComputeThreads(most, lambda: Schedule(ran, waited), lambda: now)
    for passed, more_ran, more_waited in steps:
        now, ran, waited = now + passed, ran + more_ran, waited + more_waited
        assert 1 <= threads.look() <= most


def test_a_system_that_does_not_tell_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compute_threads, "_TASKS", tmp_path / "nowhere")
    assert own_schedule() is None
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("0 0 0\n")  # a kernel without CONFIG_SCHED_INFO
    monkeypatch.setattr(compute_threads, "_TASKS", tmp_path)
    assert own_schedule() is None
    now = iter(range(100))
    threads = ComputeThreads(4, own_schedule, lambda: next(now))
    assert {threads.look() for _ in range(20)} == {4}


@pytest.mark.skipif(sys.platform not in ("linux", "android"), reason="asks /proc")
def test_this_process_is_scheduled() -> None:
    first = own_schedule()
    sum(range(2_000_000))
    second = own_schedule()
    assert first and second and second.ran > first.ran


@pytest.mark.engine
def test_a_change_of_threads_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf")
    asked: list[int] = []

    def answer(look: Callable[[ComputeThreads], int]) -> list[int]:
        monkeypatch.setattr(ComputeThreads, "look", look)
        with contextlib.closing(Llama(str(path), n_ctx=128, n_threads=3, n_threads_batch=3, verbose=False)) as llm:
            set_threads = llm._ctx.set_n_threads
            llm._ctx.set_n_threads = lambda n, batch: (asked.append(n), set_threads(n, batch))
            tokens = llm.generate([5, 6, 7, 8], temp=0.0)
            return [next(tokens) for _ in range(40)]

    turns = iter([1, 2, 3] * 100)
    assert answer(lambda self: next(turns)) == answer(lambda self: 3)
    assert {1, 2, 3} <= set(asked)
