"""Tasks: log-likelihoods are our own scorer's, prefix reuse changes no bit, and lm-evaluation-harness runs over the engine.

What asks the model is tested without lm-evaluation-harness, with stand-ins of its Instance; the tests of the whole need the
extra `eval` and are skipped without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cacheroute import Llama
from cacheroute.cli import app
from cacheroute.errors import UsageError
from cacheroute.evals import harness, loading
from cacheroute.evals.perplexity import log_probabilities, score
from cacheroute.evals.tasks import TaskScorer, truncation_note
from cacheroute.evals.text import Chunk

TASKS = Path(__file__).resolve().parent / "tasks"
HEAD = "the cat was on the mat\n\na hat is with it\n\n"
QUESTION = "what is that for"
ROUTINGS = ["original", "cache-prior:lambda=0.5"]


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[Llama]:
    model = loading.load(tiny, 256, 1)
    yield model
    model.close()


def scorer(llm: Llama, routing: str = "original", **settings: Any) -> TaskScorer:
    llm.configure(**{"budget": "25%", "routing": routing, "eviction": "score", "io": "none", **settings})
    return TaskScorer(llm)


def reference(llm: Llama, routing: str, context: str, continuation: str) -> float:
    """The sum that perplexity.score gives: the head as a prompt, everything after it decoded."""
    s = scorer(llm, routing)
    head, before, whole = (s.encode(t, bos=True) for t in (context[: context.rfind("\n\n") + 2], context, context + continuation))
    assert whole[: len(before)] == before and before[: len(head)] == head
    chunk = Chunk(0, tuple(whole), len(head))
    return -float(next(iter(score(llm, [chunk]))).nll[len(before) - len(whole) :].sum())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_loglikelihoods_equal_those_of_eval_perplexity(llm: Llama, routing: str) -> None:
    for continuation in (" a", " the cat", " it was that hat"):
        expected = reference(llm, routing, HEAD + QUESTION, continuation)
        assert scorer(llm, routing).loglikelihood(HEAD + QUESTION, continuation)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("io", ["none", "buffered"])
def test_a_shared_head_is_evaluated_once_and_changes_nothing(llm: Llama, routing: str, io: str) -> None:
    asked = [(HEAD + q, a) for q in (QUESTION, "is it the mat") for a in (" a", " the", " the cat", " that hat was on it")]
    alone = [scorer(llm, routing, io=io).loglikelihood(*x) for x in asked]
    s = scorer(llm, routing, io=io)
    assert [s.loglikelihood(*x) for x in asked] == alone
    assert [s.loglikelihood(*x) for x in reversed(asked)] == alone[::-1]
    head = len(s.encode(HEAD, bos=True))
    fresh = scorer(llm, routing, io=io)
    for x in asked:
        fresh.loglikelihood(*x)
    assert llm.stats().prefill.tokens == head


def test_answers_of_one_token_share_the_question(llm: Llama) -> None:
    s = scorer(llm, "cache-prior:lambda=0.5")
    s.loglikelihood(HEAD + QUESTION, " a")
    decoded = llm.stats().decode.tokens
    assert s.loglikelihood(HEAD + QUESTION, " the") != s.loglikelihood(HEAD + QUESTION, " a")
    assert llm.stats().decode.tokens == decoded


def test_the_state_comes_back_exactly(llm: Llama) -> None:
    """checkpoint() and return_to(): cache and running means, and with them every bit that follows."""
    llm.configure(budget="25%", routing="cache-prior:lambda=0.6", eviction="score", io="buffered")
    tokens = np.random.default_rng(1).integers(3, 300, 40).tolist()

    def follow() -> Any:
        with llm.decoding():
            for token in tokens[20:]:
                llm.eval([token])
        return log_probabilities(llm)

    llm.eval(tokens[:20])
    mark = llm.checkpoint()
    before = llm.stats()
    first, after_first = follow(), llm.stats()
    llm.return_to(mark)
    again, after_again = follow(), llm.stats()
    np.testing.assert_array_equal(first, again)
    assert after_first.decode.misses - before.decode.misses == after_again.decode.misses - after_first.decode.misses
    assert after_again.resident_bytes == after_first.resident_bytes > 0


def test_greedy_is_reported(llm: Llama) -> None:
    s = scorer(llm)
    answers = [s.loglikelihood(HEAD + QUESTION, f" {chr(c)}") for c in range(ord("a"), ord("z") + 1)]
    s.generate_until(HEAD + QUESTION, [], 1)
    log_p = log_probabilities(llm)
    assert any(greedy for _, greedy in answers) == (max(x for x, _ in answers) == pytest.approx(log_p.max(), abs=1e-4))


def test_empty_contexts_and_continuations(llm: Llama) -> None:
    s = scorer(llm)
    assert s.loglikelihood(QUESTION, "") == (0.0, True)
    log_p, _ = s.loglikelihood("", "the cat")
    tokens = (s.prefix_token, *s.encode("the cat"))
    assert log_p == pytest.approx(-float(next(iter(score(llm, [Chunk(0, tokens, 0)]))).nll.sum()), abs=1e-4)
    assert s.loglikelihood("", "")[0] == 0.0
    assert s.loglikelihood_rolling("") == 0.0


def test_a_context_that_is_too_long_loses_its_beginning(llm: Llama) -> None:
    s = scorer(llm)
    long = "the cat was on the mat and " * 40
    log_p, _ = s.loglikelihood(long, " that hat")
    assert np.isfinite(log_p) and s.truncated == 1
    assert "1 contexts were longer than the window of 256 tokens" in truncation_note(s)
    assert isinstance(s.generate_until(long, [], 8), str) and s.truncated == 2
    with pytest.raises(UsageError, match="does not fit the context of 256"):
        s.loglikelihood("the", long)


def test_rolling_scores_every_token_once_with_all_context(llm: Llama) -> None:
    s = scorer(llm)
    tokens = s.encode("the cat was on the mat and it is for that with a hat he " * 14)
    text = s.llm.detokenize(tokens).decode()
    tokens = s.encode(text)
    n = llm.n_ctx()
    assert n < len(tokens) < 2 * n
    first = Chunk(0, (s.prefix_token, *tokens[:n]), 0)
    last = Chunk(1, tuple(tokens[-n - 1 :]), n - (len(tokens) - n))  # the last tokens, with a full window before them
    expected = sum(float(x.nll.sum()) for x in score(llm, [first, last]))
    assert s.loglikelihood_rolling(text) == pytest.approx(-expected, abs=1e-3)


def test_until_cuts_and_is_not_part_of_the_answer(llm: Llama) -> None:
    s = scorer(llm, "cache-prior:lambda=0.3")
    whole = s.generate_until(HEAD, [], 40)
    assert len(whole) > 8 and s.generate_until(HEAD, [""], 40) == whole
    for stop in (whole[2:4], whole[5:]):
        assert s.generate_until(HEAD, ["not there", stop], 40) == whole[: whole.find(stop)]
    assert whole.startswith(s.generate_until(HEAD, [], 3))


def test_prompts_of_generated_answers_run_by_original(llm: Llama) -> None:
    s = scorer(llm, "cache-prior:lambda=1")
    s.generate_until(HEAD + QUESTION, [], 4)
    assert llm.stats().decode.tokens == 3  # the first of four comes from the prompt
    assert llm.stats().prefill.tokens == len(s.encode(HEAD + QUESTION, bos=True))


# ---- lm-evaluation-harness's side, with stand-ins ---------------------------------------------------


@dataclass
class Instance:
    """What the adapter uses of lm_eval.api.instance.Instance."""

    args: tuple[Any, ...]


def test_answers_come_in_the_order_of_the_requests() -> None:
    seen: list[int] = []
    requests = [Instance((text,)) for text in ("b", "c", "a")]
    answers = harness._answers(requests, lambda args: args[0].upper(), lambda done, total: seen.append(done * 10 + total))
    assert answers == ["B", "C", "A"] and seen == [13, 23, 33]


def test_sampled_answers_are_refused(llm: Llama) -> None:
    with pytest.raises(UsageError, match="only greedy"):
        harness._generate(scorer(llm), "a", {"do_sample": True, "temperature": 0.7})
    assert (
        harness._generate(scorer(llm), "a", {"do_sample": True, "temperature": 0.0, "until": "x", "max_gen_toks": 1}) is not None
    )


def test_metrics_have_the_names_of_lm_eval() -> None:
    results = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1.0, "sample_len": 3}},
        "groups": {"g": {"acc,none": 0.25, "acc_stderr,none": "N/A"}},
    }
    assert harness.metrics(results) == [
        harness.Metric("t", "acc", 0.5, 0.1),
        harness.Metric("t", "exact_match,strict", 1.0, None),
        harness.Metric("g", "acc", 0.25, None),
    ]


# ---- the whole --------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.chdir(TASKS.resolve().parent.parent)
    # not by environment: both packages read it once, when the first test imports them, and the tests of `pull` need the hub
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.usefixtures("installed")
def test_tasks_of_all_kinds(tiny: Path) -> None:
    names = "cacheroute_own_choice,cacheroute_own_text,cacheroute_own_rolling"
    settings = ("-m", tiny, "--tasks", TASKS, "-c", 256, "-t", 1, "--budget", "25%")
    result = run(names, *settings, "--routing", "original,cache-prior:lambda=0.5", "-o", "json")
    assert result.exit_code == 0, result.output
    original, lossy = json.loads(result.stdout)
    assert original["n-shot"]["cacheroute_own_choice"] == 1 and original["config"]  # lm-eval's own format
    rows = {(r["task"], r["metric"]): r for r in lossy["cacheroute"]}
    assert set(rows) == {
        ("cacheroute_own_choice", "acc"),
        ("cacheroute_own_text", "exact_match"),
        ("cacheroute_own_rolling", "word_perplexity"),
    }
    assert rows["cacheroute_own_choice", "acc"]["swap_rate"] > 0
    few = run("cacheroute_own_choice", *settings, "--limit", 1, "--shots", 0, "--routing", "original", "-o", "md")
    assert few.exit_code == 0, few.output
    assert "| cacheroute_own_choice | acc" in few.stdout


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no_such_task", 2, "There is no task 'no_such_task' in lm-evaluation-harness nor in"),
        ("cacheroute_lost_data", 1, "The data of cacheroute_lost_data cannot be loaded"),
    ],
)
def test_bad_tasks_are_one_sentence(tiny: Path, name: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # lm-evaluation-harness reads thousands of task files to know its own; the folder alone will do
    manager = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: manager(folder, defaults=False))
    result = run(name, "-m", tiny, "--tasks", TASKS)
    assert result.exit_code == code, result.output
    assert message in result.stderr and "Traceback" not in result.stderr


def test_without_the_extra_the_error_names_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = run("mmlu", "-m", tiny)
    assert result.exit_code == 2 and "python -m pip install lm-eval" in result.stderr
