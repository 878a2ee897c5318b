"""Flash attention for prompts alone: its passes are llama.cpp's flash attention, all else llama.cpp without it, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from cacheroute import Llama
from cacheroute.engine.flash_attention import LEAST, FlashAttention
from cacheroute.errors import UsageError
from support import tiny_models

Floats = npt.NDArray[np.float32]
SIZES: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 60, 120)]
MAPPED: dict[str, Any] = {"lazy_mode": 3, "use_mmap": False}


@contextlib.contextmanager
def upstream(path: Path, kind: FlashAttention, **settings: Any) -> Iterator[Any]:
    with contextlib.closing(llama_cpp.Llama(str(path), flash_attn_type=kind, **MAPPED, **SIZES, **settings)) as llm:
        yield llm


def prompt(llm: Any, n_tokens: int) -> Floats:
    """The scores of each token of a prompt."""
    llm.reset()
    llm.eval(TOKENS[:n_tokens])
    return np.array(llm.scores[:n_tokens])


def decoded(llm: Any, n_prompt: int) -> Floats:
    """The scores after a prompt and of ten tokens that follow it one by one."""
    rows = [prompt(llm, n_prompt)[-1]]
    with llm.decoding() if isinstance(llm, Llama) else contextlib.nullcontext():
        for token in TOKENS[n_prompt : n_prompt + 10]:
            llm.eval([token])
            rows.append(np.array(llm.scores[llm.n_tokens - 1]))
    return np.array(rows)


def same(a: Floats, b: Floats) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


@pytest.mark.parametrize("arch", tiny_models.ARCHS)
def test_a_long_pass_is_flash_attentions_and_the_rest_is_not(arch: str, tmp_path: Path) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf")
    with (
        upstream(path, FlashAttention.PROMPTS) as prompts,
        upstream(path, FlashAttention.ALWAYS) as always,
        upstream(path, FlashAttention.NEVER) as never,
    ):
        assert same(prompt(prompts, LEAST), prompt(always, LEAST))
        assert same(decoded(prompts, LEAST - 1), decoded(never, LEAST - 1))
        after = decoded(prompts, 100)  # what a long pass has put in the cache is decoded without it
        np.testing.assert_allclose(after, decoded(never, 100), atol=0.1)  # some processors add in F16
        assert not same(after[1:], decoded(always, 100)[1:])
        assert same(after, decoded(prompts, 100))


@pytest.mark.parametrize("arch", tiny_models.ARCHS)
@pytest.mark.parametrize("n_ubatch", [100, 64, 40])
def test_with_experts_on_flash_it_is_the_unhooked_engine_for_every_split(arch: str, n_ubatch: int, tmp_path: Path) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf")
    batches = {"n_batch": n_ubatch, "n_ubatch": n_ubatch}
    with (
        upstream(path, FlashAttention.PROMPTS, **batches) as plain,
        contextlib.closing(Llama(str(path), budget="50%", **SIZES, **batches)) as llm,
    ):
        assert same(prompt(llm, 110), prompt(plain, 110))
        assert same(decoded(llm, 110), decoded(plain, 110))


def test_the_caller_chooses(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", head_dim=32)
    q8_0 = 8  # enum ggml_type
    for given, kind in (
        ({}, FlashAttention.PROMPTS),
        ({"flash_attn": None}, FlashAttention.PROMPTS),
        ({"flash_attn": True}, FlashAttention.ALWAYS),
        ({"flash_attn": False}, FlashAttention.NEVER),
        ({"type_k": q8_0}, FlashAttention.NEVER),
        ({"flash_attn": True, "type_k": q8_0, "type_v": q8_0}, FlashAttention.ALWAYS),
    ):
        with contextlib.closing(Llama(str(path), budget="50%", **{**SIZES, "logits_all": False}, **given)) as llm:
            assert llm.context_params.flash_attn_type == kind
            llm.eval(TOKENS)
    with pytest.raises(UsageError, match=r"^flash_attn is True, False, or None for prompts only, not 'auto'\.$"):
        Llama(str(path), flash_attn="auto")
    with pytest.raises(UsageError, match="no argument 'flash_attn_type'"):
        Llama(str(path), flash_attn_type=1)


def test_what_a_pass_is_computed_with() -> None:
    for kind, few, many in ((0, False, False), (1, True, True), (2, False, True)):
        assert (FlashAttention(kind).computes(LEAST - 1), FlashAttention(kind).computes(LEAST)) == (few, many)
