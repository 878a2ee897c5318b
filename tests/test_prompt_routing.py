"""Prompts that keep to few experts: the C++ core against the numpy oracle, what holds for any scores, and live runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.native import bindings
from cacheroute.routing import prompt_routing
from cacheroute.routing.strategies import parse
from cacheroute.trace import trace_file
from cacheroute.trace.simulate import Arm, Replay
from cacheroute.trace.trace_file import BATCH, Header, Trace
from support import hook_abi, oracle, tiny_models
from support.cli import cacheroute
from support.decoding import last_logits
from support.native_hook import SIGMOID, BareHook, bare_hook
from support.traces import header, made_up

Floats = npt.NDArray[np.float32]
COVERS = (0.01, 0.1234567, 0.4321098, 0.7654321, 0.9876543)  # none is a fraction that sums of shares could hit exactly


@dataclass(frozen=True)
class Trial:
    """Batches that pass one layer: (scores [n, E], mass [n, E], whether they are of a prompt). Decoded ones have one token."""

    n_expert: int
    n_used: int
    capacity: int
    kind: str
    seed: int

    def batches(self) -> Iterator[tuple[Floats, Floats, bool]]:
        rng = np.random.default_rng(self.seed)
        for _ in range(int(rng.integers(1, 12))):
            prompt = bool(rng.random() < 0.7)
            n = int(rng.integers(1, 20)) if prompt else 1
            z = rng.normal(0, 1, self.n_expert) + rng.normal(0, 1, (n, self.n_expert))
            # few bits: what a trace keeps in half precision is what was ranked
            z = np.zeros_like(z) if self.kind == "constant" else np.round(z * (1 if self.kind == "ties" else 8)) / 8
            mass = rng.integers(0 if self.kind == "ties" else 1, 7, z.shape) / 8
            if self.kind == "masked":
                z[rng.random(z.shape) < 0.6] = -np.inf
            yield z.astype(np.float32), mass.astype(np.float32), prompt


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    n_expert = draw(st.integers(4, 40))
    n_used = draw(st.integers(1, min(n_expert, 9)))
    kind = draw(st.sampled_from(("smooth", "ties", "constant", "masked")))
    return Trial(n_expert, n_used, draw(st.integers(n_used, n_expert)), kind, draw(st.integers(0, 2**32)))


def run(trial: Trial, prompts: str) -> Iterator[tuple[BareHook, set[int], Floats, Floats, bool, npt.NDArray[np.int32]]]:
    """Every batch through the hook: the hook, the cache before the batch, its scores, mass and phase, and the ids that run."""
    with bare_hook((1, trial.n_expert, trial.n_used, trial.capacity), prompts=prompts) as hook:
        for z, mass, prompt in trial.batches():
            before = hook.resident(0)
            yield hook, before, z, mass, prompt, hook.select(0, z, mass, SIGMOID, decode=not prompt)


# ---- the oracle, and what holds for any scores -----------------------------------------------------


@given(trials(), st.sampled_from(COVERS), st.sampled_from((0, 1, 3, 99)))
@settings(max_examples=200)
def test_every_batch_matches_the_oracle(trial: Trial, cover: float, last: int) -> None:
    layer = oracle.Layer(trial.n_expert, trial.n_used, trial.capacity, oracle.Routing(), "lru")
    swapped, missed, lost = 0, 0, 0.0
    for hook, _, z, mass, prompt, ids in run(trial, f"keep:cover={cover}:last={last}"):
        tokens = list(zip(z.astype(float), mass.astype(float), strict=True))
        events = layer.prompt(tokens, cover, last) if prompt else [layer.step(*tokens[0])]
        assert ids.tolist() == [event.run for event in events]
        assert hook.resident(0) == layer.cache.resident
        if prompt:
            swapped += sum(event.swapped for event in events)
            missed += sum(len(event.missed) for event in events)
            lost += sum(event.lost_mass for event in events)
        counted = hook.counters(0, prefill=True)
        assert (counted.swapped, counted.misses) == (swapped, missed)
        assert counted.lost_mass == pytest.approx(lost, abs=1e-9)
        assert hook.counters(0).swapped == 0


@given(trials())
def test_a_cover_of_1_is_original(trial: Trial) -> None:
    for kept, own in zip(run(trial, "keep:cover=1"), run(trial, "original"), strict=True):
        np.testing.assert_array_equal(kept[-1], own[-1])
        assert kept[0].resident(0) == own[0].resident(0)
        assert replace(kept[0].counters(-1, prefill=True), hook_seconds=0) == replace(
            own[0].counters(-1, prefill=True), hook_seconds=0
        )


@given(trials(), st.sampled_from(COVERS))
def test_what_a_token_chose_and_is_in_memory_runs(trial: Trial, cover: float) -> None:
    for _, before, z, _, _, ids in run(trial, f"keep:cover={cover}"):
        for token, chosen in zip(z, ids, strict=True):
            assert set(oracle.ranked(token.astype(float))[: trial.n_used]) & before <= set(chosen.tolist())
            assert len(set(chosen.tolist())) == trial.n_used


@given(trials(), st.sampled_from(COVERS))
def test_a_masked_expert_runs_only_where_the_model_has_no_other(trial: Trial, cover: float) -> None:
    for _, _, z, _, _, ids in run(replace(trial, kind="masked"), f"keep:cover={cover}"):
        for token, chosen in zip(z, ids, strict=True):
            assert np.isfinite(token[chosen]).sum() == min(trial.n_used, np.isfinite(token).sum())


@given(trials(), st.sampled_from(COVERS), st.integers(1, 20))
def test_the_last_tokens_run_their_own_experts(trial: Trial, cover: float, last: int) -> None:
    for _, _, z, _, _, ids in run(trial, f"keep:cover={cover}:last={last}"):
        for token, chosen in list(zip(z, ids, strict=True))[-last:]:
            assert chosen.tolist() == oracle.ranked(token.astype(float))[: trial.n_used]


@given(trials(), st.sampled_from(COVERS))
def test_it_reads_no_more_than_original_from_the_same_cache(trial: Trial, cover: float) -> None:
    if trial.kind == "masked":
        trial = replace(trial, kind="smooth")  # where K allowed ones are masked for a token, others run
    for _, before, z, _, prompt, ids in run(trial, f"keep:cover={cover}"):
        if prompt:
            own = {e for token in z for e in oracle.ranked(token.astype(float))[: trial.n_used]}
            assert len(set(ids.ravel().tolist()) - before) <= max(len(own - before), trial.n_used)  # K must be allowed


def test_a_batch_by_hand() -> None:
    """E = 5, K = 2: mass 1.0 of expert 0, 0.8 of 1, 0.7 of 2, 0.5 of 3; the cache is empty, then holds 3 and 0."""
    z = np.array([[4, 3, 0, 1, 2], [4, 0, 3, 2, 1], [0, 3, 2, 4, 1]], np.float32)
    mass = np.array([[0.5, 0.5, 0, 0, 0], [0.5, 0, 0.5, 0, 0], [0, 0.3, 0.2, 0.5, 0.1]], np.float32)
    mass[2] = [0, 0.375, 0.25, 0.625, 0.125]  # shares 0.375 and 0.625 of the third token's two best, 3 and 1
    with bare_hook((1, 5, 2, 2), prompts="keep:cover=0.6:last=0") as hook:
        # 0: 1.0, 1: 0.875, 2: 0.5, 3: 0.625 of 3.0; 0 and 1 carry 0.625 of it
        assert hook.select(0, z, mass, SIGMOID, decode=False).tolist() == [[0, 1], [0, 1], [1, 0]]
        assert hook.counters(0, prefill=True).swapped == 2
    with bare_hook((1, 5, 2, 2), prompts="keep:cover=0.65:last=0") as hook:  # 3 comes before 2: it has more mass
        assert hook.select(0, z, mass, SIGMOID, decode=False).tolist() == [[0, 1], [0, 3], [3, 1]]
    with bare_hook((1, 5, 2, 2), prompts="keep:cover=0.6:last=0") as hook:
        hook.select(0, z[2:], mass[2:], SIGMOID, decode=True)  # 3 and 1 are in memory, and carry 0.5
        assert hook.select(0, z, mass, SIGMOID, decode=False).tolist() == [[0, 1], [0, 3], [3, 1]]


def test_equal_mass_goes_to_the_lower_index() -> None:
    z, mass = np.eye(4, dtype=np.float32)[::-1], np.full((4, 4), 0.25, np.float32)
    with bare_hook((1, 4, 1, 1), prompts="keep:cover=0.5:last=0") as hook:
        ids = hook.select(0, z, mass, SIGMOID, decode=False)
    assert ids.ravel().tolist() == [0, 0, 1, 0]


def test_prescribed_ids_run_as_they_are() -> None:
    z = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    own = np.argsort(z, axis=1)[:, :2].astype(np.int32)
    with bare_hook((1, 8, 2, 2), prompts="keep:cover=0.1") as hook:
        bindings.lib.cr_hook_set_phase(hook.handle, False)
        address = bindings.lib.cr_hook_address(hook.handle)
        ids = hook_abi.select(address, 0, z, 2, gating=SIGMOID, model_ids=own, prescribed=True)
        assert hook.counters(0, prefill=True).swapped == 0
    np.testing.assert_array_equal(ids, own)


# ---- the simulator ---------------------------------------------------------------------------------


@given(trials(), st.sampled_from(COVERS))
def test_a_trace_replays_every_prompt_batch(trial: Trial, cover: float) -> None:
    prompts, reads = f"keep:cover={cover}:last={trial.seed % 4}", 0
    with bare_hook((1, trial.n_expert, trial.n_used, trial.capacity), prompts=prompts) as hook:
        for z, mass, prompt in trial.batches():
            before = hook.resident(0)
            ids = hook.select(0, z, mass, SIGMOID, decode=not prompt)
            reads += len(set(ids.ravel().tolist()) - before) if prompt else 0
        hook.select(0, z[:1], mass[:1], SIGMOID, decode=True)
        records, counted, decoded = hook.take(), hook.counters(0, prefill=True), hook.counters(0)
    replay = Replay(Trace(header(1, trial.n_expert, trial.n_used), records, complete=True))
    row = replay.run(Arm(str(trial.capacity), parse("original"), "lru", prompt_routing.parse(prompts)))[0]
    assert (row.prompt_tokens, row.prompt_reads) == (counted.tokens, reads)
    assert row.prompt_swap_rate == counted.swap_rate
    assert (row.misses, row.evictions) == (decoded.misses, decoded.evictions)


def test_a_trace_of_an_earlier_version_has_no_batches() -> None:
    t = made_up(1, 8, 2, 40, 0, mass=False)
    t.records["flags"] &= ~np.uint8(BATCH)
    row = Replay(t).run(Arm("4", parse("original"), "lru"))[0]
    assert row.prompt_tokens == 10 and row.prompt_reads is None and row.prompt_read_mib is None
    with pytest.raises(UsageError, match=r"does not know which tokens shared a batch; trace again\.$"):
        Replay(t).run(Arm("4", parse("original"), "lru", prompt_routing.parse("keep:cover=0.5")))


# ---- live ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    path = tiny_models.write("qwen3moe", tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return Llama(str(path), budget="50%", n_ctx=128, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)


TOKENS = np.random.default_rng(5).integers(3, 250, 80).tolist()


def answered(llm: Llama, prompts: str) -> list[Any]:
    """The logits after a prompt of three micro-batches, and of tokens decoded after it."""
    llm.configure(budget="50%", prompt_routing=prompts)
    found = []
    llm.eval(TOKENS[:41])
    with llm.decoding():
        for token in TOKENS[41:50]:
            found.append(last_logits(llm))
            llm.eval([token])
    return found


@pytest.mark.engine
def test_a_cover_of_1_changes_no_bit(llm: Llama) -> None:
    own = answered(llm, "original")
    before = llm.stats()
    for a, b in zip(own, answered(llm, "keep:cover=1"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (llm.stats().prefill.reads, llm.stats().prefill.swapped) == (before.prefill.reads, 0)


@pytest.mark.engine
def test_a_small_cover_reads_less_and_counts_its_swaps(llm: Llama) -> None:
    own, original = answered(llm, "original"), llm.stats()
    kept, stats = answered(llm, "keep:cover=0.6"), llm.stats()
    assert stats.prompt_routing == "keep:cover=0.6" and original.prompt_routing == "original"
    assert stats.prefill.reads < 0.9 * original.prefill.reads
    assert 0 < stats.prefill.swap_rate < 1 and stats.prefill.lost_mass > 0
    assert stats.decode.swapped == 0
    assert not np.array_equal(own[0], kept[0])
    again = answered(llm, "keep:cover=0.6")
    for a, b in zip(kept, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.engine
def test_the_simulator_reads_for_prompts_what_the_live_run_read(llm: Llama, tmp_path: Path) -> None:
    llm.configure(budget="50%", prompt_routing="original")
    h = Header.of(llm.layout, "original", llm.eviction, llm.budget.capacity)
    with trace_file.TraceWriter(tmp_path / "t", h) as writer, llm.tracing(writer.append):
        llm.eval(TOKENS[:16])  # one micro-batch: of several, llama.cpp takes only the last through the last layer
        with llm.decoding():
            for token in TOKENS[16:20]:
                llm.eval([token])
        llm.eval(TOKENS[20:34])
    replay = Replay(trace_file.read(tmp_path / "t"))
    row, kept = (
        replay.run(Arm("50%", parse("original"), llm.eviction, prompt_routing.parse(p)))[0]
        for p in ("original", "keep:cover=0.6")
    )
    stats = llm.stats()
    assert (row.prompt_reads, row.prompt_tokens, row.misses) == (stats.prefill.reads, 30, stats.decode.misses)
    assert row.prompt_swap_rate == 0
    assert kept.prompt_reads is not None and kept.prompt_reads < 0.9 * stats.prefill.reads
    assert 0 < kept.prompt_swap_rate < 1 and kept.swapped == 0


@pytest.mark.engine
def test_an_answer_does_not_depend_on_what_was_asked_before(llm: Llama) -> None:
    """The cache changes what a lossy prompt runs, so a prompt that does not continue the sequence begins with an empty one."""
    llm.configure(budget="50%", prompt_routing="keep:cover=0.5")

    def answer() -> list[int]:
        found = []
        for token in llm.generate(TOKENS[:30], temp=0.0):
            found.append(token)
            if len(found) == 8:
                break
        return found

    first = answer()
    llm.eval(TOKENS[50:60])
    assert answer() == first


@pytest.mark.engine
def test_without_a_routing_there_is_nothing_to_keep_to(llm: Llama) -> None:
    with pytest.raises(UsageError, match="Without a routing prompts cannot be rerouted"):
        llm.configure(routing=None, prompt_routing="keep:cover=0.5")


@pytest.mark.engine
def test_generate_says_that_it_is_lossy_and_counts_the_swaps(llm: Llama) -> None:
    arguments = ["generate", "-m", llm.model_path, "--raw", "-p", "a b c d e f g h i j k", "-n", "2", "-c", "64", "-t", "1"]
    arguments += ["--budget", "50%"]
    result = cacheroute(*arguments, "--prompt-routing", "keep:cover=0.5", "-v", "-o", "json")
    report = json.loads(result.stdout)
    assert "keep:cover=0.5 is lossy: tokens of the prompt may run other experts than the model chooses." in result.stderr
    assert 0 < report["prompt_swap_rate"] < 1
    prefill = report["stats"]["prefill"]
    assert f"| prompt swapped {prefill['swapped']}/{prefill['examined']} |" in result.stderr
    brief = cacheroute(*arguments, "--prompt-routing", "keep:cover=0.5").stderr
    assert brief.endswith(f"% swapped ({prefill['swapped']} of {prefill['examined']})\n") and ", prompt " in brief
    lossless = cacheroute(*arguments, "-v")
    assert "lossy" not in lossless.stderr and "prompt swapped" not in lossless.stderr


@pytest.mark.engine
def test_bench_has_an_arm_for_each(llm: Llama) -> None:
    arguments = ["bench", "-m", llm.model_path, "-p", 40, "-n", 2, "-r", 1, "-t", 1, "--budget", "25%", "--eviction", "lru"]
    result = cacheroute(*arguments, "--routing", "original", "--prompt-routing", "original,keep:cover=0.4", "-o", "json")
    assert result.returncode == 0, result.stderr
    own, kept = (row for row in json.loads(result.stdout) if row["test"].startswith("pp"))
    assert (own["prompt_routing"], kept["prompt_routing"]) == ("original", "keep:cover=0.4")
    assert own["swap_rate"] == 0 < kept["swap_rate"] and kept["read_mib_per_token"] < own["read_mib_per_token"]


@pytest.mark.engine
def test_simulate_shows_the_reads_of_prompts(llm: Llama, tmp_path: Path) -> None:
    trace = tmp_path / "t.trace"
    made = cacheroute("trace", "-m", llm.model_path, "-o", trace, "--n-prompt", 40, "--max-tokens", 50, "-c", 64, "-t", 1)
    assert made.returncode == 0, made.stderr
    arguments = ["simulate", trace, "--budget", "25%", "--routing", "original", "--eviction", "lru"]
    result = cacheroute(*arguments, "--prompt-routing", "original,keep:cover=0.4", "-o", "json")
    own, kept = json.loads(result.stdout)
    assert own["prompt_tokens"] == kept["prompt_tokens"] == 40 and own["prompt_reads"] > kept["prompt_reads"] > 0
    assert own["prompt_read_mib"] > kept["prompt_read_mib"] > 0 and own["prompt_swap_rate"] == 0 < kept["prompt_swap_rate"]
    table = cacheroute(*arguments, "-o", "md").stdout.splitlines()
    assert table[0].endswith("| prompt routing | prompt reads | prompt MiB | prompt swapped |") and " original " in table[2]
    brief = cacheroute(*arguments, "--prompt-routing", "original,keep:cover=0.4").stdout.splitlines()
    assert (
        max(map(len, brief)) <= 80
        and brief[2].endswith("  prompt MiB")
        and brief[4].startswith("   25%  original, keep:cover=0.4  ")
    )


# ---- the grammar -----------------------------------------------------------------------------------


def test_the_grammar_is_that_of_the_strategies() -> None:
    assert str(prompt_routing.parse("keep:cover=0.90")) == "keep:cover=0.9"
    assert prompt_routing.parse("keep:cover=0.9:last=4").last == 4 and prompt_routing.parse("keep:cover=0.9").last == 1
    assert [p.lossy for p in prompt_routing.parse_list("original,keep:cover=0.9,keep:cover=1")] == [False, True, False]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("drop", r"There is no prompt routing 'drop'; there are original and keep:cover="),
        ("keep", r"keep needs cover; its form is keep:cover="),
        ("keep:cover=0", r"keep: cover is at least 0.01 and at most 1, not 0"),
        ("keep:cover=2", r"keep: cover is at least 0.01 and at most 1, not 2"),
        ("keep:cover=0.5:last=1.5", r"keep: last is a whole number, not 1.5"),
        ("keep:k=2", r"keep has no parameter 'k'"),
        ("original:cover=0.5", r"original has no parameter 'cover'"),
    ],
)
def test_what_is_wrong_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        prompt_routing.parse(text)
