"""Prefetch: which experts are read, what becomes of correct and wrong predictions, and that no choice and no logit changes."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.model import experts
from cacheroute.native import bindings
from support import tiny_models
from support.cli import invoke
from support.decoding import decoded
from support.expert_file import on_a_disk
from support.live_hook import (
    EXPERT,
    LIB,
    N_EXPERT,
    N_LAYERS,
    N_TENSORS,
    PACE,
    SLOW,
    Ahead,
    Live,
    compute,
    counters,
    hooked,
    settled,
)
from support.systems import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="reads as Linux does")


@pytest.fixture(params=["buffered", "direct"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Live]:
    """Nothing resident, no token yet."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", request.param) as hook:
        yield hook


N_NEW = {(3, 6): 2, (6, 1): 1, (0, 4): 2, (7, 2): 2, (5, 3): 2}  # that a cache of four experts has not kept


@pytest.mark.parametrize(("norms", "bias"), [(True, True), (False, False)])
def test_it_reads_what_the_next_router_predicts(live: Live, norms: bool, bias: bool) -> None:
    LIB.cr_hook_set_pace(live.handle, 0)
    ahead = Ahead(live, 2, norms=norms, bias=bias)
    for wanted in N_NEW:
        before = counters(live)
        live.select(0, 2, 5, hidden=ahead.hidden(*wanted))
        compute(live, 0, 2, 5)
        live.select(1, *wanted)
        compute(live, 1, *wanted)
        settled(live)
        now = counters(live)
        assert now.prefetched - before.prefetched == now.prefetch_used - before.prefetch_used == N_NEW[wanted]


def test_a_correct_prediction_needs_no_wait(live: Live) -> None:
    ahead = Ahead(live, 2)
    live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
    compute(live, 0, 2, 5)
    time.sleep(20 * EXPERT / PACE)  # the device is idle, or would be
    live.select(1, 3, 6)
    for tensor in range(N_TENSORS):
        assert live.has(1, tensor, 3, late=False) and live.has(1, tensor, 6, late=False)
    settled(live)


def test_an_unfinished_correct_prediction_is_waited_for(live: Live) -> None:
    ahead = Ahead(live, 1)
    start = time.monotonic()
    live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
    compute(live, 0, 2, 5)
    live.select(1, 3, 6)
    compute(live, 1, 3, 6)
    assert time.monotonic() - start >= 4 * N_TENSORS * EXPERT / PACE
    settled(live)
    assert (counters(live).prefetched, counters(live).prefetch_used, counters(live).reads) == (1, 1, 4)


def test_a_wrong_prediction_is_cancelled_and_mostly_not_read(live: Live) -> None:
    ahead = Ahead(live, 2)
    live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
    compute(live, 0, 2, 5)
    live.select(1, 0, 1)
    compute(live, 1, 0, 1)
    settled(live)
    c = counters(live)
    assert (c.prefetched, c.prefetch_used) == (2, 0)
    assert 4 * N_TENSORS * EXPERT <= c.read_bytes < 6 * N_TENSORS * EXPERT
    live.select(0, 2, 5)
    live.select(1, 0, 3)  # really gone
    compute(live, 1, 0, 3)
    settled(live)
    assert counters(live).misses == 5


def test_an_expert_predicted_wrongly_can_be_predicted_again(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, SLOW)
    ahead = Ahead(live, 1)
    live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
    compute(live, 0, 2, 5)
    live.select(1, 0, 1)  # 3 is being read
    LIB.cr_hook_set_pace(live.handle, 0)
    for wanted in ((3, 6), (3, 7)):
        live.select(0, 2, 5, hidden=ahead.hidden(*wanted))
        live.select(1, *wanted)
        compute(live, 1, *wanted)
    settled(live)


def test_a_new_sequence_starts_without_predictions(live: Live) -> None:
    ahead = Ahead(live, 2)
    live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
    LIB.cr_hook_reset(live.handle)
    assert LIB.cr_hook_measure_resident(live.handle) == LIB.cr_hook_resident_bytes(live.handle) == 0
    live.select(1, 3, 6)
    compute(live, 1, 3, 6)
    settled(live)
    assert counters(live).prefetch_used == 0


def test_random_predictions_change_neither_memory_nor_cache(live: Live) -> None:
    LIB.cr_hook_set_pace(live.handle, 20e6)
    ahead = Ahead(live, 2)
    rng = np.random.default_rng(0)
    most = 0
    for _ in range(60):
        for layer in range(N_LAYERS):
            chosen, prediction = (rng.choice(N_EXPERT, 2, replace=False).tolist() for _ in range(2))
            live.select(layer, *chosen, hidden=ahead.hidden(*prediction))
            compute(live, layer, *chosen)
        settled(live)
        most = max(most, LIB.cr_hook_resident_bytes(live.handle))
    c = counters(live)
    assert c.prefetched > c.prefetch_used > 0
    whole_pages = EXPERT + 2 * 4096
    assert most <= N_TENSORS * whole_pages * (4 * N_LAYERS + 2)  # the budget, and room for two predictions


# ---- models -----------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2", "gpt-oss", "granitemoe", "llama"])
def test_prefetch_changes_no_logit_and_no_count(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path))  # what "auto" measures of a tiny model is not for the user's
    path = tiny_models.write(architecture, tmp_path / "m.gguf")
    llm = Llama(str(path), budget="50%", n_ctx=64, n_threads=1, verbose=False)

    def run(**settings: Any) -> tuple[list[Any], list[int]]:
        return decoded(llm, **settings), [c.misses for c in llm.decoded_by_layer()]

    for routing in ("original", "cache-prior:lambda=0.3"):
        for io in ("buffered", "auto", "none"):
            expected, misses = run(routing=routing, io=io)
            for n in (1, 3):
                found, missed = run(routing=routing, io=io, prefetch=n)
                np.testing.assert_array_equal(expected, found)
                assert missed == misses
                c = llm.stats().decode
                assert io == "none" or c.prefetched >= c.prefetch_used > 0
                assert llm.stats().prefill.prefetched == 0
    llm.close()


@pytest.mark.engine
def test_predictions_are_better_than_chance(demo_model: Path) -> None:
    llm = Llama(str(demo_model), budget="50%", n_ctx=64, n_threads=1, prefetch=1, verbose=False)
    tokens = llm.tokenize(b"The sea was calm, and the old man rowed out before the sun had risen over the hills of the bay.")
    with llm.decoding():
        for token in tokens:
            llm.eval([token])
    c = llm.stats().decode
    llm.close()
    assert c.prefetch_used / c.prefetched > 0.5  # 8 of 32 are chosen, most of them resident


# ---- commands ---------------------------------------------------------------------------------------


@pytest.mark.engine
def test_bench_reports_how_many_predictions_were_chosen(alone: Path) -> None:
    few = ("bench", "-m", alone, "-p", 8, "-n", 12, "-r", 1, "-t", 1, "--budget", "50%", "--routing", "original")
    rows = json.loads(invoke(*few, "--prefetch", "0,2", "-o", "json").stdout)
    assert [row["prefetch"] for row in rows if row["n_gen"]] == [0, 0, 2]
    assert [row["prefetch_used"] is None for row in rows if row["n_gen"]] == [True, True, False]
    assert all(row["prefetch_used"] is None for row in rows if row["n_prompt"])
    shown = invoke(*few, "--prefetch", "1", "--replay", "synthetic:prediction=1", "-o", "md").stdout
    assert "| prefetch | chosen" in shown and "100%" in shown
    assert "prefetch" not in invoke(*few, "-o", "md").stdout
    assert "original, prefetch 2" in invoke(*few, "--prefetch", "0,2").stdout


@pytest.mark.engine
def test_generate_accepts_prefetch(alone: Path) -> None:
    result = invoke("generate", "-m", alone, "-p", "the cat", "-n", 12, "--raw", "--temp", 0, "--prefetch", 2, "-v", "-o", "json")
    assert result.exit_code == 0, result.output
    decode = json.loads(result.stdout)["stats"]["decode"]
    assert decode["prefetched"] >= decode["prefetch_used"] > 0
    assert f"prefetched {decode['prefetched']}, {decode['prefetch_used']} of them chosen" in result.stderr


def test_a_trace_has_no_predictions(alone: Path) -> None:
    result = invoke("bench", "-m", alone, "--replay", "some.trace", "--prefetch", "0,1")
    assert result.exit_code == 2 and "A trace has no predictions to prefetch by" in result.stderr


@pytest.mark.engine
@pytest.mark.parametrize("value", ["-1", "x", "", "1,-1"])
def test_bad_numbers_are_one_sentence(alone: Path, value: str) -> None:
    result = invoke("bench", "-m", alone, "--prefetch", value)
    assert result.exit_code == 2 and f"not {value!r}" in result.stderr


@pytest.mark.engine
def test_a_model_whose_routers_cannot_be_evaluated(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_router", lambda index, floats: None)
    with pytest.raises(UsageError, match="keeps its routers in another type than F32"):
        Llama(str(alone), prefetch=1, verbose=False)
    result = invoke("generate", "-m", alone, "-p", "the", "--prefetch", 1)
    assert result.exit_code == 2 and "prefetched" in result.stderr and "Traceback" not in result.stderr


def test_the_names_of_routers_and_norms() -> None:
    floats = {
        "blk.3.ffn_gate_inp.weight": 64,
        "blk.3.exp_probs_b.bias": 8,
        "blk.1.ffn_gate_inp.weight": 64,
        "blk.1.ffn_gate_inp.bias": 8,
        "blk.1.post_attention_norm.weight": 64,
    }
    assert experts._router(1, floats) == experts.RouterTensors(
        "blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.bias", "blk.1.post_attention_norm.weight", "", 64
    )
    assert experts._router(2, floats) is None
    assert experts._router(3, floats) == experts.RouterTensors("blk.3.ffn_gate_inp.weight", "", "", "blk.3.exp_probs_b.bias", 64)
    assert ctypes.sizeof(bindings.RouterWeights) == 4 * ctypes.sizeof(ctypes.c_void_p)
