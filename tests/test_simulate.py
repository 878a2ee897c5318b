"""The simulator is the live run: same choices, same misses, same evictions; and its figures are those computed by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.native import bindings
from cacheroute.native.counters import Counters
from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import parse
from cacheroute.trace import simulate, trace_file
from cacheroute.trace.simulate import Arm, Replay
from cacheroute.trace.trace_file import DECODE, Header, Records, Trace
from support import oracle, tiny_models
from support.native_hook import SIGMOID, SOFTMAX, SOFTMAX_WEIGHT, bare_hook
from support.traces import fed, header, made_up

ROUTINGS = (
    "original",
    "pruning:k=2",
    "max-rank:m=7",
    "cumsum:p=0.7",
    "cache-prior:lambda=0.2",
    "cache-prior:lambda=0.8:max-loss=0.1",
    "drop-cold:f=0.8",
    "dynamic-k:p=0.6:k=2",
)
command = importlib.import_module("cacheroute.cli.simulate")
ONLINE = tuple(evictions.ONLINE)


# ---- the live run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """A model's own run: its trace and what its counters said."""

    trace: Trace
    counters: list[Counters]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Llama]:
    folder = tmp_path_factory.mktemp("tiny")
    made = {}
    for arch in ("qwen3moe", "deepseek2", "gpt-oss", "llama"):
        path = tiny_models.write(arch, folder / f"{arch}.gguf")
        made[arch] = Llama(str(path), io="none", n_ctx=128, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
    return made


def live(llm: Llama, path: Path, eviction: str, budget: str = "50%", routing: str = "original") -> Live:
    """Two sequences, each a prompt in three micro-batches and then tokens decoded one by one."""
    llm.configure(budget=budget, routing=routing, eviction=eviction, io="none")
    h = Header.of(llm.layout, routing, eviction, llm.budget.capacity)
    rng = np.random.default_rng(5)
    with trace_file.TraceWriter(path, h) as writer, llm.tracing(writer.append):
        for _ in range(2):
            llm.reset()
            llm.eval(rng.integers(3, 250, 41).tolist())
            with llm.decoding():
                for token in rng.integers(3, 250, 40).tolist():
                    llm.eval([token])
    return Live(trace_file.read(path), llm.decoded_by_layer())


@pytest.mark.parametrize("eviction", ONLINE)
@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2", "gpt-oss", "llama"])
def test_original_replays_exactly_as_it_ran(models: dict[str, Llama], tmp_path: Path, arch: str, eviction: str) -> None:
    run = live(models[arch], tmp_path / "t", eviction)
    h = run.trace.header
    replay, arm = Replay(run.trace), Arm(str(h.budget_experts), parse("original"), eviction)
    for counted, row in zip(run.counters, replay.run(arm, per_layer=True)[1:], strict=True):
        assert (row.hits, row.misses, row.swapped, row.evictions) == (counted.hits, counted.misses, 0, counted.evictions)
        assert row.evictions > 0 and row.lost_mass == 0
    for s in (0, 1):  # and each event of it: the cache before it is what the trace saw, the prompt's too
        for layer in range(len(h.layers)):
            own = run.trace.records[(run.trace.records["layer"] == layer) & (run.trace.records["sequence"] == s)]
            seen = np.unpackbits(own["resident"], axis=1, count=h.n_expert, bitorder="little")
            np.testing.assert_array_equal(replay.resident(arm, s, layer), seen)
            np.testing.assert_array_equal(replay._top(s, layer), own["ids"])


@pytest.mark.parametrize("gating", [SOFTMAX, SIGMOID, SOFTMAX_WEIGHT])
@pytest.mark.parametrize("eviction", ONLINE)
def test_scores_that_float16_makes_equal_evict_the_same(eviction: str, gating: int) -> None:
    rng = np.random.default_rng(1)
    scores = (0.3 + 2e-3 * rng.normal(size=(400, 16))).astype(np.float32)
    if gating == SOFTMAX:
        scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    with bare_hook((1, 16, 3, 8), "original", eviction) as hook:
        for row in scores:
            hook.select(0, row[None], None, gating, decode=True)
        records = hook.take()
    replay = Replay(Trace(header(1, 16, 3), records, complete=True))
    seen = np.unpackbits(records["resident"], axis=1, count=16, bitorder="little")
    np.testing.assert_array_equal(replay.resident(Arm("8", parse("original"), eviction), 0, 0), seen)


def test_a_lossy_live_run_is_near_its_replay(models: dict[str, Llama], tmp_path: Path) -> None:
    """Not exact: scores of 11 bits."""
    run = live(models["qwen3moe"], tmp_path / "t", "lru", routing="cache-prior:lambda=0.2")
    row = Replay(run.trace).run(Arm("50%", parse("cache-prior:lambda=0.2"), "lru"))[0]
    misses, swapped = sum(c.misses for c in run.counters), sum(c.swapped for c in run.counters)
    assert row.misses == pytest.approx(misses, rel=0.02) and row.swapped == pytest.approx(swapped, rel=0.02)


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("eviction", ONLINE)
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_strategy_and_eviction_decides_as_the_live_hook(name: str, eviction: str, mass: bool) -> None:
    """The recorded scores through the hook that llama.cpp calls, and through the simulator."""
    t = fed(mass)
    h, rows = t.header, Replay(t).run(Arm("9", parse(name), eviction), per_layer=True)
    with bare_hook((len(h.layers), h.n_expert, h.n_used, 9), name, eviction) as hook:
        for record in t.records:
            if record["token"] == 0 and record["layer"] == 0:
                bindings.lib.cr_hook_reset(hook.handle)
            z = record["z"][None].astype(np.float32)
            probs = record["mass"][None].astype(np.float32) if mass else None
            decode = bool(record["flags"] & DECODE)
            hook.select(int(record["layer"]), z, probs, SIGMOID if mass else SOFTMAX_WEIGHT, decode=decode)
        for layer, row in enumerate(rows[1:]):
            c = hook.counters(layer)
            assert (row.tokens, row.hits, row.misses, row.evictions) == (c.tokens, c.hits, c.misses, c.evictions)
            assert (row.swapped, row.dropped) == (c.swapped, c.dropped)
            assert row.lost_mass == c.lost_mass / c.tokens
        again = hook.take()
    for field in ("sequence", "token", "layer", "flags", "z", *(["mass"] if mass else [])):
        np.testing.assert_array_equal(again[field], t.records[field])  # what is recorded again is what was recorded
    assert rows[0].misses == sum(row.misses for row in rows[1:]) > 0


# ---- belady, shuffling, figures -------------------------------------------------------------------


@st.composite
def random_traces(draw: st.DrawFn) -> tuple[Trace, int]:
    n_expert = draw(st.integers(4, 20))
    n_used = draw(st.integers(1, min(n_expert - 1, 4)))
    seed, n_prompt = draw(st.integers(0, 2**32)), draw(st.integers(0, 6))
    t = made_up(1, n_expert, n_used, draw(st.integers(14, 60)), seed, mass=False, n_prompt=n_prompt)
    return t, draw(st.integers(n_used, n_expert))


@given(random_traces())
@settings(deadline=None, max_examples=60)
def test_belady_is_the_offline_optimum(case: tuple[Trace, int]) -> None:
    t, capacity = case
    replay = Replay(t)
    best = replay.run(Arm(str(capacity), parse("original"), "belady"))[0].misses
    for eviction in ONLINE:
        assert best <= replay.run(Arm(str(capacity), parse("original"), eviction))[0].misses
    decoded = Trace(t.header, t.records.copy(), True)
    decoded.records["flags"] |= DECODE
    by_sequence = [decoded.records["ids"][decoded.records["sequence"] == s].tolist() for s in (0, 1)]
    expected = sum(oracle.belady_misses(ids, capacity) for ids in by_sequence)
    assert Replay(decoded).run(Arm(str(capacity), parse("original"), "belady"))[0].misses == expected


def test_belady_needs_a_choice_that_the_cache_does_not_change() -> None:
    with pytest.raises(UsageError, match="belady needs the future choices, which are known only with the routing `original`"):
        Replay(fed(False)).run(Arm("50%", parse("cache-prior:lambda=0.1"), "belady"))
    arms = simulate.arms(["50%"], [parse("original"), parse("cache-prior:lambda=0.1")], ["lru", "belady"])
    assert [(str(a.routing), a.eviction) for a in arms] == [
        ("original", "lru"),
        ("original", "belady"),
        ("cache-prior:lambda=0.1", "lru"),
    ]


def test_a_shuffled_trace_keeps_the_skew_and_loses_the_locality() -> None:
    t = made_up(2, 24, 4, 400, 3, mass=False)
    plain, one, again, other = Replay(t), Replay(t, shuffle=1), Replay(t, shuffle=1), Replay(t, shuffle=2)
    arm = Arm("50%", parse("original"), "lru")
    for s in (0, 1):
        for layer in (0, 1):
            a, b = plain.sequences[s][layer], one.sequences[s][layer]
            np.testing.assert_array_equal(np.sort(a.z, axis=0), np.sort(b.z, axis=0))
            np.testing.assert_array_equal(a.z[:5], b.z[:5])  # the prompt
            np.testing.assert_array_equal(a.decode, b.decode)
    # a token keeps its layers together
    moved = [[plain.sequences[0][i].z.tolist().index(z) for z in one.sequences[0][i].z.tolist()] for i in (0, 1)]
    assert moved[0] == moved[1] != list(range(200))
    assert one.run(arm) == again.run(arm) != other.run(arm)
    assert one.run(arm)[0].shuffled and one.run(arm)[0].misses > plain.run(arm)[0].misses


def test_the_figures_by_hand() -> None:
    """E = 4, K = 1, C = 2: experts 0 1 0 2 1, no prompt."""
    records: Records = np.zeros(5, trace_file.record_dtype(4, 1, mass=False))
    for t, expert in enumerate((0, 1, 0, 2, 1)):
        records[t]["token"], records[t]["flags"] = t, DECODE
        records[t]["z"] = [0 if e == expert else -1 for e in range(4)]
    row = simulate.run(Trace(header(1, 4, 1), records, True), [Arm("2", parse("original"), "lru")])[0]
    assert (row.tokens, row.hits, row.misses, row.evictions) == (5, 1, 4, 2)
    assert row.miss_rate == 0.8 and row.missed_mib_per_token == 0.8  # an expert is 1 MiB
    assert row.lifetime_tokens == (1 + 2 + 2 + 2 + 2) / 2
    lossy = simulate.run(Trace(header(1, 4, 1), records, True), [Arm("2", parse("max-rank:m=2:j=0"), "lru")])[0]
    # 0 runs (1, none cached); ranks 0 and 1 are {1, 0}: 0 is cached; 0; {2, 0}: 0; {1, 0}: 0
    assert (lossy.misses, lossy.swapped) == (1, 3)
    assert lossy.lost_mass == pytest.approx(3 / 5 * (1 - np.exp(-1)))


def test_the_fewest_misses_at_a_tie_are_of_the_default() -> None:
    rows = simulate.run(
        fed(False), [Arm("50%", parse(r), e) for r in ("cache-prior:lambda=0.1", "original") for e in ("lru", evictions.DEFAULT)]
    )

    def said(**misses: float) -> str:
        own = [replace(row, missed_mib_per_token=misses.get(row.routing.partition(":")[0], 0.5)) for row in rows]
        return " ".join(command._conclusions(own))

    assert "Fewest misses at 50%: original with soft-lfu, misses 0.50 of 0.50" in said()
    prior = said(original=0.7)
    assert f"cache-prior:lambda=0.1 (lossy) with {evictions.DEFAULT}, misses 0.50 of 0.70" in prior


def bad_arms() -> Iterator[tuple[Arm, str]]:
    good = Arm("50%", parse("original"), "lru")
    yield replace(good, budget="2"), "every token needs 4"
    yield replace(good, budget="99"), "does not fit a model of 24 experts"
    yield replace(good, eviction="fifo"), "There is no eviction 'fifo'; there are lru, lfu, score, soft-lfu, belady"
    yield replace(good, routing=parse("max-rank:m=99")), "m is at most 24"
    yield replace(good, routing=parse("pruning:k=9")), "k is at most 4"


@pytest.mark.parametrize("arm, sentence", list(bad_arms()))
def test_what_does_not_fit_the_trace_is_one_sentence(arm: Arm, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Replay(fed(False)).run(arm)


def test_a_prompt_alone_has_nothing_to_simulate() -> None:
    t = made_up(1, 8, 2, 10, 0, mass=False, n_prompt=99)
    with pytest.raises(UsageError, match="no decoded token"):
        Replay(t)
