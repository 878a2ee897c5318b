"""A prompt's experts of the next layer are read while this one computes: which, in what order, and what memory they take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from support import tiny_models
from support.expert_file import on_a_disk
from support.live_hook import LIB, N_EXPERT, N_TENSORS, PACE, PAGE, Live, hooked
from support.systems import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="reads as Linux does")

N_LAYERS = 4
UNLIMITED = 2**62
EVERYTHING = [(0, 1), (2, 3), (4, 5), (6, 7)]  # of four tokens: all experts of a layer
EACH = 14 * 4096 * N_TENSORS  # an expert in whole pages, at most


@pytest.fixture(params=["buffered", "direct"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    """Nothing resident, no token yet; the router of every layer ranks its input itself."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", request.param, N_LAYERS) as hook:
        LIB.cr_hook_set_pace(hook.handle, 0)
        read_ahead(hook, UNLIMITED)
        yield hook


WEIGHT = np.eye(N_EXPERT, dtype=np.float32)


def read_ahead(live: Live, limit: int) -> None:
    layers = (bindings.RouterWeights * len(live.sizes))()
    for layer in layers:
        layer.weight = WEIGHT.ctypes.data
    LIB.cr_hook_read_ahead(live.handle, limit, N_EXPERT, layers)


def states(rows: list[tuple[int, ...]]) -> np.ndarray:
    """Inputs by which a router chooses these experts."""
    made = np.zeros((len(rows), N_EXPERT), np.float32)
    for own, experts in zip(made, rows, strict=True):
        own[list(experts)] = 5 - np.arange(len(experts))
    return made


def counters(live: Live) -> Counters:
    return bindings.counters(LIB.cr_hook_counters, live.handle, -1, prefill=True)


def compute(live: Live, layer: int, needed: set[int]) -> None:
    for tensor in range(N_TENSORS):
        for expert in sorted(needed):
            assert live.has(layer, tensor, expert, late=False) != live.has(layer, tensor, expert, late=True)


def prompt(live: Live, chosen: list[list[tuple[int, ...]]], predicted: list[list[tuple[int, ...]]] | None = None) -> None:
    """One batch: of each layer what its tokens choose, and what the layer before says that it will be."""
    for layer, rows in enumerate(chosen):
        following = (predicted or chosen)[(layer + 1) % len(chosen)]
        live.prompt(layer, rows, states(following))
        compute(live, layer, {e for row in rows for e in row})
    LIB.cr_hook_finish(live.handle, 1)
    assert live.error() == ""
    assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) > 0


def test_each_expert_is_read_once_and_those_that_are_named_often_ahead(live: Live) -> None:
    tokens = EVERYTHING * 8  # every expert is named by eight tokens
    prompt(live, [tokens] * N_LAYERS)
    seen = counters(live)
    assert seen.reads == N_LAYERS * N_EXPERT
    assert seen.prefetched == seen.prefetch_used == (N_LAYERS - 2) * N_EXPERT  # nothing for the first and the last layer


def test_what_is_named_once_is_not_trusted_before_it_has_been_right_often(live: Live) -> None:
    prompt(live, [EVERYTHING] * N_LAYERS)
    assert counters(live).prefetched == 0
    for _ in range(8):
        LIB.cr_hook_reset(live.handle)
        prompt(live, [EVERYTHING] * N_LAYERS)
    assert counters(live).prefetched > 0


def test_wrong_predictions_are_cancelled_or_dropped_and_soon_not_followed(live: Live) -> None:
    chosen, said = [(0, 1), (2, 3)] * 8, [(0, 1), (4, 5)] * 8
    for _ in range(3):
        LIB.cr_hook_reset(live.handle)
        prompt(live, [chosen] * N_LAYERS, [said] * N_LAYERS)
    seen = counters(live)
    assert 0 < seen.prefetch_used < seen.prefetched  # 4 and 5 were read for nothing
    before = seen.prefetched
    LIB.cr_hook_reset(live.handle)
    prompt(live, [chosen] * N_LAYERS, [said] * N_LAYERS)
    assert counters(live).prefetched == before  # half of the named ones are not needed: not sure enough


def test_memory_stays_within_the_budget_and_two_layers(live: Live) -> None:
    tokens = EVERYTHING * 8
    for _ in range(2):
        prompt(live, [tokens] * N_LAYERS)
    over = N_EXPERT - 4
    assert LIB.cr_hook_resident_bytes(live.handle) <= N_LAYERS * 4 * EACH
    assert LIB.cr_hook_peak_bytes(live.handle) <= (N_LAYERS * 4 + 2 * over) * EACH + EACH


# in bytes, of an expert in one tensor: of K-quants in whole pages, or of any type
SIZES = st.sampled_from([2 * PAGE, 3 * PAGE, 5 * PAGE]) | st.integers(1, 8 * PAGE // 32).map(lambda n: 32 * n)


@pytest.mark.parametrize("io", ["buffered", "direct"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(SIZES, min_size=N_TENSORS, max_size=N_TENSORS), min_size=4, max_size=6))
def test_layers_of_other_sizes_keep_within_the_budget_and_two_layers(io: str, tmp_path: Path, sizes: list[list[int]]) -> None:
    """Where a layer's experts do not fit what the layer before has left, that memory is given back. Reads are whole pages."""
    tokens, n_layers = EVERYTHING * 8, len(sizes)
    with hooked(on_a_disk(tmp_path) / "experts.bin", io, n_layers, sizes) as live:
        LIB.cr_hook_set_pace(live.handle, 0)
        read_ahead(live, UNLIMITED)
        slots = [live.slot_pages(i) for i in range(n_layers)]
        budget = 4 * sum(slots) * PAGE

        prompt(live, [tokens] * n_layers)
        once = PAGE * sum(live.pages(i, t, e) for i in range(n_layers) for t in range(N_TENSORS) for e in range(N_EXPERT))
        assert counters(live).read_bytes == once if io == "direct" else counters(live).read_bytes <= once
        prompt(live, [tokens] * n_layers)
        over = max(one + following for one, following in itertools.pairwise(slots)) * (N_EXPERT - 4)
        assert LIB.cr_hook_peak_bytes(live.handle) <= budget + over * PAGE

        for token in range(4):
            for layer in range(n_layers):
                chosen = (3 * token + layer) % N_EXPERT, (3 * token + layer + 1 + token % 5) % N_EXPERT
                live.select(layer, *chosen)
                compute(live, layer, set(chosen))
            LIB.cr_hook_finish(live.handle, 1)
            assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) <= budget


def test_the_limit_on_what_is_ahead_is_kept(live: Live) -> None:
    read_ahead(live, 3 * EACH)
    prompt(live, [EVERYTHING * 8] * N_LAYERS)
    seen = counters(live)
    assert 0 < seen.prefetched <= 3 * (N_LAYERS - 2)
    assert seen.reads == N_LAYERS * N_EXPERT
    read_ahead(live, 0)
    LIB.cr_hook_reset(live.handle)
    prompt(live, [EVERYTHING * 8] * N_LAYERS)
    assert counters(live).prefetched == seen.prefetched


def test_the_device_reads_on_while_a_layer_computes(live: Live) -> None:
    tokens = EVERYTHING * 8
    live.prompt(0, tokens, states(tokens))
    compute(live, 0, set(range(N_EXPERT)))
    LIB.cr_hook_set_pace(live.handle, PACE)
    live.prompt(1, tokens, states(tokens))  # names those of layer 2
    compute(live, 1, set(range(N_EXPERT)))
    time.sleep(N_EXPERT * N_TENSORS * 14 * 4096 / PACE * 1.5)
    live.prompt(2, tokens, states(tokens))
    assert all(live.has(2, t, e, late=False) for t in range(N_TENSORS) for e in range(N_EXPERT))
    LIB.cr_hook_set_pace(live.handle, 0)
    LIB.cr_hook_finish(live.handle, 1)


def test_what_is_needed_now_is_read_before_what_is_needed_next(live: Live) -> None:
    """Layer 1 turns out to need an expert more than was read ahead for it: it comes in the order of use, not last."""
    said = [(0, 1), (2, 3), (4, 5)] * 8
    LIB.cr_hook_set_pace(live.handle, PACE)
    live.prompt(0, said, states(said))
    compute(live, 0, set(range(6)))
    live.prompt(1, [*said, (6, 7)], states([*said, (6, 7)]))
    start = time.monotonic()
    assert live.has(1, 0, 7, late=True)  # the first tensor of the last expert
    there = time.monotonic() - start
    assert live.has(1, 2, 7, late=True)  # its last tensor
    assert time.monotonic() - start > 2 * there
    LIB.cr_hook_set_pace(live.handle, 0)
    LIB.cr_hook_finish(live.handle, 1)


def test_a_batch_that_is_broken_off_leaves_nothing_that_was_read_ahead(live: Live) -> None:
    tokens = EVERYTHING * 8
    live.prompt(0, tokens, states(tokens))
    compute(live, 0, set(range(N_EXPERT)))
    live.prompt(1, tokens, states(tokens))
    LIB.cr_hook_finish(live.handle, 0)
    assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) <= 2 * 4 * EACH


@pytest.mark.engine
@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])
def test_a_prompt_has_the_same_logits_and_reads_with_and_without(tmp_path: Path, arch: str, io: str) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf", n_layer=4)
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, 60, 120)]
    found = []
    for ahead in (False, True):
        llm = Llama(
            str(path),
            budget=4,
            io=io,
            n_ctx=256,
            n_threads=2,
            n_threads_batch=2,
            logits_all=True,
            verbose=False,
            read_ahead=ahead,
        )
        llm.eval(tokens)
        found.append((np.array(llm.scores[: len(tokens)]), llm.stats().prefill))
        llm.close()
    (without, before), (with_, after) = found
    assert np.array_equal(without, with_)
    assert before.prefetched == 0 and after.prefetched > 0
    assert after.misses == before.misses and after.reads - (after.prefetched - after.prefetch_used) == before.reads
