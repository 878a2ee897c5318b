"""Text of a completion: nothing is lost or held back, stop strings work across tokens, and tokens are upstream's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheroute.engine import completion
from cacheroute.engine.llama import Llama

pytestmark = pytest.mark.engine


def streamed(parts: list[bytes], stop: tuple[bytes, ...] = ()) -> list[str]:
    stream = completion.Stream(stop)
    return [*(stream.add(p) for p in parts), stream.end()]


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_a_stream_has_the_letters_of_all_bytes(parts: list[bytes]) -> None:
    assert "".join(streamed(parts)) == b"".join(parts).decode("utf-8", "replace")


def test_what_is_valid_comes_at_once() -> None:
    letter = "ж".encode()
    assert streamed([b"a", b"\xff", b"b", letter[:1], letter[1:], b"c", letter[:1]]) == [
        "a",
        "\ufffd",
        "b",
        "",
        "ж",
        "c",
        "",
        "\ufffd",
    ]


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", b"<", b"<e", b"nd>", "ж".encode(), b"\xd0"]), max_size=10))
def test_a_stop_string_may_come_in_pieces(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    expected = whole.split(b"<end>")[0] if b"<end>" in whole else whole
    assert "".join(streamed(parts, (b"<end>",))) == expected.decode("utf-8", "replace")


def test_what_may_become_a_stop_string_is_held_no_longer_than_that() -> None:
    assert streamed([b"a<", b"en", b"x", b"b"], (b"<end>",)) == ["a", "", "<enx", "b", ""]


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with closing(Llama(str(demo_model), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)) as llm:
        yield llm


def complete(llm: Llama, prompt: completion.Prompt, n: int | None, **sampling: float) -> completion.Completion:
    llm.reset()
    run = completion.Completion(llm, prompt, n, 7, dict(temp=0.0) | sampling)
    pieces = list(run.pieces())
    assert "".join(pieces) == run.text
    return run


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_the_answer_is_upstreams(llm: Llama, temperature: float) -> None:
    question = "What is the capital of France?"
    chat = complete(llm, completion.chat_prompt(llm, [{"role": "user", "content": question}]), 24, temp=temperature)
    llm.reset()
    sampling = dict(max_tokens=24, temperature=temperature, seed=7, repeat_penalty=1.0, stream=False)
    answer = llm.create_chat_completion([{"role": "user", "content": question}], **sampling)
    assert chat.text == answer["choices"][0]["message"]["content"]
    assert chat.finish_reason == answer["choices"][0]["finish_reason"]
    raw = complete(llm, completion.raw_prompt(llm, "Once upon a time"), 24, temp=temperature)
    llm.reset()
    assert raw.text == llm.create_completion("Once upon a time", **sampling)["choices"][0]["text"]


def test_letters_of_several_tokens_come_as_they_are_whole(llm: Llama) -> None:
    prompt = completion.chat_prompt(llm, [{"role": "user", "content": "Translate to Russian: Good morning"}])
    run = completion.Completion(llm, prompt, 60, 7, dict(temp=0.0))
    llm.reset()
    first = next(piece for piece in run.pieces())
    assert len(first) < 20, "not all at the end"
    run = complete(llm, prompt, 60)
    tokens = [int(t) for t in llm.input_ids[len(prompt.tokens) : llm.n_tokens]]
    known = b"".join(completion.token_bytes(llm, t) for t in tokens)
    assert run.text.encode("utf-8", "replace")[:40] == known.decode("utf-8", "replace").encode()[:40]
    assert run.n_tokens == 60 and run.finish_reason == "length"


def test_counts_and_times_are_of_tokens(llm: Llama) -> None:
    prompt = completion.raw_prompt(llm, "the")
    none, one, some = (complete(llm, prompt, n) for n in (0, 1, 60))
    assert (none.n_tokens, none.text, none.first, none.finish_reason) == (0, "", None, "length")
    assert one.n_tokens == 1 and one.first == one.last
    assert some.n_tokens == 60 and some.first is not None and some.last is not None and some.started < some.first < some.last


def test_a_token_may_be_longer_than_a_buffer(llm: Llama) -> None:
    pieces = [completion.token_bytes(llm, t) for t in range(llm.n_vocab())]
    text = b" " * 70 + b"=" * 70
    assert b"".join(pieces[t] for t in llm.tokenize(text, add_bos=False)).strip() == text.strip()
