"""tune: finds the rung that a known cost curve has, resumes, and writes a routing that generate and bench use."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import quality_table
from hypothesis import given
from hypothesis import strategies as st

from cacheroute.cli import tune_report
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import loading, paired, pricing, tune
from cacheroute.evals.processes import pool
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Cell, Job, Request, Runner, routing_key
from cacheroute.evals.scorer import Scorer
from cacheroute.evals.text import Chunk
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing, parse
from support import interrupting
from support.cli import invoke

Array = npt.NDArray[np.float64]

N = 100  # tokens of a chunk
POLICY = """
class LastFour:
    def __init__(self, n_layers, n_expert, n_used):
        self.calls = 0
    def reset(self):
        self.calls = 0
    def choose(self, layer, z, mass, resident):
        self.calls += 1
        return list(range(28, 32)) if self.calls % 3 else list(z.argsort()[::-1][:4])
"""


class CurveScorer:
    """Stands in for a model: lambda costs `slope` x lambda nats per token, with noise between chunks, and saves reads."""

    def __init__(self, slope: float, noise: float, seed: int = 0) -> None:
        self.slope, self.noise, self.seed, self.asked = slope, noise, seed, set[tuple[str, int]]()

    def submit_next(self, requests: list[Request]) -> None:
        pass

    def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool = False) -> Cell:
        self.asked.add((str(routing), chunk))
        x = routing.parameters.get("lambda", 0.0)
        rng = np.random.default_rng([self.seed, chunk])
        nll = rng.normal(3, 0.5) + (self.slope + rng.normal(0, self.noise)) * x
        return Cell(
            chunk=chunk,
            nll32=np.full(N, nll, "<f4").tobytes(),
            selected=N,
            dropped=0,
            examined=N,
            misses=(round(N * (1 - x)),),
            swapped=(0,),
            missed_bytes=round(2**20 * (1 - x)),
            seconds=0.0,
            routing=str(routing),
            budget=budget,
            eviction=eviction,
            kl32=np.full(N, max(self.slope + rng.normal(0, self.noise), 0) * x / 2, "<f4").tobytes(),
            same_top=N,
        )


def search(
    scorer: CurveScorer, limit: float | None, n_chunks: int = 60, seed: int = 0, max_kl: float | None = None
) -> tune.Search:
    goal = tune.Goal(16, "lru", limit, seed=seed, max_kl=max_kl)
    return tune.Search(scorer, goal, *tune.split(n_chunks, seed))  # type: ignore[arg-type]


RUNGS = [Routing("cache-prior", {"lambda": x}) for x in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]


def chosen(outcome: tune.Outcome) -> float:
    assert outcome.chosen and outcome.validation
    return outcome.chosen.routing.parameters["lambda"]


def test_without_noise_it_chooses_the_last_rung_within_the_limit() -> None:
    for start in (None, 0, 10):
        outcome = search(CurveScorer(slope=0.05, noise=0), 1.1).run(RUNGS, start)  # 0.2 costs 1.005%, 0.3 1.5%
        assert chosen(outcome) == 0.2
        assert outcome.validation and outcome.validation.difference.ppl_increase == pytest.approx(1.005, abs=0.001)


def test_noise_makes_it_careful_and_unseen_text_agrees() -> None:
    """The upper end of the interval has to fit, so the choice is below the true limit, and holds elsewhere."""
    within = found = 0
    for seed in range(40):
        scorer = CurveScorer(slope=0.05, noise=0.1, seed=seed)
        outcome = search(scorer, 1.0, seed=seed).run(RUNGS)
        if outcome.chosen:
            found += 1
            within += paired.percent(0.05 * chosen(outcome)) <= 1.0
    assert found >= 30 and within >= found - 2


def test_clear_rungs_are_left_early() -> None:
    scorer = CurveScorer(slope=0.05, noise=0.01)
    outcome = search(scorer, 1.0, n_chunks=120).run(RUNGS)
    assert chosen(outcome) == 0.15
    asked = {x: sum(1 for r, _ in scorer.asked if r == f"cache-prior:lambda={x:g}") for x in (1.0, 0.8, 0.6, 0.4, 0.3, 0.15)}
    assert asked[0.15] == 120  # the choice is scored on everything
    assert all(n <= 12 for x, n in asked.items() if x >= 0.3)
    assert [t.complete for t in outcome.trials][-2:] == [True, True] and not all(t.complete for t in outcome.trials)


def test_what_saves_nothing_is_not_chosen() -> None:
    scorer = CurveScorer(slope=0.05, noise=0)
    scorer.cell = lambda *a, of=scorer.cell, **k: replace(of(*a, **k), missed_bytes=2**20)  # type: ignore[method-assign]
    outcome = search(scorer, 1.1).run(RUNGS).if_it_saves()
    assert outcome.chosen is None and outcome.validation is None
    said = tune_report.why_not(outcome, tune.Goal(16, "lru", 1.1))
    assert said.startswith("Nothing is saved: on unseen text cache-prior") and said.endswith("at this budget.")


def test_nothing_fits() -> None:
    outcome = search(CurveScorer(slope=5, noise=0), 1.0).run(RUNGS)
    assert outcome.chosen is None and outcome.validation is None and outcome.trials
    assert search(CurveScorer(slope=5, noise=0), 1.0).run([]).chosen is None


def test_the_choice_is_validated_on_the_held_out_part() -> None:
    fit, _ = tune.split(60, 0)

    class Kinder(CurveScorer):  # to the chunks that fit
        def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool = False) -> Cell:
            self.slope = 0.05 if chunk in fit else 0.1
            return super().cell(routing, budget, eviction, chunk, kl=kl)

    outcome = search(Kinder(slope=0, noise=0), 1.1).run(RUNGS)
    assert chosen(outcome) == 0.1
    assert [t.passed for t in outcome.trials if t.validates] == [False, False, True]


def test_the_split_is_disjoint_and_seeded() -> None:
    fit, held_out = tune.split(31, 1)
    assert sorted(fit + held_out) == list(range(31)) and len(held_out) == 10
    assert tune.split(31, 1) == (fit, held_out) != tune.split(31, 2)


@pytest.mark.parametrize("strategy", [name for name in strategies.STRATEGIES if name != "original"])
def test_every_ladder_fits_the_model(strategy: str) -> None:
    layout: Any = SimpleNamespace(n_expert=32, n_used=8, predictable=True)
    rungs = tune.ladder(strategy, layout)
    assert len(rungs) >= 7
    for rung in rungs:
        rung.check(32, 8)
    assert tune.ladder("original", layout) == []


def test_bytes_are_compared_at_the_same_perplexity() -> None:
    curve_nll, curve_reads = [[10.0], [11.0], [12.0]], [[100.0], [60.0], [40.0]]
    for nll, reads, ratio in ((11.0, 45.0, 0.75), (11.5, 25.0, 0.5), (9.0, 80.0, 0.8)):
        found = quality_table.matched_ratio(np.array([*curve_nll, [nll]]), np.array([*curve_reads, [reads]]), np.array([0, 0]))
        assert found == pytest.approx(ratio)


# ---- prices ----------------------------------------------------------------------------------------


def alike(misses: Array, swapped: Array, price: Array, expert_mib: Array, groups: tuple[tuple[int, ...], ...]) -> pricing.Prices:
    """Prices where every layer must hold 16 experts."""
    return pricing.Prices(misses[..., None], swapped[..., None], price, expert_mib, expert_mib, groups, (16,), 16)


def test_a_layer_that_loses_more_gets_less_lambda() -> None:
    n = 4
    misses = np.tile([3.0, 2.5, 2.0, 1.5, 1.0, 0.8], (n, 1))
    swapped = np.tile([0.0, 0.5, 1.0, 1.6, 2.4, 3.0], (n, 1))
    price = np.array([[0.001, 0.001], [0.01, 0.01]])
    rungs = pricing.ladder(alike(misses, swapped, price, np.full(n, 0.5), ((0, 1), (2, 3))))
    assert 8 <= len(rungs) <= 32
    for rung in rungs:
        assert rung.lambdas[0] == rung.lambdas[1] >= rung.lambdas[2] == rung.lambdas[3]
        rung.routing().check(32, 8)
    assert any(r.lambdas[0] > r.lambdas[2] for r in rungs)
    for a, b in itertools.pairwise(rungs):
        assert a.cost < b.cost and a.missed_mib > b.missed_mib


def test_equal_layers_get_equal_lambdas() -> None:
    misses = np.tile([3.0, 2.5, 2.0, 1.5, 1.0, 0.8], (3, 1))
    swapped = np.tile([0.0, 0.5, 1.0, 1.6, 2.4, 3.0], (3, 1))
    rungs = pricing.ladder(alike(misses, swapped, np.full((3, 2), 0.01), np.ones(3), ((0,), (1,), (2,))))
    assert all(len(set(r.lambdas)) == 1 for r in rungs)


def test_a_budget_of_all_experts_leaves_nothing_to_price() -> None:
    nothing = alike(np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 2)), np.ones(2), ((0,), (1,)))
    assert pricing.ladder(nothing) == []


def test_a_layer_that_loses_more_gets_more_experts() -> None:
    capacities = (8, 12, 16, 20, 24)
    by_lambda, by_capacity = np.array([1.0, 0.8, 0.6, 0.4, 0.3, 0.25]), np.array([4.0, 2.6, 1.7, 1.0, 0.5])
    misses = np.tile(np.outer(by_lambda, by_capacity), (4, 1, 1))
    swapped = np.tile(np.outer([0.0, 0.5, 1.0, 1.6, 2.4, 3.0], [1.0, 0.8, 0.6, 0.4, 0.2]), (4, 1, 1))
    price = np.array([[0.001, 0.001], [0.02, 0.02]])
    sizes = np.array([0.5, 1.0, 0.5, 1.0])
    rungs = pricing.ladder(pricing.Prices(misses, swapped, price, sizes, sizes, ((0, 1), (2, 3)), capacities, 16))
    assert len(rungs) >= 8
    for rung in rungs:
        assert np.dot(rung.experts, sizes) <= 16 * sizes.sum()
        assert rung.routing().layers[0].parameters == {"lambda": rung.lambdas[0], "experts": rung.experts[0]}
    assert any(r.experts[2] > r.experts[0] and r.experts[3] > r.experts[1] and r.lambdas[0] > r.lambdas[2] for r in rungs)


@given(seed=st.integers(0, 2**32 - 1), room=st.floats(8, 30))
def test_memory_goes_where_it_is_worth_most(seed: int, room: float) -> None:
    rng = np.random.default_rng(seed)
    counts = np.array([2, 3, 5, 6])
    sizes = np.outer(rng.choice([1.0, 1.5], 3), counts)
    priced = -np.cumsum(rng.random((3, 4)), axis=1)
    room = max(room, sizes[:, 0].sum())
    held = pricing._share_out(priced, sizes, room)
    rows = np.arange(3)
    assert sizes[rows, held].sum() <= room + 1e-6
    every = list(itertools.product(range(4), repeat=3))
    best = min(priced[rows, pick].sum() for pick in every if sizes[rows, pick].sum() <= room)
    # one price for all memory leaves at most what one layer can gain
    assert priced[rows, held].sum() <= best + (priced[:, 0] - priced[:, -1]).max()
    for layer, c in itertools.product(rows, range(4)):
        other = held.copy()
        other[layer] = c
        assert sizes[rows, other].sum() > room + 1e-6 or priced[rows, other].sum() >= priced[rows, held].sum()


def test_capacities_reach_from_k_to_e_and_have_the_budget() -> None:
    for n_expert, n_used, budget in ((32, 8, 16), (128, 8, 77), (8, 2, 3), (60, 4, 30)):
        layout = ExpertLayout((), "", n_expert, n_used, (), "")
        found = pricing.capacities(budget, layout)
        assert (found[0], found[-1]) == (n_used, n_expert) and budget in found and len(found) <= 26


def test_groups_cover_all_layers() -> None:
    assert pricing.groups(5, 2) == ((0, 1, 2), (3, 4))
    assert pricing.groups(2, 15) == ((0,), (1,))


@pytest.fixture
def scorer(tiny: Path, prose: Path, tmp_path: Path) -> Iterator[Scorer]:
    llm = loading.load(tiny, 32, 1)
    chunks = loading.chunks(llm, loading.Source(prose, chunk=32))
    yield Scorer(llm, chunks, Job(tiny, "prose", 32, 1, "none"), ResultsFile(tmp_path / "r.jsonl", {"a": 1}))
    llm.close()


def test_measured_prices(scorer: Scorer) -> None:
    prices = pricing.measure(scorer, 8, "score", [0, 1], n_groups=2)
    held = len(prices.capacities)
    assert prices.misses.shape == prices.swapped.shape == (2, 6, held) and prices.price.shape == (2, 2)
    own = prices.capacities.index(8)
    assert (prices.misses[:, 0, own] > prices.misses[:, -1, own]).all() and (prices.swapped[:, 0] == 0).all()
    assert (prices.misses[:, :, 0] > prices.misses[:, :, -1]).all() and held > 4
    base = [scorer.cell(Routing("original"), 8, "score", i) for i in (0, 1)]  # live misses of `original` are those of a replay
    assert prices.misses[:, 0, own] * sum(c.n for c in base) == pytest.approx(np.sum([c.misses for c in base], axis=0))
    assert (prices.price > 0).all()
    assert pricing.ladder(prices)


def test_kl_of_original_is_nothing(scorer: Scorer) -> None:
    for budget in (8, 16):  # the first is what the second is compared with
        cell = scorer.cell(Routing("original"), budget, "lru", 0, kl=True)
        assert not cell.kl.any() and len(cell.kl) == cell.same_top == cell.n
    lossy = scorer.cell(Routing("pruning", {"k": 1}), 8, "lru", 0, kl=True)
    assert lossy.kl.sum() > 0.1 and lossy.same_top is not None and lossy.same_top < lossy.n


def test_a_pool_scores_what_one_process_scores(scorer: Scorer) -> None:
    requests = [Request(r, 8, "lru", i, kl) for i in (0, 1) for r in (Routing("original"), RUNGS[6]) for kl in (False, True)]
    alone = [scorer.cell(*request[:4], kl=request.kl) for request in requests]
    with pool(2) as executor:
        pooled = Scorer(scorer.llm, scorer.chunks, scorer.job, executor=executor)
        pooled.submit_next([Request(RUNGS[7], 8, "lru", i) for i in (0, 1)])  # submitted and never used
        pooled.submit_next(requests[:-1])
        for request, cell in zip(requests, alone, strict=True):
            assert replace(pooled.cell(*request[:4], kl=request.kl), seconds=cell.seconds) == cell


def test_a_process_that_ends_is_one_sentence(scorer: Scorer) -> None:
    with pool(1) as executor:
        pooled = Scorer(scorer.llm, scorer.chunks, scorer.job, executor=executor)
        executor.submit(os._exit, 1)
        with pytest.raises(CacherouteError, match="A process that scores has ended"):
            pooled.cell(RUNGS[0], 8, "lru", 0)


def test_a_score_is_computed_once(scorer: Scorer, tmp_path: Path) -> None:
    cell = scorer.cell(RUNGS[5], 8, "lru", 1)
    path = tmp_path / "r.jsonl"
    again = Scorer(scorer.llm, scorer.chunks, scorer.job, ResultsFile(path, {"a": 1}))
    again.after = lambda cell: pytest.fail("computed")
    assert again.cell(RUNGS[5], 8, "lru", 1) == cell
    path.write_bytes(path.read_bytes()[:-5])  # cut short while it was written
    assert ResultsFile(path, {"a": 1}).lines == []
    with pytest.raises(UsageError, match=r"holds results of another a \(1, now 2\)"):
        ResultsFile(path, {"a": 2})
    path.write_text("something else\n")
    with pytest.raises(UsageError, match="not a results file"):
        ResultsFile(path, {"a": 1})


def test_a_speed_is_of_its_own_conditions(scorer: Scorer, tmp_path: Path) -> None:
    scorer.cell(RUNGS[5], 8, "lru", 0, kl=True)
    untimed = scorer.cell(RUNGS[5], 8, "lru", 0)
    computed: list[str] = []
    for timing in ("buffered, 1 threads", "buffered, 2 threads", "buffered, 1 threads", ""):
        results = ResultsFile(tmp_path / "r.jsonl", {"a": 1})
        session = Scorer(scorer.llm, scorer.chunks, replace(scorer.job, io="buffered", timing=timing), results)
        session.after = lambda cell: computed.append(cell.timing)
        cell = session.cell(RUNGS[5], 8, "lru", 0)
        assert (cell.nll32, cell.misses) == (untimed.nll32, untimed.misses) and cell.timing == (timing or untimed.timing)
    assert computed == ["buffered, 1 threads", "buffered, 2 threads"]
    assert session.cell(RUNGS[5], 8, "lru", 0, kl=True).kl32  # still kept


def test_a_policy_in_python_is_not_kept(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may change under the same name, and no checkpoint has its state."""
    (tmp_path / "own_policy.py").write_text(POLICY)
    monkeypatch.syspath_prepend(str(tmp_path))
    routing = parse("python:own_policy:LastFour")
    cells = [scorer.cell(routing, 8, "lru", i) for i in (0, 0, 1)]
    assert cells[0] == cells[1] and cells[0].kl32 is None
    fresh = Scorer(scorer.llm, scorer.chunks, scorer.job)
    assert replace(fresh.cell(routing, 8, "lru", 1), seconds=cells[2].seconds) == cells[2]
    assert ResultsFile(tmp_path / "r.jsonl", {"a": 1}).lines == []


def test_chunks_are_traced_and_priced_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    trace = Runner.trace

    def count(self: Runner, chunks: Sequence[Chunk]) -> Any:
        traced.extend(chunk.index for chunk in chunks)
        return trace(self, chunks)

    monkeypatch.setattr(Runner, "trace", count)
    first = pricing.candidates(scorer, 8, "lru", [0, 1], 1)
    assert pricing.candidates(scorer, 8, "lru", [0, 1], 1) is first
    pricing.candidates(scorer, 16, "soft-lfu", [0, 1], 1)  # another budget and eviction, the same trace
    assert traced == [0, 1]


def test_a_routing_is_known_by_its_values() -> None:
    one, two = (Routing("cache-prior", layers=(Routing("cache-prior", {"lambda": x}),), text="tuned") for x in (0.1, 0.2))
    assert str(one) == str(two) and routing_key(one) != routing_key(two)
    close = [Routing("cache-prior", {"lambda": x}) for x in (0.12345671, 0.12345674)]
    assert str(close[0]) == str(close[1]) and routing_key(close[0]) != routing_key(close[1])
    assert routing_key(Routing("max-rank", {"m": 6.0, "j": 1.0})) == routing_key(Routing("max-rank", {"j": 1.0, "m": 6.0}))


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path))
    return tmp_path


def settings(tiny: Path, prose: Path, *more: object) -> tuple[object, ...]:
    return ("tune", "-m", tiny, "-f", prose, "--chunk", 32, "--limit", 300, "-t", 1, "--budget", "25%", "-o", "json", *more)


@pytest.mark.parametrize("form", [("--price-tokens", 30), ("--uniform",)])
def test_tuned_is_picked_up(cache: Path, tiny: Path, prose: Path, form: tuple[object, ...]) -> None:
    missing = invoke("generate", "-m", tiny, "-p", "the", "-n", 1, "--routing", "tuned", "--budget", "25%", "--raw")
    assert missing.exit_code == 2 and f"run `cacheroute tune -m {tiny} --budget 25%` first" in missing.stderr
    result = invoke(*settings(tiny, prose, "--max-ppl-increase", "40%", *form))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["parameters"]) == (1 if "--uniform" in form else 2)
    assert report["profile"] == str(tuned.path(tiny, 8))
    last = report["trials"][-1]
    assert last["part"] == "held out" and last["ppl_increase"] <= 40
    assert 0 < last["missed_mib_per_token"] < last["original_missed_mib_per_token"]
    saved = tuned.load(Path(report["profile"]))
    assert saved.notes["eviction"] == DEFAULT and len(saved.parameters) == 2
    used = invoke("generate", "-m", tiny, "-p", "the", "-n", 3, "--routing", "tuned", "--budget", "25%", "--raw", "-o", "json")
    assert used.exit_code == 0, used.output
    assert "tuned:" in used.stderr
    few = ("-p", 8, "-n", 4, "-r", 1, "-t", 1, "-o", "json")
    bench = invoke("bench", "-m", tiny, *few, "--budget", "25%", "--routing", "original,tuned")
    assert bench.exit_code == 0, bench.output
    assert [(r["eviction"], r["routing"].partition(":")[0]) for r in json.loads(bench.stdout) if r["n_gen"]] == [
        ("lru", "original"),
        (DEFAULT, "original"),
        (DEFAULT, "tuned"),
    ]
    other_budget = invoke("generate", "-m", tiny, "-p", "the", "-n", 1, "--routing", "tuned", "--budget", "50%", "--raw")
    assert other_budget.exit_code == 2 and "Nothing is tuned for tiny qwen3moe" in other_budget.stderr


def test_an_interrupted_search_resumes(cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(invoke(*settings(tiny, prose, "--uniform", "--max-ppl-increase", "40")).stdout)
    monkeypatch.setenv("CACHEROUTE_CACHE", str(cache / "other"))
    interrupting.at_score(monkeypatch, 20)
    stopped = invoke(*settings(tiny, prose, "--uniform", "--max-ppl-increase", "40"))
    assert stopped.exit_code == 130 and "run the same command to resume" in stopped.stderr
    resumed = invoke(*settings(tiny, prose, "--uniform", "--max-ppl-increase", "40"))
    assert "19 scores of earlier runs are used again" in resumed.stderr
    assert json.loads(resumed.stdout) | {"profile": ""} == whole | {"profile": ""}


def test_nothing_fits_is_reported(cache: Path, tiny: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one = Runner.run

    def worse(self: Runner, request: Request, chunk: Chunk) -> Cell:  # a random model may gain by a loss
        cell = run_one(self, request, chunk)
        return replace(cell, nll32=(cell.nll + request.routing.lossy).astype("<f4").tobytes())

    monkeypatch.setattr(Runner, "run", worse)
    result = invoke(*settings(tiny, prose, "--uniform", "--strategy", "max-rank", "--limit", 90, "--max-ppl-increase", "0.01%"))
    assert result.exit_code == 1
    assert "Nothing fits 0.01%: max-rank:m=" in result.stderr and json.loads(result.stdout)["profile"] is None
    assert not (cache / "tuned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-ppl-increase", "much"), "'much' is not a limit"),
        (("--max-ppl-increase", "0%"), "is not a limit"),
        (("--uniform", "--strategy", "original"), "'original' has nothing to tune"),
        (("--strategy", "pruning"), "with --uniform only"),
        (("--limit", 20), "too few to fit and to validate"),
        (("--budget", "3"), "give at least 4"),
        (("-o", "xml"), "There is no output"),
    ],
)
def test_bad_input_is_one_sentence(cache: Path, tiny: Path, prose: Path, arguments: tuple[object, ...], message: str) -> None:
    result = invoke(*settings(tiny, prose), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
