"""The study of prefetch: its cache is that of the C++ router, and what is read ahead is counted as it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import study_prefetch as study

from cacheroute.errors import UsageError
from cacheroute.routing.strategies import parse
from cacheroute.trace import forced_scores, simulate, trace_file
from cacheroute.trace.trace_file import Records
from support.traces import header

N_LAYERS, E, K, C, N_TOKENS = 3, 24, 4, 12, 120


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sequences of made-up tokens."""
    path, h = tmp_path_factory.mktemp("study") / "t", header(N_LAYERS, E, K)
    scores = forced_scores.bind(forced_scores.parse("synthetic:rho=0.6"), h.layout, 0, N_TOKENS)
    records: Records = np.zeros(N_TOKENS * N_LAYERS, trace_file.record_dtype(E, K, mass=False))
    token, records["layer"] = np.divmod(np.arange(len(records)), N_LAYERS)
    records["sequence"], records["token"] = np.divmod(token, 70)
    records["flags"] = trace_file.DECODE | trace_file.SOFTMAX_MASS
    records["z"] = np.stack(scores.z, axis=1).reshape(-1, E)
    trace_file.write(path, h, records)
    return path


def judged(path: Path) -> study.Scores:
    s = study.read(path)[1]
    return study.Scores(s.z, s.starts, np.ones_like(s.judged), s.n_used)


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("capacity", [K, C, E])
def test_the_cache_is_that_of_the_router(path: Path, capacity: int, lambda_: float) -> None:
    expected = simulate.Replay(trace_file.read(path)).run(
        simulate.Arm(str(capacity), parse(f"cache-prior:lambda={lambda_}" if lambda_ else "original"), "lru")
    )[0]
    got = study.run(judged(path), capacity, lambda_)
    assert got.misses == expected.misses == got.demand and got.slots == K * got.layers == K * N_TOKENS * N_LAYERS
    assert got.seconds(2.0, 3.0) == pytest.approx(2 + 3 * expected.misses / (N_TOKENS * N_LAYERS))
    assert got.lost / got.slots == pytest.approx(expected.lost_mass)


def test_who_knows_everything_leaves_nothing_to_read(path: Path) -> None:
    s = judged(path)
    plain, oracle = study.run(s, C, 0.0), study.run(s, C, 0.0, s.z, ahead=K)
    assert oracle.misses == plain.misses == oracle.useful and oracle.demand == 0 and oracle.hit_ahead == plain.misses
    half = study.run(s, C, 0.0, s.z, ahead=0.5)  # half an expert a window: the likeliest missing one, half read
    assert 0 < half.useful == plain.misses - half.demand < plain.misses
    assert half.ahead <= 0.5 * N_TOKENS * N_LAYERS and half.useful == 0.5 * half.hit_ahead
    assert half.in_the_way == 0 and oracle.in_the_way == 0
    late = study.run(s, C, 0.0, -s.z, ahead=0.5)  # the least likely one is half read where any of the likely ones is missing
    assert late.in_the_way == 0.5 * half.hit_ahead and late.demand == plain.misses
    wrong = study.run(s, C, 0.0, -s.z, ahead=2)
    assert wrong.demand > 0.95 * plain.misses and wrong.misses == plain.misses
    nothing = study.run(s, C, 0.0, np.full_like(s.z, -np.inf), ahead=K)
    assert nothing == plain


def test_an_expert_in_flight_is_preferred(path: Path) -> None:
    s = judged(path)
    plain, ahead = study.run(s, C, 0.3), study.run(s, C, 0.3, s.z, ahead=1)
    assert ahead.demand < plain.demand


def test_admission_reads_what_was_displaced(path: Path) -> None:
    s = judged(path)
    plain, admitted = study.run(s, C, 0.3), study.run(s, C, 0.3, admit=1)
    assert admitted.ahead > 0 and admitted.lost < plain.lost
    assert study.run(s, C, 0.0, admit=1) == study.run(s, C, 0.0), "nothing is displaced"
    assert study.run(s, K, 0.3, admit=1) == study.run(s, K, 0.3), "no room"


def test_predictors_guess_no_first_layer_and_the_oracle_is_best(path: Path) -> None:
    s = study.read(path)[1]
    found = dict(study.predictors(s, s.z))
    useful = {name: study.run(s, C, 0.0, guess, ahead=2).useful for name, guess in found.items()}
    assert all(np.isneginf(guess[:, 0]).all() and np.isfinite(guess[:, 1:]).all() for guess in found.values())
    assert len(found) == 9 and max(useful, key=useful.__getitem__) == "(oracle: the scores themselves)"


def test_a_trace_with_a_prompt_is_refused(path: Path, tmp_path: Path) -> None:
    t = trace_file.read(path)
    records = t.records.copy()
    records["flags"][:5] = trace_file.SOFTMAX_MASS
    trace_file.write(tmp_path / "t", t.header, records)
    with pytest.raises(UsageError, match="has a prompt; trace a text token by token"):
        study.read(tmp_path / "t")
