"""Reads and compute at the same time: the hook returns when reads have begun, and each expert is waited for on its own.

Paced, so that a read takes as long as the test says; the threads are those of the test.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_identity import CEvent, CHook
from test_store import on_a_disk

from cacheroute import _native, routing
from cacheroute import eviction as evictions
from cacheroute.errors import CacherouteError

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "android"), reason="reads as Linux does")

LIB = _native.lib
N_LAYERS, N_TENSORS, N_EXPERT, N_USED = 2, 3, 8, 2
EXPERT = 50_016  # bytes; 0.05 s at PACE, a little more in whole pages
PACE = 1e6
SLOW = 1.5e5  # where something must be over before the reads are: they take 2 s, and a busy machine is allowed for
HEADER = 1312


@dataclass
class Live:
    """A hook over expert tensors of random bytes, called as llama.cpp calls it."""

    handle: int
    path: Path
    address: int  # of the mapping

    def select(self, layer: int, *experts: int) -> None:
        """One decoded token whose best experts are these."""
        scores = np.zeros(N_EXPERT, np.float32)
        scores[list(experts)] = 5 - np.arange(len(experts))
        ids = np.zeros(N_USED, np.int32)
        pointer = scores.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        event = CEvent(layer, 1, N_EXPERT, N_USED, 1, pointer, pointer, ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), None)
        LIB.cr_hook_set_phase(self.handle, 1)
        self._native.select(self._native.user_data, ctypes.byref(event))
        assert set(ids) == set(experts)

    def find(self, layer: int, tensor: int, expert: int, late: bool) -> int | None:
        place = self.address + HEADER + ((layer * N_TENSORS + tensor) * N_EXPERT + expert) * EXPERT
        source = self._native.source
        found: int | None = source.find(source.user_data, place, late)
        return found

    def has(self, layer: int, tensor: int, expert: int, late: bool) -> bool:
        """Whether it is found in this round; if so, the bytes must be those of the file."""
        found = self.find(layer, tensor, expert, late)
        with open(self.path, "rb") as file:
            want = os.pread(file.fileno(), EXPERT, HEADER + ((layer * N_TENSORS + tensor) * N_EXPERT + expert) * EXPERT)
        assert found is None or ctypes.string_at(found, EXPERT) == want
        return found is not None

    @property
    def _native(self) -> Any:
        return CHook.from_address(LIB.cr_hook_address(self.handle))

    def error(self) -> str:
        return str(LIB.cr_hook_error(self.handle).decode())


@contextmanager
def hooked(path: Path, io: str) -> Iterator[Live]:
    make = {"mmap": LIB.cr_store_new, "direct": LIB.cr_store_new_direct}[io]
    path.write_bytes(np.random.default_rng(0).bytes(HEADER + N_LAYERS * N_TENSORS * N_EXPERT * EXPERT))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        address = int(np.frombuffer(view, np.uint8).ctypes.data)
        starts = [HEADER + t * N_EXPERT * EXPERT for t in range(N_LAYERS * N_TENSORS)]
        tensors = [_native.Tensor(t // N_TENSORS, 0, at, EXPERT, address + at) for t, at in enumerate(starts)]
        files = (ctypes.c_char_p * 1)(os.fspath(path).encode())
        try:
            store = _native.checked(make, files, 1, (_native.Tensor * len(tensors))(*tensors), len(tensors), N_LAYERS, N_EXPERT)
        except CacherouteError as e:
            pytest.skip(str(e))
        shape = _native.Shape(N_LAYERS, N_EXPERT, N_USED, 4, evictions.ONLINE["lru"])
        per_layer = routing.to_native(routing.parse("original"), N_USED, N_LAYERS)
        hook = _native.checked(LIB.cr_hook_new, shape, per_layer, (ctypes.c_int32 * 2)(0, 1), 2, store)
        try:
            LIB.cr_hook_reset(hook)
            LIB.cr_hook_set_pace(hook, PACE)
            yield Live(hook, path, address)
        finally:
            LIB.cr_hook_free(hook)


@pytest.fixture(params=["mmap", "direct"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    """Nothing resident, no token yet."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", request.param) as hook:
        yield hook


def test_the_choice_returns_before_the_reads_end(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, SLOW)
    start = time.monotonic()
    live.select(0, 2, 5)
    assert time.monotonic() - start < 6 * EXPERT / SLOW
    LIB.cr_hook_finish(live.handle)
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


def test_what_was_there_comes_in_the_first_round_and_what_is_read_in_the_second(live: Live) -> None:
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
        LIB.cr_hook_finish(live.handle)
        for missing in (7, 2, 3, 5, 6):  # 4 stays
            live.select(0, 4, missing)
            for found in pool.map(compute, range(4)):
                there = [True, missing == 1, missing == 7] if missing in (1, 7) else [True]
                assert found[0] is there[0]
                assert found.count(True) == 3 * N_TENSORS  # in one of the rounds, or where the mapping is


@pytest.mark.parametrize("when", ["finish", "reset", "restore", "measure", "free"])
def test_what_needs_quiet_waits_for_the_reads(live: Live, when: str) -> None:
    start = time.monotonic()
    LIB.cr_hook_save(live.handle)
    live.select(0, 2, 5)
    if when == "measure":
        assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) > 0
    elif when != "free":
        getattr(LIB, f"cr_hook_{when}")(live.handle)
    if when != "free":  # or nothing touches the memory of a store that is gone
        assert time.monotonic() - start >= 6 * EXPERT / PACE


def test_a_read_that_fails_wakes_who_waits_for_it_and_is_told(tmp_path: Path) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", "direct") as live:
        os.truncate(live.path, HEADER)
        live.select(0, 2, 5)
        assert live.find(0, 2, 5, late=True) is not None  # computes on anything, and the decode is stopped
        live.select(1, 2, 5)
        assert live.find(1, 0, 5, late=True) is not None
        LIB.cr_hook_finish(live.handle)
        assert live.error() == "reading experts failed: No data available"
