"""KL(original || routed): that of whole distributions, its interval, limits in it, and scores that were kept without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cacheroute import Llama
from cacheroute.evals import divergence, loading, reference, scorer, tune
from cacheroute.evals.perplexity import score
from cacheroute.evals.runner import Cell, Runner
from cacheroute.evals.text import Chunk
from cacheroute.routing import tuned
from cacheroute.routing.strategies import Routing, parse
from cacheroute.trace.simulate import Replay
from cacheroute.trace.trace_file import DECODE
from support import traces
from support.cli import invoke

Array = npt.NDArray[Any]
LOSSY = "pruning:k=1"
FEW = ("--chunk", 32, "--limit", 120, "--budget", "25%", "-t", 1)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose chunks differ."""
    path = tmp_path_factory.mktemp("words") / "t.txt"
    words = ["the", "cat", "that", "was", "on", "a", "mat", "with", "this", "and", "hat", "it", "had", "for", "while"]
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 600)))
    return path


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float32)


def whole_kl(log_p: Array, log_q: Array) -> float:
    """Nats, from all of both distributions."""
    p, q = log_p.astype(np.float64), log_q.astype(np.float64)
    return float((np.exp(p) * (p - q)).sum())


def pairs(n: int, n_vocab: int, spread: float, change: float) -> Iterator[tuple[Array, Array]]:
    rng = np.random.default_rng(1)
    for _ in range(n):
        logits = rng.normal(0, spread, n_vocab)
        yield log_softmax(logits), log_softmax(logits + rng.normal(0, change, n_vocab))


@pytest.mark.parametrize("change", [0.001, 0.3, 2.0])
def test_it_is_exact_where_all_tokens_are_kept(change: float) -> None:
    for p, q in pairs(20, 200, 0.5, change):
        kept = divergence.keep(p)
        assert kept.n_top == len(kept.tokens) == 200 and kept.likeliest == p.argmax()
        assert kept.kl(q) == pytest.approx(whole_kl(p, q), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_of_a_long_tail_the_mean_is_right(spread: float) -> None:
    for change in (0.1, 0.5):
        both = [(divergence.keep(p), p, q) for p, q in pairs(100, 20_000, spread, change)]
        found, whole = np.array([kept.kl(q) for kept, _, q in both]), np.array([whole_kl(p, q) for _, p, q in both])
        assert (found >= 0).all() and max(len(kept.tokens) for kept, *_ in both) < 2000
        assert found.mean() == pytest.approx(whole.mean(), rel=0.02)
        assert np.corrcoef(found, whole)[0, 1] > 0.8


def test_equal_distributions_have_none() -> None:
    for p, _ in pairs(20, 20_000, 3.0, 0.0):
        assert divergence.keep(p).kl(p) == 0
    certain = log_softmax(np.array([0.0, 90.0, 0.0]))
    assert divergence.keep(certain).kl(certain) == 0 and divergence.keep(certain).likeliest == 1


@pytest.mark.parametrize("n_chunks", [8, 40])
def test_the_interval_holds_the_truth_19_times_of_20(n_chunks: int) -> None:
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of_chunk = rng.gamma(20, 0.001, n_chunks)  # chunks differ, and tokens far more; the mean is 0.02
        found = divergence.summary([m * rng.gamma(0.5, 2, 50) for m in of_chunk], [45] * n_chunks)
        assert found.kl_low is not None and found.kl_high is not None and 0 <= found.kl_low <= found.kl <= found.kl_high
        held += found.kl_low <= 0.02 <= found.kl_high
    assert 0.9 <= held / 200 <= 0.99


def test_the_figures_of_llama_perplexity() -> None:
    kl = [np.linspace(0, 1, 50), np.linspace(0, 0.5, 51)]
    found = divergence.summary(kl, [40, 41])
    assert found.kl == pytest.approx(np.concatenate(kl).mean()) and found.kl_p99 == np.quantile(np.concatenate(kl), 0.99)
    assert (found.top1, found.top1_se) == (pytest.approx(81 / 101), pytest.approx(np.sqrt(81 / 101 * 20 / 101 / 100)))
    one = divergence.summary(kl[:1], [50])
    assert (one.kl_low, one.kl_high, one.top1, one.top1_se) == (None, None, 1.0, 0.0)


# ---- limits ----------------------------------------------------------------------------------------


class Fixed:
    """Stands in for a model: each chunk has a KL of its own, the same at all of its tokens, and a perplexity that falls."""

    def __init__(self, of_chunk: Callable[[int], float]) -> None:
        self.of_chunk = of_chunk

    def submit_next(self, requests: object) -> None:
        pass

    def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool) -> Cell:
        assert kl
        counts = {"selected": 10, "dropped": 0, "examined": 10, "misses": (1,), "swapped": (0,), "missed_bytes": 1}
        nll = np.full(10, 3.0 - 0.1 * routing.lossy, "<f4").tobytes()
        kl32 = np.full(10, self.of_chunk(chunk) * routing.lossy, "<f4").tobytes()
        own = {"routing": str(routing), "budget": budget, "eviction": eviction, "kl32": kl32, "same_top": 10}
        return Cell(chunk=chunk, nll32=nll, seconds=0.0, **counts, **own)  # type: ignore[arg-type]


def trial(model: Fixed, max_kl: float, *, validates: bool) -> tune.Trial:
    search = tune.Search(model, tune.Goal(8, "lru", None, max_kl=max_kl), range(20), range(20, 30))  # type: ignore[arg-type]
    return search.trial(
        Routing("cache-prior", {"lambda": 0.1}), search.held_out if validates else search.fit, validates=validates
    )


def test_a_limit_holds_where_the_upper_end_is_within_it() -> None:
    model = Fixed(lambda chunk: 0.01 if chunk % 2 else 0.03)
    high = trial(model, 1.0, validates=False).kl.kl_high
    assert high is not None and high > 0.02
    for limit, within, passed in (
        (high, "yes", True),
        (np.nextafter(high, 0), "perhaps", False),
        (0.0201, "perhaps", False),
        (0.0199, "no", False),
    ):
        found = trial(model, limit, validates=False)
        assert (found.within, found.passed) == (within, passed)


def test_unseen_text_may_leave_a_doubt_that_is_said() -> None:
    model = Fixed(lambda chunk: 0.01 if chunk % 2 else 0.03)
    for limit, within, passed in ((1.0, "yes", True), (0.0201, "perhaps", True), (0.0199, "no", False)):
        found = trial(model, limit, validates=True)
        assert (found.within, found.passed) == (within, passed)


def test_a_rung_is_left_early_by_its_kl() -> None:
    for kl, passed in ((0.001, True), (0.5, False)):
        model = Fixed(lambda chunk, kl=kl: kl * (1 + 0.01 * (chunk % 3)))  # type: ignore[misc]
        search = tune.Search(model, tune.Goal(8, "lru", None, max_kl=0.02), range(20), range(20, 30))  # type: ignore[arg-type]
        found = search.trial(Routing("cache-prior", {"lambda": 0.1}), search.fit, early=True)
        assert (found.passed, found.complete) == (passed, False)


# ---- a model ---------------------------------------------------------------------------------------


def text_of(tiny: Path, prose: Path) -> tuple[object, ...]:
    return ("-m", tiny, "-f", prose, *FEW)


def distributions(llm: Llama, chunk: Chunk, routing: str) -> list[Array]:
    rows: list[Array] = []
    llm.configure(budget=8, routing=routing, eviction="lru", io="none")
    for _ in score(llm, [chunk], watch=lambda row: rows.append(row.copy())):
        pass
    return rows


def test_a_cell_has_the_kl_of_whole_distributions(own_cache: Path, tiny: Path, prose: Path) -> None:
    with scorer.session(tiny, loading.Source(prose, chunk=32, limit=30), threads=1) as session:
        cell = session.cell(parse(LOSSY), 8, "lru", 0, kl=True)
        p, q = (distributions(session.llm, session.chunks[0], r) for r in ("original", LOSSY))
    expected = [whole_kl(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(cell.kl, expected, rtol=0.05, atol=1e-5)
    assert cell.same_top == sum(a.argmax() == b.argmax() for a, b in zip(p, q, strict=True))
    assert cell.kl.mean() == pytest.approx(np.mean(expected), rel=0.01) and cell.kl.mean() > 0.01


def test_original_is_scored_once(own_cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more: list[int] = []
    original = Runner._original

    def count(self: Runner, chunk: Chunk) -> Any:
        more.append(chunk.index)
        return original(self, chunk)

    monkeypatch.setattr(Runner, "_original", count)
    first = invoke("eval", "perplexity", *text_of(tiny, prose), "--routing", f"{LOSSY},pruning:k=2", "-o", "json")
    assert first.exit_code == 0 and not more, first.output
    rows = json.loads(first.stdout)
    assert [rows[0][name] for name in ("kl", "kl_low", "kl_high", "kl_p99", "top1", "top1_se")] == [0, 0, 0, 0, 1, 0]
    assert rows[1]["kl_low"] < rows[1]["kl"] < rows[1]["kl_high"] and rows[1]["kl"] > rows[2]["kl"] > 0
    assert rows[1]["top1"] < 1 and rows[1]["top1_se"] > 0 and rows[1]["kl_p99"] > rows[1]["kl"]
    kept = sorted((own_cache / "scores").glob("reference-*/*.npz"))
    assert len(kept) == rows[0]["n_chunks"]
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].unlink()
    assert invoke("eval", "perplexity", *text_of(tiny, prose), "--routing", "pruning:k=3").exit_code == 0
    assert len(more) == 2  # of the file that is damaged, and of the one that is missing
    assert sorted((own_cache / "scores").glob("reference-*/*.npz")) == kept


def test_carried_chunks_have_a_kl(own_cache: Path, tiny: Path, prose: Path) -> None:
    result = invoke("eval", "perplexity", *text_of(tiny, prose), "--routing", LOSSY, "--carry", "-o", "json")
    assert result.exit_code == 0, result.output
    first, lossy = json.loads(result.stdout)
    assert (first["kl"], first["top1"]) == (0, 1) and lossy["kl"] > 0.01


def test_what_is_kept_of_a_chunk_is_read_back(own_cache: Path) -> None:
    chunk = Chunk(0, tuple(range(9)), 4)
    positions = [divergence.keep(p) for p, _ in pairs(chunk.n_scored, 3000, 3.0, 0.0)]
    assert reference.read("f", chunk) is None
    reference.write("f", chunk, positions)
    for found, kept in zip(reference.read("f", chunk) or (), positions, strict=True):
        assert (found.likeliest, found.n_top) == (kept.likeliest, kept.n_top)
        np.testing.assert_array_equal(found.tokens, kept.tokens)
        np.testing.assert_array_equal(found.log_p, kept.log_p)
    assert reference.read("f", replace(chunk, first=3)) is reference.read("g", chunk) is None


# ---- what is kept without a KL --------------------------------------------------------------


def without_kl(own_cache: Path) -> None:
    """Takes the KL out of the kept scores, and what it is computed against."""
    (file,) = (own_cache / "scores").glob("*.jsonl")
    header, *lines = (json.loads(line) for line in file.read_text().splitlines())
    old = [{k: v for k, v in line.items() if k not in ("kl32", "same_top")} | {"kl": None} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in [header, *old]))
    for kept in (own_cache / "scores").glob("reference-*/*"):
        kept.unlink()


def test_scores_without_a_kl_are_completed(own_cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("eval", "perplexity", *text_of(tiny, prose), "--routing", LOSSY, "-o", "json")
    expected = json.loads(invoke(*arguments).stdout)
    without_kl(own_cache)
    only = json.loads(invoke(*arguments[:-4], "--routing", "original", "-o", "json").stdout)  # needs none: nothing is scored
    assert only == [{**expected[0], **dict.fromkeys(("kl", "kl_low", "kl_high", "kl_p99", "top1", "top1_se"))}]
    again = invoke(*arguments)
    total = sum(row["n_tokens"] for row in expected)
    assert f"{total} scored tokens are in the cache without a KL, and are scored again" in again.stderr
    assert [row | {"seconds": 0} for row in json.loads(again.stdout)] == [row | {"seconds": 0} for row in expected]
    told = invoke("tune", *text_of(tiny, prose), "--uniform")
    assert "without a KL" not in told.stderr
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("computed"))
    third = invoke(*arguments)
    assert third.exit_code == 0 and "without a KL" not in third.stderr, third.output


def test_tune_says_what_lacks_a_kl(own_cache: Path, tiny: Path, prose: Path) -> None:
    assert invoke("eval", "perplexity", *text_of(tiny, prose), "--routing", LOSSY).exit_code == 0
    without_kl(own_cache)
    told = invoke("tune", *text_of(tiny, prose), "--uniform", "--max-kl", 5)
    assert told.exit_code == 0 and "16 of them are without a KL; those that are wanted are scored again" in told.stderr


def test_rows_of_frontier_without_a_kl_are_added_again(own_cache: Path, tiny: Path, prose: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    arguments = ("frontier", file, *text_of(tiny, prose), "--routing", LOSSY, "-o", "json")
    expected = json.loads(invoke(*arguments).stdout)
    assert expected[0]["kl"] == 0 and expected[1]["kl_high"] > expected[1]["kl"] > 0
    header, *rows = (json.loads(line) for line in file.read_text().splitlines())
    old = {k: v for k, v in rows[1].items() if not k.startswith(("kl", "top1"))}
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, rows[0], old)))
    result = invoke(*arguments)
    assert "1 of its rows are without a KL" in result.stderr and json.loads(result.stdout) == expected
    assert len(file.read_text().splitlines()) == 4  # what was there stays
    third = invoke(*arguments)
    assert "has 2 of 2 rows already" in third.stderr and json.loads(third.stdout) == expected
    assert invoke("plot", file, "-o", tmp_path / "f.svg").exit_code == 0


# ---- tune ------------------------------------------------------------------------------------------


def test_tune_keeps_within_a_kl(own_cache: Path, tiny: Path, prose: Path) -> None:
    arguments = ("tune", *text_of(tiny, prose), "--limit", 300, "--uniform", "--max-kl", 0.5)
    result = invoke(*arguments, "-o", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["max_ppl_increase"], report["max_kl"]) == (None, 0.5)
    fitted = [t for t in report["trials"] if t["part"] == "fit" and t["routing"] == report["routing"]]
    assert fitted and all(t["kl_high"] <= 0.5 and t["within"] == "yes" for t in fitted)
    assert any(t["kl_high"] > 0.5 for t in report["trials"]) or report["routing"] == "cache-prior:lambda=1"
    notes = tuned.load(Path(report["profile"])).notes
    assert notes["max_kl"] == 0.5 and notes["max_ppl_increase"] is None
    assert notes["held_out_kl"]["kl"] == report["trials"][-1]["kl"]
    again = invoke(*arguments)
    assert "this replaces the routing tuned for 500 millinats" in again.stderr
    Path(report["profile"]).write_text("{}")
    last = invoke(*arguments)
    assert last.exit_code == 0 and "this replaces a file that cannot be read" in last.stderr
    assert tuned.load(Path(report["profile"])).notes["max_kl"] == 0.5
    assert max(len(line) for line in again.stdout.splitlines()[2:-3]) <= 80 and "Mean KLD [95%]" in again.stdout
    assert "; within 500 millinats of KL: " in again.stdout
    assert "within 500 millinats of KL" in invoke(*arguments, "--wide").stdout


def test_too_small_a_kl_is_one_sentence(own_cache: Path, tiny: Path, prose: Path) -> None:
    result = invoke("tune", *text_of(tiny, prose), "--uniform", "--strategy", "pruning", "--max-kl", 1e-6)
    assert result.exit_code == 1
    assert "Nothing fits 0.001 millinats: pruning:k=" in result.stderr and " has a KL of " in result.stderr


def test_one_limit_at_a_time(own_cache: Path, tiny: Path, prose: Path) -> None:
    result = invoke("tune", *text_of(tiny, prose), "--max-kl", 0.5, "--max-ppl-increase", "1%")
    assert result.exit_code == 2 and "Give --max-ppl-increase or --max-kl, not both." in result.stderr


# ---- how flat a router is --------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [False, True])
def test_the_mass_past_k_is_of_the_tokens_that_were_decoded(mass: bool) -> None:
    trace = traces.fed(mass)
    own = trace.records[(trace.records["layer"] == 1) & (trace.records["flags"] & DECODE > 0)]
    shares = []
    for record in own:
        z = record["z"].astype(float)
        given = record["mass"].astype(float) if mass else np.exp(z)
        best = np.argsort(-z, kind="stable")[: trace.header.n_used]
        shares.append(1 - given[best].sum() / given.sum())
    assert Replay(trace).mass_past_k()[1] == pytest.approx(np.mean(shares)) and 0 < np.mean(shares) < 1


def test_tune_measures_how_flat_a_router_is(own_cache: Path, tiny: Path, prose: Path) -> None:
    before = json.loads(invoke("inspect", tiny, "-o", "json").stdout)
    assert before["mass_past_k"] is None and "rank" not in invoke("inspect", tiny).stdout
    result = invoke("tune", *text_of(tiny, prose), "--price-tokens", 30, "--max-kl", 5, "-o", "json")
    assert result.exit_code == 0, result.output
    past = json.loads(result.stdout)["mass_past_k"]
    mean = sum(past) / len(past)
    assert len(past) == 2 and ("the router is flat: experts past rank 4 have" in result.stderr) == (mean > 0.5)
    assert json.loads(invoke("inspect", tiny, "-o", "json").stdout)["mass_past_k"] == pytest.approx(mean)
    tuned.path(tiny, 16).write_text("damaged")
    assert f"router            {100 * mean:.0f}% of its mass past rank 4" in invoke("inspect", tiny).stdout
