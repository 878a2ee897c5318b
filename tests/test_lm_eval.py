"""Tasks: log-likelihoods are our own scorer's, prefix reuse changes no bit, and lm-evaluation-harness runs over the engine.

What asks the model is tested without lm-evaluation-harness, with stand-ins of its Instance; the tests of the whole need the
extra `eval` and are skipped without it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.evals import harness, loading
from cacheroute.evals.answers import TEXT, Question, Respondent
from cacheroute.evals.perplexity import log_probabilities, score
from cacheroute.evals.tasks import Heads, TaskScorer
from cacheroute.evals.text import Chunk
from support.cli import invoke

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


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("io", ["none", "buffered"])
def test_a_question_is_decoded_once_for_all_of_its_answers(llm: Llama, routing: str, io: str) -> None:
    answers = (" it was that hat", " the cat", " it was that mat")
    alone = [scorer(llm, routing, io=io).loglikelihood(HEAD + QUESTION, a) for a in answers]
    s = scorer(llm, routing, io=io)
    assert [s.loglikelihood(HEAD + QUESTION, a) for a in answers] == alone
    before = len(s.encode(HEAD + QUESTION, bos=True))
    question = before - len(s.encode(HEAD, bos=True))
    parts = sum(len(s.encode(HEAD + QUESTION + a, bos=True)) - before - 1 for a in answers)
    assert llm.stats().decode.tokens == question + parts


def test_scorers_share_a_head(llm: Llama) -> None:
    heads, asked = Heads(), [(HEAD + QUESTION, " a hat"), (HEAD + QUESTION, " the mat")]
    alone = [[scorer(llm, routing).loglikelihood(*x) for x in asked] for routing in ROUTINGS]
    prompts, found = [], []
    for routing in ROUTINGS * 2:
        llm.configure(budget="25%", routing=routing, eviction="score", io="none")
        s = TaskScorer(llm, heads)
        found.append([s.loglikelihood(*x) for x in asked])
        prompts.append(llm.stats().prefill.tokens)
    assert found == alone * 2
    assert prompts[0] > 0 and prompts[1:] == [0, 0, 0]
    llm.configure(budget=16, routing="original", eviction="score", io="none")
    TaskScorer(llm, heads).loglikelihood(*asked[0])
    assert llm.stats().prefill.tokens == prompts[0], "another budget has another state after the same head"


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


def test_a_state_is_kept_whole_while_an_interrupt_is_on_its_way(llm: Llama) -> None:
    """As in a server whose client leaves between the prompt's last batch and the first token."""
    llm.configure(budget="25%", routing="cache-prior:lambda=0.6", eviction="score", io="buffered")
    llm.eval(np.random.default_rng(1).integers(3, 300, 20).tolist())
    whole, resident = llm.checkpoint(), llm.stats().resident_bytes
    llm.interrupt()
    again = llm.checkpoint()
    llm.interrupt(False)
    assert again.routing_bytes() == whole.routing_bytes() and llm.stats().resident_bytes == resident > 0


def test_greedy_is_reported(llm: Llama) -> None:
    s = scorer(llm)
    best = s.generate_until(HEAD + QUESTION, [], 1)
    answers = {
        text: s.loglikelihood(HEAD + QUESTION, text) for text in (best, *(f" {chr(c)}" for c in range(ord("a"), ord("z") + 1)))
    }
    assert best and answers[best] == (max(answers.values())[0], True)
    assert [text for text, (_, greedy) in answers.items() if greedy] == [best]


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


def test_choices_of_one_context_are_one_question() -> None:
    asked: list[Question] = []

    def ask(questions: Any) -> list[list[Any]]:
        asked.extend(questions)
        return [[[float(len(part)), part == "b"] for part in q.parts] for q in questions]

    requests = [("x", "bbb"), ("y", "b"), ("x", "b"), ("", "free"), ("x", "bbb"), ("", "other")]
    assert harness.choices(requests, ask) == [(3, False), (1, True), (1, True), (4, False), (3, False), (5, False)]
    assert [(q.context, q.parts) for q in asked] == [("x", ("bbb", "b")), ("y", ("b",)), ("", ("free",)), ("", ("other",))]


def test_sampled_answers_are_refused() -> None:
    with pytest.raises(UsageError, match="only greedy"):
        harness.text_question("a", {"do_sample": True, "temperature": 0.7})
    settings = {"do_sample": True, "temperature": 0.0, "until": "x", "max_gen_toks": 1}
    assert harness.text_question("a", settings) == Question(TEXT, "a", ("x",), 1)


def test_questions_are_drawn_by_the_seed() -> None:
    drawn = [harness._drawn("anatomy", 100, 10, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0]}) == 10 and drawn[0] == sorted(drawn[0])
    assert harness._drawn("anatomy", 5, 10, 0) == [0, 1, 2, 3, 4]


def test_what_is_right_is_found_by_its_metric() -> None:
    samples = {
        "a": [
            {"doc_id": 3, "filter": "none", "metrics": ["acc", "brier"], "acc": 1.0, "brier": 0.3},
            {"doc_id": 4, "filter": "strict", "metrics": ["acc"], "acc": 1.0},
            {"doc_id": 5, "filter": "none", "metrics": ["acc"], "acc": 0.0},
        ],
        "b": [{"doc_id": 3, "filter": "none", "metrics": ["acc"], "acc": 1.0}],
    }
    assert harness.right({"samples": samples}, ["a", "b"], "acc") == {("a", 3): True, ("a", 5): False, ("b", 3): True}
    assert harness.right({"samples": samples}, ["a"], "acc,strict") == {("a", 4): True}
    assert harness.right({"samples": samples}, ["a"], "brier") == {}


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
    return invoke("eval", *arguments)


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
def test_an_interrupted_run_is_resumed_and_workers_find_the_same(
    tiny: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("cacheroute_own_choice,cacheroute_own_text", "-m", tiny, "--tasks", TASKS, "-c", 256, "-t", 2)
    settings = (*settings, "--budget", "25%", "--routing", "cache-prior:lambda=0.5")
    answer, asked = Respondent.answer, []

    def interrupted(self: Respondent, *arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(Respondent, "answer", interrupted)
    stopped = run(*settings, "-o", "json")
    assert stopped.exit_code == 130 and "run the same command to resume" in stopped.stderr, stopped.output
    asked.clear()
    monkeypatch.setattr(Respondent, "answer", lambda self, *a: (asked.append(a), answer(self, *a))[1])
    resumed = run(*settings, "-o", "jsonl")
    assert resumed.exit_code == 0 and "3 of " in resumed.stderr and "answers are in the cache" in resumed.stderr, resumed.output
    assert len(asked) > 4
    assert importlib.import_module("datasets").are_progress_bars_disabled(), "no bar in a pipe"
    asked.clear()
    again = run(*settings, "-o", "jsonl")
    assert again.stdout == resumed.stdout and not asked
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    original, lossy = (r for r in rows if (r["task"], r["metric"]) == ("cacheroute_own_choice", "acc"))
    assert original["routing"] == "original" and original["gained"] is None and original["swap_rate"] == 0
    assert lossy["n"] == original["n"] > 0 and 0 <= lossy["p"] <= 1
    assert lossy["value"] - original["value"] == pytest.approx((lossy["gained"] - lossy["lost"]) / lossy["n"])
    monkeypatch.setenv("CACHEROUTE_CACHE", str(own_cache / "other"))
    parallel = run(*settings, "--workers", 2, "-o", "jsonl")
    timeless = [[json.loads(line) | {"seconds": 0} for line in r.stdout.splitlines()] for r in (again, parallel)]
    assert timeless[0] == timeless[1], parallel.output


@pytest.mark.usefixtures("installed")
def test_mmlu_and_gsm8k_come_from_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    # lm-evaluation-harness reads thousands of task files to know its own; two folders of them will do
    own = [str(Path(lm_eval.tasks.__file__).parent / name) for name in ("mmlu/default", "gsm8k")]
    manager = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False)
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: (manager, known))
    for split, n in (("test", 4), ("dev", 2)):
        lines = [f"{split} question {i} and the cat?,a hat,the mat,it,that,{i % 4}" for i in range(n)]
        file = tmp_path / "data" / "mmlu" / split / f"anatomy_{split}.csv"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(["question,choice0,choice1,choice2,choice3,answer", *lines]))
    (tmp_path / "data" / "gsm8k-test.jsonl").write_text('{"question": "How many hats?", "answer": "The cat has 2. #### 2"}\n')
    settings = ("-m", tiny, "--data", tmp_path / "data", "-c", 256, "-t", 1, "--budget", "25%", "--routing", "original")
    asked: list[Question] = []
    tasks = harness.load_tasks(["mmlu_anatomy", "gsm8k_cot"], data=tmp_path / "data", limit=3, seed=5)

    def ask(questions: Any) -> list[list[Any]]:
        asked.extend(questions)
        first_is_best = [[-float(i), False] for i in range(4)]
        return [["The answer is 2."] if q.kind == TEXT else first_is_best for q in questions]

    tasks = replace(tasks, shots=2)
    results = harness.evaluate(tasks, ask)
    metrics = {(m.task, m.metric): m.value for m in harness.metrics(results)}
    assert metrics["gsm8k_cot", "exact_match,strict-match"] == 1.0
    right = harness.right(results, ["mmlu_anatomy"], "acc")
    assert {i for _, i in right} == {*harness._drawn("mmlu_anatomy", 4, 3, 5)}
    assert all({*harness._drawn("a", 100, n, 5)} < {*harness._drawn("a", 100, n + 1, 5)} for n in range(1, 99))
    assert metrics["mmlu_anatomy", "acc"] == sum(i % 4 == 0 for _, i in right) / 3
    mmlu = [q for q in asked if q.kind != TEXT]
    begins = "The following are multiple choice questions (with answers) about anatomy.\n\ndev question 0 and the cat?\nA. a"
    assert all(q.context.startswith(begins) and q.context.endswith("Answer:") for q in mmlu)
    assert all(q.parts == (" A", " B", " C", " D") for q in mmlu)
    assert len(mmlu) == 3 and mmlu[0].context.count("Answer:") == 3
    none = run("gsm8k", *settings)
    assert none.exit_code == 2 and "takes its 5 examples from the split 'train'" in none.stderr, none.output
    lost = run("mmlu_virology", *settings)
    assert lost.exit_code == 2 and "no test split of virology (cais/mmlu); looked for test/virology_test.csv" in lost.stderr


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("no_such_task", 2, "There is no task 'no_such_task' in lm-evaluation-harness nor in"),
        ("cacheroute_lost_data", 1, "The data of cacheroute_lost_data cannot be loaded"),
        ("cacheroute_wrong_split", 2, f"cacheroute_wrong_split of {TASKS} cannot be used (KeyError: 'zzz'); mend its"),
    ],
)
def test_bad_tasks_are_one_sentence(tiny: Path, name: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # lm-evaluation-harness reads thousands of task files to know its own; the folder alone will do
    manager = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: manager(folder, defaults=False))
    result = run(name, "-m", tiny, "--tasks", TASKS)
    assert result.exit_code == code, result.output
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.usefixtures("installed")
def test_a_task_file_that_is_no_yaml_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("task: [a")
    result = run("a", "-m", tiny, "--tasks", tmp_path)
    assert result.exit_code == 2 and f"{tmp_path / 'bad.yaml'} is no task file: while parsing" in result.stderr, result.output


def test_without_the_extra_the_error_names_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    result = run("mmlu", "-m", tiny)
    assert result.exit_code == 1 and "-m pip install lm-eval" in result.stderr
