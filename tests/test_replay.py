"""`bench --replay`: a forced routing is the recorded one, or one of the locality that it states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings
from cacheroute.routing import eviction as evictions
from cacheroute.routing.strategies import parse
from cacheroute.trace import forced_scores, simulate, trace_file
from cacheroute.trace.forced_scores import ForcedScores
from cacheroute.trace.trace_file import Header, Records, Trace
from support import tiny_models
from support.cli import cacheroute, sentence
from support.traces import header, made_up

N_PROMPT, N_GEN = 20, 60
ARCHS = ("qwen3moe", "deepseek2", "gpt-oss")  # softmax; sigmoid and masked groups; softmax over the chosen
ROUTINGS = ("original", "cache-prior:lambda=0.2", "max-rank:m=8", "drop-cold:f=0.9")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {arch: tiny_models.write(arch, folder / f"{arch}.gguf") for arch in ARCHS}


@pytest.fixture(scope="module")
def models(paths: dict[str, Path]) -> dict[str, Llama]:
    return {
        arch: Llama(str(path), io="none", n_ctx=128, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
        for arch, path in paths.items()
    }


def run(llm: Llama, seed: int) -> list[tuple[int, ...]]:
    """A prompt and decoded tokens that `seed` chooses; what each layer counted, prompt and rest."""
    tokens = np.random.default_rng(seed).integers(3, 250, N_PROMPT + N_GEN).tolist()
    llm.eval(tokens[:N_PROMPT])
    with llm.decoding():
        for token in tokens[N_PROMPT:]:
            llm.eval([token])
    counted = []
    for layer in range(len(llm.layout.layers)):
        for prefill in (1, 0):
            c = bindings.counters(bindings.lib.cr_hook_counters, llm._hook.handle, layer, prefill=bool(prefill))
            counted.append((c.tokens, c.hits, c.misses, c.swapped, c.dropped, c.evictions))
    return counted


def traced(llm: Llama, path: Path, routing: str, eviction: str, seed: int) -> list[tuple[int, ...]]:
    llm.configure(budget="50%", routing=routing, eviction=eviction, io="none")
    h = Header.of(llm.layout, routing, eviction, llm.budget.capacity)
    with trace_file.TraceWriter(path, h, force=True) as writer, llm.tracing(writer.append):
        return run(llm, seed)


def forced(llm: Llama, scores: ForcedScores, routing: str, eviction: str, seed: int) -> list[tuple[int, ...]]:
    llm.configure(budget="50%", routing=routing, eviction=eviction, io="none")
    llm.force(scores)
    try:
        return run(llm, seed)
    finally:
        llm.force(None)


def bound(llm: Llama, path: Path) -> ForcedScores:
    return forced_scores.bind(forced_scores.parse(str(path)), llm.layout, N_PROMPT, N_GEN)


# ---- a trace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", evictions.ONLINE)
@pytest.mark.parametrize("arch", ARCHS)
def test_replaying_a_models_own_trace_gives_the_same_misses(
    models: dict[str, Llama], tmp_path: Path, arch: str, eviction: str
) -> None:
    llm = models[arch]
    live = traced(llm, tmp_path / "t", "original", eviction, seed=1)
    assert forced(llm, bound(llm, tmp_path / "t"), "original", eviction, seed=2) == live  # whatever the text
    assert run(llm, seed=2) != live  # and not without the replay


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("eviction", evictions.ONLINE)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_routing_acts_on_the_recorded_scores(
    models: dict[str, Llama], tmp_path: Path, arch: str, eviction: str, routing: str
) -> None:
    """As the simulator has it, exactly; and what is traced of a replay replays exactly, too."""
    llm, path = models[arch], tmp_path / "t"
    traced(llm, path, "original", "lru", seed=1)
    scores = bound(llm, path)
    counted = forced(llm, scores, routing, eviction, seed=2)
    rows = simulate.Replay(trace_file.read(path)).run(simulate.Arm("50%", parse(routing), eviction), per_layer=True)[1:]
    assert counted[1::2] == [(r.tokens, r.hits, r.misses, r.swapped, r.dropped, r.evictions) for r in rows]
    llm.force(scores)
    assert traced(llm, tmp_path / "again", routing, eviction, seed=3) == counted
    llm.force(None)
    again = trace_file.read(tmp_path / "again").records
    for name in ("sequence", "token", "layer", "flags", "z"):
        np.testing.assert_array_equal(again[name], trace_file.read(path).records[name])
    assert forced(llm, bound(llm, tmp_path / "again"), routing, eviction, seed=4) == counted


@pytest.mark.parametrize("arch", ARCHS)
def test_a_live_run_of_cache_prior_is_near_its_replay(models: dict[str, Llama], tmp_path: Path, arch: str) -> None:
    """Nearly: a trace keeps 11 bits of a score."""
    llm = models[arch]
    live = traced(llm, tmp_path / "t", "cache-prior:lambda=0.2", "lru", seed=1)
    again = forced(llm, bound(llm, tmp_path / "t"), "cache-prior:lambda=0.2", "lru", seed=2)
    np.testing.assert_allclose(again, live, rtol=0.02)


def test_a_rewound_sequence_begins_with_the_first_row(models: dict[str, Llama], tmp_path: Path) -> None:
    llm = models["qwen3moe"]
    traced(llm, tmp_path / "t", "original", "lru", seed=1)
    llm.force(bound(llm, tmp_path / "t"))
    for _ in range(2):
        llm.rewind()
        llm.eval([3] * N_PROMPT)
        with llm.decoding():
            for _ in range(N_GEN):
                llm.eval([4])
    with pytest.raises(CacherouteError, match="the scores to replay have no token 81 in layer 0"):
        llm.eval([5])
    llm.force(None)


def fits(n_layers: int, n_expert: int = 32, n_used: int = 4) -> ExpertLayout:
    return header(n_layers, n_expert, n_used).layout


def test_layers_are_spread_over_the_recorded_ones(tmp_path: Path) -> None:
    t = made_up(6, 32, 4, 40, 3, mass=False)
    trace_file.write(tmp_path / "t", t.header, t.records)
    rows = t.records[t.records["sequence"] == 0]
    for n_layers, expected in ((6, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 3, 4]), (3, [0, 2, 4]), (8, [0, 0, 1, 2, 3, 3, 4, 5])):
        scores = forced_scores.bind(forced_scores.parse(str(tmp_path / "t")), fits(n_layers), 5, 10)
        assert not scores.mass and len(scores.z) == n_layers
        for z, layer in zip(scores.z, expected, strict=True):
            np.testing.assert_array_equal(z, rows["z"][rows["layer"] == layer][:15])


def test_the_first_sequence_that_is_long_enough_is_taken(tmp_path: Path) -> None:
    t = made_up(2, 32, 4, 40, 3, mass=False)
    whole = t.records["sequence"] == 1
    kept = t.records[whole | (t.records["token"] < 7)]
    trace_file.write(tmp_path / "t", t.header, kept)
    short, long = (forced_scores.bind(forced_scores.parse(str(tmp_path / "t")), fits(2), 0, n) for n in (7, 8))
    np.testing.assert_array_equal(short.z[1], kept["z"][(kept["sequence"] == 0) & (kept["layer"] == 1)])
    np.testing.assert_array_equal(long.z[1], kept["z"][(kept["sequence"] == 1) & (kept["layer"] == 1)][:8])


def wrong_traces() -> dict[str, tuple[Trace, ExpertLayout, str]]:
    t = made_up(3, 32, 4, 40, 3, mass=False)
    prescribed, cut = t.records.copy(), t.records[: 3 * 10 - 1]  # the tenth token lacks its last layer
    prescribed["flags"] |= trace_file.PRESCRIBED
    prompt: Records = t.records[(t.records["layer"] < 2) | (t.records["token"] > 8)]
    return {
        "experts": (
            t,
            fits(3, 64),
            "uses 4 of 32 experts, and this one uses 4 of 64; replay a trace of",
        ),
        "used": (t, fits(3, 32, 2), "and this one uses 2 of 32"),
        "short": (
            replace(t, records=cut),
            fits(3),
            "has 9 tokens in its longest sequence, and 10 are needed; trace again",
        ),
        "prescribed": (replace(t, records=prescribed), fits(3), "layers with prescribed experts"),
        "prompt": (replace(t, records=prompt), fits(3), "lacks prompt tokens of its last layer; trace the text token by token"),
    }


@pytest.mark.parametrize("name", wrong_traces())
def test_a_trace_that_does_not_fit_is_one_sentence(tmp_path: Path, name: str) -> None:
    t, layout, expected = wrong_traces()[name]
    trace_file.write(tmp_path / "t", t.header, t.records)
    with pytest.raises(UsageError, match=expected):
        forced_scores.bind(forced_scores.parse(str(tmp_path / "t")), layout, 4, 6)


def test_scores_of_another_shape_are_refused(models: dict[str, Llama]) -> None:
    with pytest.raises(UsageError, match=r"synthetic.* does not fit 2 layers of 32 experts"):
        models["qwen3moe"].force(forced_scores.bind(forced_scores.parse("synthetic"), fits(3), 1, 1))


# ---- synthetic ------------------------------------------------------------------------------------


def synthetic(text: str, n_tokens: int = 2000, layout: ExpertLayout | None = None) -> ForcedScores:
    return forced_scores.bind(forced_scores.parse(text), layout or fits(2), 0, n_tokens)


def test_synthetic_scores_have_the_stated_statistics() -> None:
    for rho, skew in ((0.0, 0.0), (0.5, 0.3), (0.9, 1.0)):
        # max() removes a common part that 64 experts do not determine, so compare differences between experts
        z = synthetic(f"synthetic:rho={rho}:skew={skew}", 4000, fits(1, 64)).z[0].astype(float)
        z -= z.mean(axis=1, keepdims=True)
        mean = z.mean(axis=0)
        x = z - mean
        assert (x[1:] * x[:-1]).mean() / (x * x).mean() == pytest.approx(rho, abs=0.03)
        assert mean.std() / x.std() == pytest.approx(skew, rel=0.2, abs=0.1)


def misses(text: str) -> int:
    layout, n = fits(2), 1000
    scores = synthetic(text, n)
    records: Records = np.zeros(2 * n, trace_file.record_dtype(32, 4, mass=False))
    records["token"], records["layer"] = np.divmod(np.arange(2 * n), 2)
    records["flags"] = trace_file.DECODE | trace_file.SOFTMAX_MASS
    records["z"] = np.stack(scores.z, axis=1).reshape(2 * n, 32)
    t = Trace(Header.of(layout, "original", "lru", 16), records, True)
    return simulate.Replay(t).run(simulate.Arm("50%", parse("original"), "lru"))[0].misses


def test_more_locality_misses_less() -> None:
    by_rho = [misses(f"synthetic:rho={rho}:skew=0") for rho in (0, 0.3, 0.6, 0.9)]
    assert by_rho == sorted(by_rho, reverse=True) and by_rho[-1] < 0.5 * by_rho[0]
    by_skew = [misses(f"synthetic:rho=0:skew={skew}") for skew in (0, 0.5, 1)]
    assert by_skew == sorted(by_skew, reverse=True) and by_skew[-1] < 0.5 * by_skew[0]
    assert by_rho[0] == pytest.approx(0.5 * 2 * 1000 * 4, rel=0.05)  # at random, half of the experts are there


def test_a_seed_repeats_and_layers_differ() -> None:
    one, again, other = (synthetic(t, 50) for t in ("synthetic", "synthetic:seed=0", "synthetic:seed=1"))
    np.testing.assert_array_equal(one.z, again.z)
    assert not np.array_equal(one.z[0], one.z[1]) and not np.array_equal(one.z[0], other.z[0])
    np.testing.assert_array_equal(one.z[0], synthetic("synthetic", 90, fits(5)).z[0][:50])  # of more layers, of more tokens
    assert one.name == again.name == "synthetic:rho=0.3:skew=0.35:prediction=0.87:seed=0"


def test_predictions_correlate_as_requested() -> None:
    for prediction in (0.0, 0.5, 1.0):
        forced = synthetic(f"synthetic:prediction={prediction}", 400)
        for z, predicted in zip(forced.z, forced.predicted, strict=True):
            z, predicted = (x.astype(float) - x.mean(axis=1, keepdims=True, dtype=float) for x in (z, predicted))
            assert np.corrcoef(z.ravel(), predicted.ravel())[0, 1] == pytest.approx(prediction, abs=0.06)
    np.testing.assert_array_equal(forced.z, synthetic("synthetic", 400).z)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("synthetic:rho=2", "rho is at least 0 and at most 1, not 2"),
        ("synthetic:skew=-1", "skew is at least 0, not -1"),
        ("synthetic:seed=x", "seed='x' is not a number"),
        ("synthetic:mu=1", r"has no parameter 'mu'; its form is synthetic\[:rho=\]\[:skew=\]\[:prediction=\]\[:seed=\]"),
    ],
)
def test_wrong_parameters_are_one_sentence(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        forced_scores.parse(text)


# ---- the command ----------------------------------------------------------------------------------


def bench(path: Path, *arguments: object) -> tuple[list[dict[str, Any]], str]:
    run = ("bench", "-m", path, "--eviction", "lru", "-p", 8, "-n", 16, "-r", 2, "-t", 1, "-o", "json", *arguments)
    done = cacheroute(*run)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


HELD = "cacheroute: 784 KiB of experts were in memory before a run, held by another process that has the file mapped.\n"  # by us


def test_rows_name_what_was_replayed_and_repeat_exactly(paths: dict[str, Path]) -> None:
    table, said = bench(paths["qwen3moe"], "--replay", "synthetic:rho=0.8", "--floor")
    assert said.replace(HELD, "") == "" and len(table) == 4
    assert {row["replay"] for row in table} == {"synthetic:rho=0.8:skew=0.35:prediction=0.87:seed=0"}
    again, _ = bench(paths["qwen3moe"], "--replay", "synthetic:rho=0.8")
    own, _ = bench(paths["qwen3moe"])
    assert {row["replay"] for row in own} == {None}
    for row, same, other in zip(table, again, own, strict=True):
        assert row["miss_rate"] == same["miss_rate"] and (row["n_prompt"] or row["miss_rate"] < other["miss_rate"])
    shown = cacheroute("bench", "-m", paths["qwen3moe"], "-p", 0, "-n", 4, "-r", 1, "-t", 1, "--replay", "synthetic", "-o", "md")
    assert "| replay" in shown.stdout and shown.stdout.count("synthetic:rho=0.3:skew=0.35:prediction=0.87:seed=0") == 3


def test_the_control_refuses_a_replay(paths: dict[str, Path]) -> None:
    table, said = bench(paths["qwen3moe"], "--replay", "synthetic", "--control", "--control-repack", "off,on")
    assert said.count("the control chooses its own experts: a replay cannot be forced on it") == 1
    assert all((row["replay"] is None) == row["control"] for row in table)


def test_bad_replays_are_one_sentence(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a trace")
    t = made_up(2, 24, 4, 40, 3, mass=False)
    trace_file.write(tmp_path / "other", t.header, t.records)
    for source, expected in (
        (tmp_path / "text", "is not a trace"),
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path / "other", "uses 4 of 24 experts, and this one uses 4 of 32"),
        ("synthetic:rho=2", "at most 1"),
    ):
        assert expected in sentence(cacheroute("bench", "-m", paths["qwen3moe"], "-p", 8, "-n", 8, "--replay", source), 2)
