"""What llama_cpp.Llama takes and gives, where this class could give another answer, crash, or take more memory."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LogitsProcessorList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from cacheroute import Llama
from cacheroute.errors import CacherouteError, UsageError
from support.decoding import last_logits
from support.loading import SIZES, loaded

pytestmark = pytest.mark.engine
PROMPT = list(range(3, 40))


@contextlib.contextmanager
def stock(path: Path, **settings: Any) -> Iterator[llama_cpp.Llama]:
    """llama_cpp.Llama, loaded as this class loads."""
    with contextlib.closing(llama_cpp.Llama(str(path), lazy_mode=3, use_mmap=False, **SIZES | settings)) as llm:
        yield llm


def text(llm: llama_cpp.Llama, **settings: Any) -> str:
    made: Any = llm.create_completion("the cat that was", temperature=0, **settings)
    return "".join(piece["choices"][0]["text"] for piece in (made if settings.get("stream") else [made]))


# ---- answers


@pytest.mark.parametrize("n_drafts", [1, 3, 10])
@pytest.mark.parametrize("n_ctx", [32, 50, 64])
def test_drafts_fill_the_context_with_the_text_that_there_is_without(tiny: Path, n_drafts: int, n_ctx: int) -> None:
    with loaded(tiny, n_ctx=n_ctx, logits_all=True) as llm:
        expected = [text(llm, max_tokens=None, stream=stream) for stream in (False, True)]
    with loaded(tiny, n_ctx=n_ctx, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=n_drafts)) as llm:
        assert [text(llm, max_tokens=None, stream=stream) for stream in (False, True)] == expected
        assert len(expected[0]) > n_ctx // 2


def test_tokens_can_be_sent_only_where_there_are_scores_of_each(tiny: Path) -> None:
    with loaded(tiny) as llm:
        answer = llm.generate(PROMPT, temp=0.0)
        next(answer)
        with pytest.raises(UsageError, match="logits_all"):
            answer.send([5, 6])
        assert text(llm, max_tokens=4)


@pytest.mark.parametrize("n_used", [1, 2, 6])
def test_a_token_may_use_another_number_of_experts(tiny: Path, n_used: int) -> None:
    overrides = {"qwen3moe.expert_used_count": n_used}
    with stock(tiny, kv_overrides=overrides) as llm:
        expected = text(llm, max_tokens=12)
    with loaded(tiny, kv_overrides=overrides) as llm:
        assert text(llm, max_tokens=12) == expected
        decode = llm.stats().decode
        assert decode.hits + decode.misses == n_used * decode.tokens * len(llm.layout.layers)


def test_a_prompt_that_is_kept_is_of_one_number_of_experts(tiny: Path, tmp_path: Path) -> None:
    with loaded(tiny, kv_overrides={"qwen3moe.expert_used_count": 2}) as llm:
        llm.eval(PROMPT)
        llm.save_prompt(tmp_path / "p")
        assert llm.load_prompt(tmp_path / "p") == PROMPT
    with loaded(tiny) as llm, pytest.raises(UsageError, match=r"qwen3moe\.expert_used_count=2"):
        llm.load_prompt(tmp_path / "p")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"qwen3moe.expert_used_count": 33}, "is a whole number from 1 to 32, not 33"),
        ({"qwen3moe.expert_used_count": 0}, "from 1 to 32, not 0"),
        ({"qwen3moe.expert_used_count": 2.0}, r"from 1 to 32, not 2\.0"),
        ({"qwen3moe.expert_count": 16}, "the file has 32 experts"),
    ],
)
def test_a_number_of_experts_that_cannot_be(tiny: Path, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Llama(str(tiny), kv_overrides=overrides, **SIZES)


# ---- copies and states


@pytest.mark.parametrize("flash_attn", [None, True, False])
@pytest.mark.parametrize("make", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_a_copy_computes_as_its_model(tiny: Path, flash_attn: bool | None, make: Any) -> None:
    prompt = [3 + i % 90 for i in range(100)]
    with loaded(tiny, flash_attn=flash_attn) as llm, contextlib.closing(make(llm)) as other:
        llm.eval(prompt)
        other.eval(prompt)
        np.testing.assert_array_equal(last_logits(other), last_logits(llm))


def test_a_state_has_no_scores_that_nobody_has_filled(tiny: Path) -> None:
    """And goes from one class to the other."""
    with loaded(tiny) as llm, stock(tiny) as other:
        for a, b in ((llm, other), (other, llm), (llm, llm)):
            a.reset()
            a.eval(PROMPT)
            state = a.save_state()
            assert a is other or state.scores.nbytes <= 4 * llm.n_vocab()
            a.eval([50])
            expected = last_logits(a)
            b.reset()
            b.load_state(state)
            b.eval([50])
            np.testing.assert_array_equal(last_logits(b), expected)
        llm.reset()
        llm.load_state(llm.save_state())  # of no token
        assert llm.n_tokens == 0


# ---- what would crash


def test_an_answer_cannot_close_the_model_that_gives_it(tiny: Path) -> None:
    said = []
    with loaded(tiny) as llm:

        def close(ids: Any, scores: Any) -> Any:
            with pytest.raises(CacherouteError) as e:
                llm.close()
            said.append(str(e.value))
            return scores

        assert text(llm, max_tokens=4, logits_processor=LogitsProcessorList([close])) == text(llm, max_tokens=4)
        assert said and {*said} == {"The model computes; close it when that has ended."}


def test_a_text_without_tokens_is_not_embedded(demo_model: Path) -> None:
    with loaded(demo_model, embedding=True) as llm:
        for nothing in ("", [], ["the cat", ""]):
            with pytest.raises(UsageError, match="There is nothing to embed"):
                llm.embed(nothing)
        assert len(llm.embed("the cat")) > 0


# ---- arguments that a wrapper always gives


def test_the_defaults_of_llama_cpp_may_be_given(tiny: Path) -> None:
    with loaded(tiny, use_mmap=True, use_mlock=False, n_threads=0, n_threads_batch=0) as llm:
        assert llm.n_threads >= 1 and text(llm, max_tokens=2)
    for name, value in (("use_mmap", False), ("use_mlock", True), ("lazy_mode", 1)):
        with pytest.raises(UsageError, match=f"{name} is not for the caller to choose"):
            Llama(str(tiny), **SIZES | {name: value})
