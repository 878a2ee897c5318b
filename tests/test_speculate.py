"""`speculate`: what it reads and runs, where it chooses as `original`, and where it is refused.

Its choices are compared with the oracle in test_router.py and, live, in test_budget_held.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.model import experts
from cacheroute.trace import forced_scores, trace_file
from support import oracle, tiny_models
from support.cli import invoke
from support.decoding import decoded
from support.expert_file import on_a_disk
from support.live_hook import LIB, Ahead, compute, counters, hooked, settled
from support.native_hook import SIGMOID, SOFTMAX, SQRT_SOFTPLUS
from support.systems import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="reads as Linux does")


# ---- a hook that is called as llama.cpp calls it ------------------------------------------------------


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_what_is_predicted_runs_and_has_been_read(tmp_path: Path, io: str) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", io, routing="speculate") as live:
        ahead = Ahead(live, 0)  # no other expert is prefetched
        for wanted in ((3, 6), (6, 1), (0, 4), (3, 1)):
            live.select(0, 2, 5, hidden=ahead.hidden(*wanted))
            compute(live, 0, 2, 5)
            live.select(1, 7, 5, run=wanted)
            compute(live, 1, *wanted)
            settled(live)
        c = counters(live)
        assert c.prefetched == c.prefetch_used == c.misses - 2 > 0  # all but the first two of layer 0


def test_what_is_cached_and_better_runs_in_place_of_what_has_been_read(tmp_path: Path) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", "buffered", routing="speculate") as live:
        ahead = Ahead(live, 0)
        for wanted, best, run in (((3, 6), (7, 5), (3, 6)), ((0, 4), (7, 3), (3, 6)), ((0, 4), (7, 0), (0, 3))):
            live.select(0, 2, 5, hidden=ahead.hidden(*wanted))
            compute(live, 0, 2, 5)
            live.select(1, *best, run=run)  # 7 is neither cached nor read, and 4 is the worst
            compute(live, 1, *run)
            settled(live)
        c = counters(live)
        assert (c.prefetched, c.prefetch_used, c.misses, c.swapped) == (6, 3, 5, 4)


def test_the_best_own_experts_run_and_no_read_is_in_vain(tmp_path: Path) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", "buffered", routing="speculate:j=1") as live:
        ahead = Ahead(live, 0)
        live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
        compute(live, 0, 2, 5)
        live.select(1, 7, 5, run=(7, 3))  # 7 takes the place of 6, which is not read
        compute(live, 1, 7, 3)
        settled(live)
        c = counters(live)
        assert (c.prefetched, c.prefetch_used, c.reads, c.swapped) == (1, 1, 4, 1)


def test_a_bonus_for_what_is_cached(tmp_path: Path) -> None:
    with hooked(on_a_disk(tmp_path) / "experts.bin", "buffered", routing="speculate:lambda=1") as live:
        ahead = Ahead(live, 0)
        for wanted in ((3, 6), (0, 4, 3, 6), (1, 7, 6, 3)):  # the bonus is the whole range: nothing is missed any more
            live.select(0, 2, 5, hidden=ahead.hidden(*wanted))
            compute(live, 0, 2, 5)
            live.select(1, 7, 5, run=(3, 6))
            compute(live, 1, 3, 6)
            settled(live)
        assert counters(live).misses == 4


@pytest.mark.parametrize(("gating", "run"), [(SOFTMAX, (3, 4)), (SIGMOID, (3, 6)), (SQRT_SOFTPLUS, (3, 6))])
def test_a_bias_for_the_choice_is_added_to_probabilities(tmp_path: Path, gating: int, run: tuple[int, int]) -> None:
    """Of the logits 5, 4 and -5 a softmax makes .73, .27, 0, a sigmoid .99, .98, .01, and the root of a
    softplus 2.24, 2.00, .08; expert 4 gets 0.5 more."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", "buffered", routing="speculate") as live:
        ahead = Ahead(live, 0, selection_bias=0.5 * (np.arange(8) == 4))
        live.select(0, 2, 5, hidden=ahead.hidden(3, 6), gating=gating)
        live.select(1, 7, 5, run=run, gating=gating)
        settled(live)


def test_without_a_prediction_it_is_original(tmp_path: Path) -> None:
    """Several decoded tokens at once, prompts, and a layer whose router is not known."""
    with hooked(on_a_disk(tmp_path) / "experts.bin", "buffered", routing="speculate") as live:
        live.select(1, 7, 5)  # before cr_hook_prefetch()
        settled(live)
        ahead = Ahead(live, 0)
        live.prompt(0, [(2, 5)], hidden=[ahead.hidden(3, 6)])
        live.select(1, 7, 5)  # the layer before was a prompt's
        settled(live)
        live.select(0, 2, 5, hidden=ahead.hidden(3, 6))
        LIB.cr_hook_reset(live.handle)
        live.select(0, 2, 5, hidden=[1.0])  # a state of another width
        live.select(1, 7, 5)
        settled(live)
        c = counters(live)
        assert (c.prefetch_used, c.swapped) == (0, 0)


# ---- models -----------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2", "gpt-oss", "granitemoe", "llama"])
def test_it_reads_early_what_it_runs_under_every_io(architecture: str, tmp_path: Path) -> None:
    path = tiny_models.write(architecture, tmp_path / "m.gguf")
    llm = Llama(str(path), budget="50%", n_ctx=64, n_threads=1, verbose=False)
    plain, k = decoded(llm, routing="original"), llm.layout.n_used
    np.testing.assert_array_equal(decoded(llm, routing=f"speculate:j={k}"), plain)
    for routing in ("speculate", "speculate:lambda=0.3"):
        expected = decoded(llm, routing=routing, io="none")
        c = llm.stats().decode
        assert c.swapped > 0 and c.dropped == 0
        for settings in ({"io": "buffered"}, {"io": "buffered", "prefetch": 2}):
            np.testing.assert_array_equal(decoded(llm, routing=routing, **settings), expected)
            c, first = llm.stats().decode, llm.decoded_by_layer()[0]
            predictable = c.misses - first.misses
            if architecture == "deepseek2":  # groups of experts may be masked, which is known only when the layer chooses
                assert predictable >= c.prefetch_used > 0
            else:
                assert c.prefetched >= predictable == c.prefetch_used > 0
            assert llm.stats().prefill.prefetched == 0
    llm.close()


@pytest.mark.engine
def test_forced_scores_are_speculated_by_what_stands_for_their_prediction(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf")
    llm = Llama(str(path), budget="50%", n_ctx=64, n_threads=1, io="none", routing="speculate", verbose=False)
    forced = forced_scores.bind(forced_scores.parse("synthetic:prediction=0.5"), llm.layout, 12, 28)
    llm.force(forced)
    records: list[bytes] = []
    with llm.tracing(records.append), llm.decoding():
        for token in range(3, 43):
            llm.eval([token])
    n_expert, n_used = llm.layout.n_expert, llm.layout.n_used
    seen = np.frombuffer(b"".join(records), trace_file.record_dtype(n_expert, n_used, mass=True))
    assert len(seen) == 40 * len(llm.layout.layers)
    for record in seen:
        layer, token = record["layer"], record["token"]
        z, predicted = (rows[layer][token].astype(np.float64) for rows in (forced.z, forced.predicted))
        cached = set(np.flatnonzero(np.unpackbits(record["resident"], bitorder="little")))
        routing = oracle.Routing("speculate", j=0)
        assert list(record["ids"]) == oracle.choose(routing, z, np.exp(z), cached, 0, n_used, predicted if layer else None)
    with pytest.raises(UsageError, match="made up has no predictions for speculate to go by"):
        llm.force(forced_scores.ForcedScores("made up", forced.z))
    llm.close()


# ---- refusals ---------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_trace_has_no_predictions(alone: Path, tmp_path: Path) -> None:
    trace = tmp_path / "a.trace"
    made = invoke("trace", "-m", alone, "-p", "the cat sat on the mat", "--routing", "speculate:lambda=0.1", "-o", trace)
    assert made.exit_code == 0, made.output
    result = invoke("simulate", trace, "--routing", "original,speculate:lambda=0.1")
    assert result.exit_code == 2 and "goes by predicted scores, which a trace does not have" in result.stderr
    result = invoke("bench", "-m", alone, "--replay", trace, "--routing", "speculate")
    assert result.exit_code == 2 and "A trace has no predictions for `speculate` to go by" in result.stderr


@pytest.mark.engine
def test_a_model_whose_routers_cannot_be_evaluated(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_router", lambda index, floats: None)
    result = invoke("generate", "-m", alone, "-p", "the", "--routing", "speculate")
    assert result.exit_code == 2 and "speculate cannot predict: the model keeps its routers" in result.stderr
    result = invoke("tune", "-m", alone, "--uniform", "--strategy", "speculate")
    assert result.exit_code == 2 and "'speculate' has nothing to tune; there are pruning, max-rank" in result.stderr
