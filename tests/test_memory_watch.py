"""A budget that follows the free memory: when it shrinks and grows, and that it changes memory and no lossless answer."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute import CacherouteError, Llama
from cacheroute.engine import memory_watch
from cacheroute.engine.memory_watch import fitting
from cacheroute.files import GIB, MIB
from cacheroute.model import memory_plan
from cacheroute.model.memory_plan import MemoryPlan
from cacheroute.native import bindings
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.routing.budget import Budget
from support import hook_abi
from support.decoding import last_logits
from support.native_hook import bare_hook
from support.waiting import until

PLAN = MemoryPlan(
    free=8 * GIB, reserve=512 * MIB, dense=GIB, embedding=0, context=256 * MIB, compute=256 * MIB, pass_tokens=512,
    resident_bytes=100 * MIB, layer_bytes=4 * MIB, file_expert_bytes=100 * MIB, n_expert=128, n_used=8,
)  # fmt: skip


@given(
    st.integers(8, 60),
    st.integers(0, 8 * GIB),
    st.floats(0, 1.2),
    st.sampled_from([0, GIB]),
    st.sampled_from([0, 0, 50 * MIB]),
    st.booleans(),
)
def test_a_budget_shrinks_when_memory_is_short_and_grows_when_there_is_more(
    capacity: int, free: int, filled: float, upcoming: int, swapped: int, calm: bool
) -> None:
    resident = int(filled * capacity * PLAN.resident_bytes)
    wanted = fitting(PLAN, capacity, free=free, resident=resident, upcoming=upcoming, swapped=swapped, most=60, calm=calm)
    assert PLAN.n_used <= wanted <= 60
    reserve = memory_plan.reserve(free + resident)
    left = free - max(capacity * PLAN.resident_bytes - resident, 0) - upcoming
    if left < 0.75 * reserve or swapped:
        assert wanted <= capacity
        gained = (capacity - wanted) * PLAN.resident_bytes
        assert wanted == PLAN.n_used or (left + gained >= reserve and gained >= swapped)
    elif not calm:
        assert wanted == capacity
    if wanted > capacity:  # and what is then in memory leaves the reserve
        assert free + resident - wanted * PLAN.resident_bytes >= reserve


@pytest.mark.parametrize("eviction", ["lru", "soft-lfu"])
def test_layers_hold_no_more_than_the_new_capacity(eviction: str) -> None:
    rng = np.random.default_rng(0)
    with bare_hook((3, 16, 2, 12), eviction=eviction) as hook:

        def run(tokens: int) -> None:
            for _ in range(tokens):
                for layer in range(3):
                    scores = rng.normal(size=(1, 16)).astype(np.float32)
                    chosen = hook.select(layer, scores, None, 1, decode=True)
                    assert set(chosen.ravel()) <= hook.resident(layer)

        run(30)
        assert [len(hook.resident(layer)) for layer in range(3)] == [12] * 3
        before = [hook.resident(layer) for layer in range(3)]
        bindings.lib.cr_hook_set_capacity(hook.handle, 5)
        assert [hook.resident(layer) for layer in range(3)] == before  # nothing has asked yet
        hook.select(1, rng.normal(size=(1, 16)).astype(np.float32), None, 1, decode=True)
        assert [len(hook.resident(layer)) for layer in range(3)] == [5] * 3  # of every layer at once
        assert hook.resident(0) < before[0]
        bindings.lib.cr_hook_set_capacity(hook.handle, 1)  # K is the least
        bindings.lib.cr_hook_settle_capacity(hook.handle)
        assert [len(hook.resident(layer)) for layer in range(3)] == [2] * 3
        bindings.lib.cr_hook_set_capacity(hook.handle, 12)
        run(30)
        assert [len(hook.resident(layer)) for layer in range(3)] == [12] * 3


def opened(model: Path, **more: object) -> contextlib.closing[Llama]:
    return contextlib.closing(Llama(str(model), budget="75%", io="direct", n_ctx=128, n_threads=1, verbose=False, **more))


def logits(llm: Llama, tokens: list[int], before: Callable[[int], None]) -> np.ndarray:
    rows = []
    llm.eval(tokens[:20])
    for i, token in enumerate(tokens[20:]):
        before(i)
        with llm.decoding():
            llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


@pytest.mark.engine
@pytest.mark.parametrize("routing, prefetch", [("original", 0), ("cache-prior:lambda=0", 0), ("original", 2)])
def test_another_capacity_changes_memory_and_no_logits(alone: Path, routing: str, prefetch: int) -> None:
    tokens = [int(t) for t in np.random.default_rng(1).integers(5, 200, 50)]
    with opened(alone, routing=routing, prefetch=prefetch) as llm:
        plain = logits(llm, tokens, lambda _: None)
        llm.rewind()
        n_expert, seen = llm.layout.n_expert, []

        def change(i: int) -> None:
            if i % 5 == 0:
                capacity = (n_expert // 4, n_expert // 2, llm.layout.n_used)[i // 5 % 3]
                llm.set_capacity(capacity)
                assert llm.resident_bytes <= llm.budget.nbytes == capacity * llm.layout.resident_bytes
                assert llm.measure_resident() == llm.resident_bytes
            seen.append(llm.resident_bytes)

        assert np.array_equal(logits(llm, tokens, change), plain)
        assert len(set(seen)) > 2


@pytest.mark.engine
def test_the_watch_takes_memory_back_and_gives_it_again(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the free memory falls and rises; nothing computes meanwhile."""
    header_free = [GIB]
    monkeypatch.setattr(memory_watch, "available_memory", lambda **_: header_free[0])
    monkeypatch.setattr(memory_watch, "_IDLE_SECONDS", 0.01)
    monkeypatch.setattr(memory_watch, "_BUSY_SECONDS", 0.01)
    monkeypatch.setattr(memory_watch, "_CALM_SECONDS", 0.05)
    said: list[Budget] = []
    with opened(alone, budget_changed=said.append) as llm:
        plan = memory_plan.of(llm.header, llm.layout, n_ctx=128)
        logits(llm, [5, 6, 7, 8] * 8, lambda _: None)
        full, held = llm.budget.capacity, llm.resident_bytes
        watch = memory_watch.MemoryWatch(llm, plan)
        try:
            time.sleep(0.2)
            assert llm.budget.capacity == full and not said
            header_free[0] = 0
            until(lambda: llm.budget.capacity == llm.layout.n_used)
            until(lambda: llm.resident_bytes == llm.budget.nbytes < held)
            header_free[0] = GIB
            until(lambda: llm.budget.capacity == full)
            until(lambda: said[-1].capacity == full)  # which is told after the budget has changed, by the watch's thread
            assert said[0].capacity < full and said[-1].capacity == full
            logits(llm, [5, 6, 7, 8] * 8, lambda _: None)
            until(lambda: llm.resident_bytes > said[0].nbytes)
        finally:
            watch.stop()


@pytest.mark.engine
def test_a_model_that_follows_the_memory_can_be_dropped_and_pickled(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: 70 * MIB)
    llm = Llama(str(tiny), budget="auto", io="direct", n_ctx=64, n_threads=1, verbose=False)
    with contextlib.closing(pickle.loads(pickle.dumps(llm))) as copied:
        assert copied.automatic and copied._watch and copied.asked.budget == "auto"
        watch = copied._watch
    assert not watch._thread.is_alive()
    gone, watch = weakref.ref(llm), llm._watch
    del llm
    until(lambda: gone() is None and not watch._thread.is_alive())  # its thread may hold the model for a look


def test_layers_of_unequal_shares_stay_within_a_smaller_budget() -> None:
    layers, n_expert, n_used = 3, 16, 2
    rng, shape = np.random.default_rng(2), bindings.Shape(3, 16, 2, 8, evictions.ONLINE["lru"])
    per_layer = strategies.to_native(strategies.parse("original"), n_used, layers)
    for own, experts in zip(per_layer, (14, 8, 2), strict=True):
        own.experts = experts
    layer_of = (ctypes.c_int32 * layers)(*range(layers))
    handle = bindings.checked(bindings.lib.cr_hook_new, shape, per_layer, layer_of, layers, None)
    try:
        address = bindings.lib.cr_hook_address(handle)
        bindings.lib.cr_hook_set_phase(handle, True)
        for capacity in (8, 5, 3, 2, 6):
            bindings.lib.cr_hook_set_capacity(handle, capacity)
            for _ in range(30):
                for layer in range(layers):
                    hook_abi.select(address, layer, rng.normal(size=(1, n_expert)).astype(np.float32), n_used, gating=1)
            mask, held = (ctypes.c_uint8 * n_expert)(), []
            for layer in range(layers):
                bindings.lib.cr_hook_resident(handle, layer, mask)
                held.append(sum(mask))
            assert sum(held) <= layers * capacity and min(held) >= n_used, (capacity, held)
    finally:
        bindings.lib.cr_hook_free(handle)


@pytest.mark.engine
def test_a_budget_goes_on_following_the_memory_after_settings_that_fail(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: 70 * MIB)
    with contextlib.closing(Llama(str(tiny), budget="auto", io="direct", n_ctx=64, n_threads=1, verbose=False)) as llm:
        watch = llm._watch

        def refuse(*_: object) -> None:
            raise CacherouteError("no")

        with monkeypatch.context() as patch:
            patch.setattr("cacheroute.engine.configured.Hook", refuse)
            with pytest.raises(CacherouteError):
                llm.configure(routing="cache-prior:lambda=0.1")
        assert llm._watch is watch and watch and watch._thread.is_alive() and str(llm.routing) == "original"


@pytest.mark.engine
def test_a_signal_handler_may_change_the_capacity_and_not_close(alone: Path) -> None:
    """It runs in the thread that computes, in the middle of a token."""
    tokens = [int(t) for t in np.random.default_rng(3).integers(5, 200, 60)]
    refused = []
    with opened(alone, flash_mbps=4) as llm:
        plain = logits(llm, tokens, lambda _: None)
        llm.rewind()

        def change(*_: object) -> None:
            llm.set_capacity(llm.layout.n_used if llm.budget.capacity > llm.layout.n_used else llm.layout.n_expert // 2)
            if llm.computing:
                with pytest.raises(CacherouteError, match="computes"):
                    llm.close()
                refused.append(1)

        before = signal.signal(signal.SIGALRM, change)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        try:
            assert np.array_equal(logits(llm, tokens, lambda _: None), plain)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert refused
