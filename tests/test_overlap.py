"""Reads and compute at the same time: the hook returns when reads have begun, and each expert is waited for on its own.

Reads are paced, so that a test sets how long one takes; the threads are those of the test.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cacheroute.native import bindings
from support.expert_file import on_a_disk
from support.live_hook import EXPERT, HEADER, LIB, N_TENSORS, PACE, SLOW, Live, hooked
from support.systems import LINUX

NEVER = 1e3  # bytes/s at which one expert takes a minute
HANG = 30  # seconds after which something waits that should not

pytestmark = pytest.mark.skipif(not LINUX, reason="reads as Linux does")


@pytest.fixture(params=["buffered", "direct"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    """Nothing resident, no token yet."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", request.param) as hook:
        yield hook


def test_the_choice_returns_before_the_reads_end(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, SLOW)
    start = time.monotonic()
    live.select(0, 2, 5)
    assert time.monotonic() - start < 6 * EXPERT / SLOW
    LIB.cr_hook_finish(live.handle, 1)
    assert time.monotonic() - start >= 6 * EXPERT / SLOW
    assert live.error() == ""


def test_each_expert_is_waited_for_on_its_own_in_the_order_of_the_matmuls(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, SLOW)
    start = time.monotonic()
    live.select(0, 2, 5)
    for tensor in range(N_TENSORS):
        for place, expert in enumerate((2, 5)):
            assert live.has(0, tensor, expert, late=True)
            read = tensor * 2 + place + 1  # experts that the device has delivered by now
            assert read * EXPERT / SLOW <= time.monotonic() - start
            assert read > 2 or time.monotonic() - start < 6 * EXPERT / SLOW  # the first do not wait for the last


def test_resident_experts_come_in_the_first_round_and_read_ones_in_the_second(live: Live) -> None:
    live.select(0, 2, 5)
    live.select(0, 2, 6)
    for tensor in range(N_TENSORS):
        assert live.has(0, tensor, 2, late=False) and not live.has(0, tensor, 2, late=True)
        assert not live.has(0, tensor, 6, late=False) and live.has(0, tensor, 6, late=True)
    live.select(0, 2, 6)
    live.select(1, 0, 1)  # another layer's exchange ends that of this one
    assert live.has(0, 0, 6, late=False)


def test_the_next_layer_starts_when_the_last_reads_have_ended(live: Live) -> None:
    start = time.monotonic()
    live.select(0, 2, 5)
    live.select(1, 0, 3)
    assert time.monotonic() - start >= 6 * EXPERT / PACE


def test_many_threads_wait_at_the_same_time(live: Live) -> None:
    def compute(_: int) -> list[bool]:
        return [live.has(0, t, e, late) for t in range(N_TENSORS) for late in (False, True) for e in (4, 1, 7)]

    with ThreadPoolExecutor(4) as pool:
        live.select(0, 1, 4)
        LIB.cr_hook_finish(live.handle, 1)
        for missing in (7, 2, 3, 5, 6):  # 4 stays
            live.select(0, 4, missing)
            for found in pool.map(compute, range(4)):
                there = [True, missing == 1, missing == 7] if missing in (1, 7) else [True]
                assert found[0] is there[0]
                assert found.count(True) == 3 * N_TENSORS  # in one of the rounds, or where the mapping is


@pytest.mark.parametrize("when", ["finish", "save", "resume", "measure"])
def test_operations_that_need_idle_readers_wait_for_the_reads(live: Live, when: str) -> None:
    start = time.monotonic()
    saved = LIB.cr_hook_save(live.handle)
    live.select(0, 2, 5)
    if when == "measure":
        assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) > 0
    elif when == "save":
        LIB.cr_checkpoint_free(LIB.cr_hook_save(live.handle))
    elif when == "resume":
        assert LIB.cr_hook_resume(live.handle, saved)
    else:
        LIB.cr_hook_finish(live.handle, 1)
    LIB.cr_checkpoint_free(saved)
    assert time.monotonic() - start >= 6 * EXPERT / PACE


def test_a_reset_drops_what_has_not_been_read(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, NEVER)
    start = time.monotonic()
    live.select(0, 2, 5)
    LIB.cr_hook_reset(live.handle)
    assert time.monotonic() - start < HANG and LIB.cr_hook_resident_bytes(live.handle) == 0
    LIB.cr_hook_set_pace(live.handle, 0)
    live.select(0, 2, 5)
    assert all(live.has(0, t, e, late=True) for t in range(N_TENSORS) for e in (2, 5))


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_hook_is_freed_while_it_reads(tmp_path: Path, io: str) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", io) as live:
        LIB.cr_hook_set_pace(live.handle, NEVER)
        live.select(0, 2, 5)
        start = time.monotonic()
    assert time.monotonic() - start < HANG


class Signal:
    """A cr_interrupt that is raised, in the thread that makes it, once `came` is set."""

    def __init__(self) -> None:
        self.came = False
        kinds = (ctypes.CFUNCTYPE(ctypes.c_int32), ctypes.CFUNCTYPE(None, ctypes.c_int32), ctypes.CFUNCTYPE(ctypes.c_int32))
        functions = (lambda: 0, lambda gil: None, lambda: -1 if self.came else 0)
        self._callbacks = [kind(f) for kind, f in zip(kinds, functions, strict=True)] + [ctypes.CFUNCTYPE(None)(lambda: None)]
        pointers = (ctypes.cast(callback, ctypes.c_void_p) for callback in self._callbacks)
        self.handle = LIB.cr_interrupt_new(*pointers, threading.get_ident())


@pytest.mark.parametrize("where", ["find", "another thread's find", "select"])
def test_an_interrupt_ends_every_wait_and_cancels_the_reads(live: Live, where: str) -> None:
    signal = Signal()
    LIB.cr_hook_set_interrupt(live.handle, signal.handle)
    LIB.cr_hook_set_pace(live.handle, NEVER)
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        LIB.cr_hook_begin(live.handle, 0)
        live.select(0, 2, 5)
        others = [pool.submit(live.find, 0, t, 5, True) for t in range(3)] if where != "select" else []
        if where == "another thread's find":
            time.sleep(0.2)  # until one of them sleeps
        threading.Timer(0.3, setattr, (signal, "came", True)).start()  # while this thread waits
        if where == "select":
            live.select(1, 0, 3)
            assert live.find(1, 0, 3, late=True) is None
        else:
            assert live.find(0, 0, 2, late=True) is None
        assert all(other.result() is None for other in others)
        LIB.cr_hook_finish(live.handle, 0)
    assert time.monotonic() - start < HANG
    assert live.error() == "" and LIB.cr_hook_resident_bytes(live.handle) == 0
    assert LIB.cr_interrupt_take(signal.handle) and not LIB.cr_interrupt_seen(signal.handle)
    signal.came = False
    LIB.cr_hook_set_pace(live.handle, 0)
    LIB.cr_hook_begin(live.handle, 0)
    for layer in range(2):
        live.select(layer, 2, 5)
        assert all(live.has(layer, t, e, late=True) for t in range(N_TENSORS) for e in (2, 5))
    LIB.cr_hook_finish(live.handle, 1)
    assert live.error() == "" and LIB.cr_hook_resident_bytes(live.handle) > 0
    LIB.cr_hook_set_interrupt(live.handle, None)
    LIB.cr_interrupt_free(signal.handle)


def test_an_interrupt_is_seen_in_the_main_thread_alone() -> None:
    signal = Signal()
    signal.came = True
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(LIB.cr_interrupt_poll, signal.handle).result()
        assert LIB.cr_interrupt_poll(signal.handle)
        assert pool.submit(LIB.cr_interrupt_poll, signal.handle).result()
    LIB.cr_interrupt_free(signal.handle)


def test_progress_may_be_asked_for_while_the_layers_are_read(live: Live) -> None:
    def ask(_: int) -> bindings.Progress:
        now = bindings.Progress()
        LIB.cr_hook_progress(live.handle, now)
        return now

    with ThreadPoolExecutor(2) as pool:
        LIB.cr_hook_begin(live.handle, 0)
        live.select(0, 2, 5)
        seen = list(pool.map(ask, range(50)))
        live.select(1, 0, 3)
        seen += pool.map(ask, range(50))
    LIB.cr_hook_finish(live.handle, 1)
    seen.append(ask(0))
    assert [(p.begun, p.done) for p in seen] == [(1, 0)] * 50 + [(2, 1)] * 50 + [(2, 2)]
    reads = [p.read_bytes for p in seen]
    assert reads == sorted(reads) and reads[-1] == seen[-1].needed_bytes == 2 * seen[0].needed_bytes > 0
    LIB.cr_hook_begin_prompt(live.handle, 1)
    assert not any(bytes(ask(0)))


def test_a_failed_read_wakes_its_waiters_and_is_reported(tmp_path: Path) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", "direct") as live:
        os.truncate(live.path, HEADER)
        live.select(0, 2, 5)
        assert live.find(0, 2, 5, late=True) is not None  # computes on anything, and the decode is stopped
        live.select(1, 2, 5)
        assert live.find(1, 0, 5, late=True) is not None
        LIB.cr_hook_finish(live.handle, 1)
        assert live.error() == "reading experts failed: the file has become shorter since it was loaded"
