"""Long texts: repetitions are found, sampled texts share their random numbers, and what is written is scored by `original`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.evals import loading, long, repetition
from cacheroute.evals.perplexity import log_probabilities
from cacheroute.routing.strategies import parse
from support.cli import invoke

PROMPT = [5, 6, 7, 8, 9, 10]
SAMPLED = long.Decoding(temp=0.8, min_p=0.01, seed=3)


def test_repetitions_are_found() -> None:
    text = [1, 2, 3, 4, 1, 2, 3, 5]
    assert repetition.longest_repeat(text) == 3
    assert repetition.distinct(text, 1) == 5 / 8 and repetition.distinct(text, 2) == 5 / 7
    assert repetition.longest_repeat([1, 2, 3]) == repetition.longest_repeat([]) == 0 and repetition.distinct([1], 2) == 1
    loop = [7, 8, 9] * 20
    assert repetition.longest_repeat(loop) == 60 - 3 and repetition.distinct(loop, 4) == 3 / 57


def test_a_token_is_chosen_by_its_probability() -> None:
    log_p = np.log(np.array([0.5, 0.0, 0.3, 0.15, 0.05], np.float32) + 1e-30).astype(np.float32)
    log_p[1] = -np.inf
    plain = long.Decoding(temp=1.0)
    assert [plain.choose(log_p, u) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.96, 0.999999)] == [0, 0, 2, 2, 3, 4, 4]
    cut = long.Decoding(temp=1.0, min_p=0.4)  # 0.5 and 0.3 are left
    assert [cut.choose(log_p, u) for u in (0.0, 0.62, 0.63, 0.999999)] == [0, 0, 2, 2]
    assert long.Decoding().choose(log_p, 0.9) == 0 and str(long.Decoding()) == "greedy"


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[Llama]:
    model = loading.load(tiny, 64, 1)
    yield model
    model.close()


def write(llm: Llama, routing: str, decoding: long.Decoding = SAMPLED, n: int = 30) -> long.Written:
    return long.Writer(llm, n, "none").write(long.Request(parse(routing), 8, "lru", decoding, 0), PROMPT)


@pytest.mark.engine
def test_greedy_texts_are_those_of_the_model(llm: Llama) -> None:
    written = write(llm, "original", long.Decoding())
    llm.configure(budget="all", routing=None)
    llm.eval(PROMPT)
    for token in written.tokens:
        log_p = log_probabilities(llm)
        log_p[llm.token_eos()] = -np.inf
        assert token == int(log_p.argmax())
        llm.eval([token])


@pytest.mark.engine
def test_what_a_routing_writes_is_scored_by_original(llm: Llama) -> None:
    original, lossy = write(llm, "original"), write(llm, "cache-prior:lambda=1")
    assert original == write(llm, "original") and lossy == write(llm, "cache-prior:lambda=1")
    assert lossy.tokens != original.tokens and len(lossy.nll) == 30 and len(lossy.misses) == 29
    for written in (original, lossy):
        llm.configure(budget="all", routing=None)
        llm.eval(PROMPT)
        for token, nll in zip(written.tokens, written.nll, strict=True):
            assert nll == pytest.approx(-float(log_probabilities(llm)[token]), abs=2e-3)
            llm.eval([token])
    # a routing that changes nothing writes the same text with the same random numbers
    assert write(llm, "cache-prior:lambda=0").tokens == original.tokens
    assert sum(lossy.misses) < sum(original.misses)


def text(prompt: int, tokens: list[int], nll: float, misses: int) -> long.Written:
    n = len(tokens)
    own: dict[str, Any] = {"routing": "r", "budget": 8, "eviction": "lru", "decoding": "greedy", "prompt": prompt}
    each = {"misses": [misses] * (n - 1), "selected": [8] * (n - 1)}
    return long.Written(**own, tokens=tokens, nll32=np.full(n, nll, "<f4").tobytes(), **each)


def test_the_summary_keeps_the_cold_tokens_apart() -> None:
    base = [text(i, list(range(300)), 2.0, 4) for i in range(3)]
    loops = [text(i, list(range(40)) + [1, 2] * 130, 1.0, 2) for i in range(3)]
    s = long.summary(base, loops)
    assert (s.n_texts, s.n_tokens, s.n_cold, s.same, s.longest_repeat) == (3, 300, 100, 40, 258)
    assert s.ppl == s.ppl_cold == s.ppl_warm == pytest.approx(np.e) and s.delta_nll == pytest.approx(-1)
    assert s.miss_cold == s.miss_warm == 0.25 and s.distinct1 == pytest.approx(40 / 300)
    assert long.summary(base, base).same == 300 and long.summary(base[:1], loops[:1]).delta_nll_low is None
    assert long.summary([text(0, [1] * 20, 2, 4)], [text(0, [1] * 20, 2, 4)]).n_cold == 10


@pytest.mark.engine
def test_the_command_resumes_and_workers_write_the_same(tiny: Path, prose: Path, own_cache: Path, monkeypatch: Any) -> None:
    command = ["eval", "long", "-m", tiny, "-f", prose, "--budget", "25%", "--routing", "cache-prior:lambda=0.5"]
    command = [str(x) for x in (*command, "--places", 2, "--prompt-tokens", 16, "-n", 24, "-t", 2, "-o", "json")]
    first = invoke(*command)
    assert first.exit_code == 0, first.output
    found = [(row["decoding"], row["routing"]) for row in json.loads(first.stdout)]
    assert found == [(d, r) for d in ("greedy", "temp 0.8") for r in ("original", "cache-prior:lambda=0.5")]
    monkeypatch.setattr(long.Writer, "write", lambda *_: pytest.fail("written again"))
    again = invoke(*command)
    assert again.stdout == first.stdout and "8 of 8 texts are in the cache" in again.stderr
    table = invoke(*command[:-1], "md").stdout.splitlines()
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1 and "same first" in table[0]
    monkeypatch.undo()
    monkeypatch.setenv("CACHEROUTE_CACHE", str(own_cache / "other"))
    parallel = invoke(*command, "--workers", "2")
    assert parallel.stdout == first.stdout, parallel.output
    shown = invoke(*command[:-2])
    assert shown.exit_code == 0 and "perplexity of its texts" in shown.stdout and max(map(len, shown.stdout.splitlines())) <= 100


@pytest.mark.engine
def test_too_little_text_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat was on the mat " * 4)
    result = invoke("eval", "long", "-m", str(tiny), "-f", str(tmp_path / "short.txt"), "--prompt-tokens", "8")
    assert result.exit_code == 2 and "8 are wanted; give more text" in result.stderr, result.output
