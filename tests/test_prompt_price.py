"""eval prompt and tune --prompt: what a prompt routing costs, and the smallest cover within a limit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.evals import prompt_tune, prompts
from cacheroute.evals.perplexity import log_probabilities
from cacheroute.evals.prompts import ORIGINAL, Lengths, PromptScore, PromptScorer, Request
from cacheroute.evals.results import ResultsFile
from cacheroute.files import MIB
from cacheroute.routing.prompt_routing import PromptRouting, parse
from support.cli import invoke

HALF = parse("keep:cover=0.5")
LENGTHS = Lengths(history=20, prompt=16, after=6)


# ---- figures ---------------------------------------------------------------------------------------


def made_up(
    place: int, kl: Sequence[float], nll: Sequence[float], *, read: int, agreed: int = 0, swapped: int = 0
) -> PromptScore:
    kl32, nll32 = (np.array(v, "<f4").tobytes() for v in (kl, nll))
    counted = {"reads": read, "read_bytes": read * MIB, "swapped": swapped, "examined": 40}
    return PromptScore(routing="", budget=8, eviction="lru", place=place, nll32=nll32, kl32=kl32, agreed=agreed, **counted)


def test_the_figures_by_hand() -> None:
    base = [made_up(i, [0, 0], [1, 2], read=20) for i in range(3)]
    kl = ([0.5, 0.25], [0, 0.25], [0.25, 0.25])
    scores = [made_up(i, kl[i], [1.5, 2 + i], read=10, agreed=1, swapped=4) for i in range(3)]
    found = prompts.summary(base, scores, n_layers=5)
    assert (found.n_places, found.n_tokens) == (3, 6)
    assert found.kl == 0.25 and found.kl_low is not None and found.kl_high is not None
    assert found.kl_low < 0.25 < found.kl_high
    assert found.kl_first == 0.25 and 0.25 < found.kl_p99 <= 0.5
    assert found.delta_nll == pytest.approx(4.5 / 6)
    assert (found.top1, found.swap_rate, found.reads_per_layer, found.read_mib, found.saved) == (0.5, 0.1, 2, 10, 0.5)


def test_places_do_not_overlap_and_are_spread() -> None:
    tokens = list(range(1000))
    found = prompts.places(tokens, Lengths(2, 5, 3), 4, bos=7777)
    assert [c.index for c in found] == [0, 1, 2, 3] and {len(c.tokens) for c in found} == {10}
    starts = [c.tokens[1] - 1 for c in found]
    assert starts == [0, 330, 660, 990]
    assert all(c.tokens[0] == 7777 and c.first == 7 for c in found)
    assert len(prompts.places(tokens, Lengths(0, 300, 100), 9, None)) == 2
    with pytest.raises(UsageError, match="has 1000 tokens, and one place needs 1001"):
        prompts.places(tokens, Lengths(1, 900, 100), 1, None)


# ---- live ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Llama:
    return Llama(str(tiny), budget="50%", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)


def scorer(llm: Llama, kept: ResultsFile | None = None) -> PromptScorer:
    tokens = np.random.default_rng(3).integers(3, 250, 4 * LENGTHS.total).tolist()
    return PromptScorer(llm, prompts.places(tokens, LENGTHS, 4, None), LENGTHS, "buffered", kept)


@pytest.mark.engine
def test_a_score_is_that_of_a_plain_run(llm: Llama) -> None:
    own = scorer(llm)
    found = own.score(Request(HALF, 8, "lru", 1))
    place, rows, counters = own.places[1], {}, {}
    for routing in (ORIGINAL, HALF):
        llm.configure(budget=8, eviction="lru", prompt_routing="original")
        llm.eval(place.tokens[:20])
        mark = llm.checkpoint(sequence=True)
        llm.configure(budget=8, eviction="lru", prompt_routing=routing)
        llm.return_to(mark)
        before = llm.stats().prefill
        llm.eval(place.tokens[20:36])
        counters[routing.name] = llm.stats().prefill - before
        rows[routing.name] = [log_probabilities(llm)]
        with llm.decoding():
            for token in place.tokens[36:41]:
                llm.eval([token])
                rows[routing.name].append(log_probabilities(llm))
        assert llm.stats().decode.swapped == 0
    lossless, lossy = (np.stack(rows[name]) for name in ("original", "keep"))
    np.testing.assert_allclose(found.nll, -lossy[np.arange(6), place.tokens[36:]], rtol=1e-6)
    np.testing.assert_allclose(found.kl, (np.exp(lossless) * (lossless - lossy)).sum(axis=1), rtol=1e-3, atol=1e-6)
    assert found.agreed == (lossless.argmax(axis=1) == lossy.argmax(axis=1)).sum()
    assert (found.reads, found.read_bytes) == (counters["keep"].reads, counters["keep"].read_bytes)
    assert found.swapped == counters["keep"].swapped > 0
    own.score(Request(ORIGINAL, 8, "lru", 1))
    assert own.score(Request(ORIGINAL, 8, "lru", 1)).reads == counters["original"].reads > found.reads


@pytest.mark.engine
def test_a_lossless_prompt_costs_nothing_and_the_order_does_not_matter(llm: Llama) -> None:
    requests = [Request(p, 8, "soft-lfu", i) for i in range(3) for p in (ORIGINAL, HALF)]
    first, second = scorer(llm), scorer(llm)
    ahead = [first.score(r) for r in requests]
    behind = [second.score(r) for r in reversed(requests)][::-1]
    assert ahead == behind
    assert all(not s.kl.any() and s.agreed == 6 for s in ahead[::2]) and all(s.kl.min() > 0 for s in ahead[1::2])


@pytest.mark.engine
def test_kept_scores_are_not_computed_again(llm: Llama, tmp_path: Path) -> None:
    request = Request(HALF, 8, "lru", 0)
    found = scorer(llm, ResultsFile(tmp_path / "kept", {"format": "t"})).score(request)
    again = scorer(llm, ResultsFile(tmp_path / "kept", {"format": "t"}))
    again.after = lambda score: pytest.fail("computed again")
    assert again.missing([request, request._replace(place=1)]) == 1
    assert again.score(request) == found


# ---- the search ------------------------------------------------------------------------------------


class CurveScorer:
    """Stands in for a model: a cover costs (1 - cover) / 10 nats of KL, and at the held-out places `unseen` times that."""

    def __init__(self, unseen: float = 1.0) -> None:
        self.unseen = unseen
        self.llm = SimpleNamespace(layout=SimpleNamespace(layers=[0]))
        self.asked: list[tuple[float, int]] = []

    def scores(self, routing: PromptRouting, budget: int, eviction: str, places: Sequence[int]) -> list[PromptScore]:
        self.asked += [(routing.cover, i) for i in places if routing.lossy]
        factor = [self.unseen if i >= 8 else 1 for i in places]
        return [made_up(i, [(1 - routing.cover) / 10 * f] * 4, [1] * 4, read=10) for i, f in zip(places, factor, strict=True)]


def searched(scorer: Any, max_kl: float) -> prompt_tune.Outcome:
    return prompt_tune.Search(scorer, 8, "lru", max_kl, range(8), range(8, 12)).run()


@pytest.mark.parametrize(("max_kl", "cover"), [(0.0201, 0.8), (0.0451, 0.55), (1.0, 0.1), (0.00201, 0.98)])
def test_it_finds_the_smallest_cover_within_the_limit(max_kl: float, cover: float) -> None:
    own = CurveScorer()
    outcome = searched(own, max_kl)
    assert outcome.chosen and outcome.chosen.cover == cover
    assert outcome.validation and outcome.validation.validates and outcome.validation.passed
    assert len(own.asked) == len(set(own.asked)), "a score is asked for once"
    assert len({c for c, _ in own.asked}) <= 6, "bisection"


def test_what_fails_on_unseen_text_gives_way_to_a_milder_one() -> None:
    outcome = searched(CurveScorer(unseen=1.5), 0.0301)
    assert outcome.chosen and outcome.chosen.cover == 0.8  # 0.7 fits, but costs 0.045 at the held-out places


def test_where_nothing_fits_nothing_is_chosen() -> None:
    outcome = searched(CurveScorer(), 0.001)
    assert outcome.chosen is None and outcome.validation is None and not any(t.passed for t in outcome.trials)


# ---- the commands ----------------------------------------------------------------------------------

SMALL = ("--prompt-tokens", 24, "--after", 4, "-t", 1, "--budget", "25%")


@pytest.mark.engine
@pytest.mark.usefixtures("own_cache")
def test_eval_prompt_pairs_with_the_lossless_prompt(tiny: Path, prose: Path) -> None:
    arguments = ("eval", "prompt", "-m", tiny, "-f", prose, *SMALL, "--history", 8, "--places", 3)
    result = invoke(*arguments, "--prompt-routing", "keep:cover=0.9,keep:cover=0.3", "-o", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [r["prompt_routing"] for r in rows] == ["original", "keep:cover=0.9", "keep:cover=0.3"]
    own, mild, harsh = rows
    assert own["kl"] == own["delta_nll"] == own["saved"] == own["swap_rate"] == 0 and own["top1"] == 1
    assert 0 < harsh["kl_low"] < harsh["kl"] < harsh["kl_high"]
    assert 0 < mild["swap_rate"] < harsh["swap_rate"] and own["read_mib"] > mild["read_mib"] > harsh["read_mib"]
    assert {(r["n_history"], r["n_prompt"], r["n_places"], r["n_tokens"]) for r in rows} == {(8, 24, 3, 12)}
    assert "few places (3)" in result.stderr
    again = invoke(*arguments, "--prompt-routing", "keep:cover=0.3")
    assert "6 of 6 scores are in the cache" in again.stderr and "\nkeep:cover=0.3 " in again.stdout
    _, cells, last = again.stdout.split("\n\n")
    assert cells.splitlines()[0].endswith("same top-1 %") and max(map(len, again.stdout.splitlines())) <= 80
    assert last.startswith("Fewest reads: keep:cover=0.3 (lossy) at 25% reads ")
    assert "| keep:cover=0.3 " in invoke(*arguments, "--prompt-routing", "keep:cover=0.3", "-o", "md").stdout


@pytest.mark.engine
@pytest.mark.usefixtures("own_cache")
def test_what_tune_finds_is_used(tiny: Path, prose: Path) -> None:
    missing = invoke("generate", "-m", tiny, "--raw", "-p", "a", "--prompt-routing", "tuned", "--budget", "25%")
    assert missing.exit_code == 2 and "No prompt routing is tuned for" in missing.stderr
    arguments = ("tune", "--prompt", "-m", tiny, "-f", prose, *SMALL, "--places", 6)
    result = invoke(*arguments, "--max-kl", 100, "-o", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["prompt_routing"] == "keep:cover=0.1" and report["trials"][-1]["part"] == "held out"
    assert "keep:cover=0.1 reads" in result.stderr and "use it with --prompt-routing tuned --budget 25%" in result.stderr
    answer = invoke(
        "generate", "-m", tiny, "--raw", "-p", "a b c d e f g", "-n", 1, "-c", 64, "--budget", "25%", "--prompt-routing", "tuned"
    )
    assert answer.exit_code == 0 and "keep:cover=0.1 is lossy" in answer.stderr, answer.output
    nothing = invoke(*arguments, "--max-kl", 0)
    assert nothing.exit_code == 1 and "Nothing fits 0 millinats: the mildest costs" in nothing.stderr


@pytest.mark.engine
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "prompt", "--io", "none"), "With --io none nothing is read"),
        (("eval", "prompt", "--prompt-routing", "drop"), "There is no prompt routing 'drop'"),
        (("eval", "prompt", "--prompt-routing", "tuned"), "here write the prompt routing out"),
        (("eval", "prompt", "--prompt-tokens", 10_000), "one place needs"),
        (("eval", "prompt", "--budget", "1%"), "give at least 4"),
        (("tune", "--prompt", "--places", 3), "3 places are too few to fit and to validate"),
        (("tune", "--prompt", "--workers", 2), "--workers is not an option with --prompt"),
    ],
)
def test_bad_input_is_one_sentence(tiny: Path, prose: Path, arguments: tuple[object, ...], message: str) -> None:
    command = arguments[: 1 + (arguments[0] in ("eval",))]
    rest = arguments[len(command) :]
    result = invoke(*command, "-m", tiny, "-f", prose, "-t", 1, "--prompt-tokens", 24, "--after", 4, *rest)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
