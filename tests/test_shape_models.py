"""Models in the shape of real ones: the experts have the real sizes, and the engine loads and decodes them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import make_shape_model as shapes
import numpy as np
import numpy.typing as npt
import pytest
import quant_mix
import random_blocks
from gguf import GGMLQuantizationType, quants

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.model import catalogue
from support.decoding import last_logits

SCRIPT = Path(shapes.__file__)
# A few hundred KB instead of GBs: everything of the shape that does not change how the file is built.
SMALLER: dict[str, Any] = {"n_embd": 64, "n_ff": 32, "n_head": 4, "head_dim": 16, "n_vocab": 2000}
SMALLER_OF: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": {"n_head_kv": 4},
    "olmoe-1b-7b": {"n_head_kv": 4},
    "deepseek-v2-lite": {"rope_dim": 32, "kv_lora": 32, "n_ff_dense": 64},
    "qwen3-30b-a3b": {"n_head_kv": 2},
    "mixtral-8x7b": {"n_head_kv": 2},
    "gpt-oss-20b": {"n_head_kv": 2, "head_dim": 32, "window": 8},
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


MIXED: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_ff": 256}  # rows of one whole block of a K-quant
CASES: list[tuple[str, str, dict[str, Any], set[str]]] = [
    *((name, "q4_0", {}, {"q4_0"}) for name in shapes.SHAPES),
    ("olmoe-1b-7b", "q4_k_m", MIXED | {"n_head_kv": 16, "n_head": 16}, {"q4_k", "q6_k"}),
    ("deepseek-v2-lite", "q4_k_m", MIXED | {"n_ff": 352}, {"q4_k", "q5_0", "q8_0"}),  # rows that are no whole blocks
    ("qwen3-30b-a3b", "iq4_xs", MIXED | {"n_layer": 8}, {"iq4_xs", "q5_k"}),
    ("gpt-oss-20b", "iq4_xs", {"n_layer": 8}, {"iq4_nl", "q5_1"}),
    ("gpt-oss-20b", "mxfp4", {}, {"mxfp4"}),
    ("mixtral-8x7b", "q6_k", MIXED, {"q6_k"}),
    ("qwen1.5-moe-a2.7b", "q8_0", {}, {"q8_0"}),
]


@pytest.mark.parametrize(("name", "quant", "more", "types"), CASES, ids=[f"{name}-{quant}" for name, quant, _, _ in CASES])
def test_every_shape_loads_and_decodes_as_llama_cpp_does(
    name: str, quant: str, more: dict[str, Any], types: set[str], tmp_path: Path
) -> None:
    path = shapes.write(name, tmp_path / "m.gguf", layers=2, quant=quant, **(SMALLER | SMALLER_OF[name] | more))
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "verbose": False}
    llm = Llama(str(path), budget="50%", **options)
    entry = catalogue.load_catalogue()[name]
    assert (llm.layout.n_expert, llm.layout.n_used) == (entry.experts, entry.used)
    assert llm.n_vocab() == SMALLER["n_vocab"]
    assert {t.type.lower() for layer in llm.layout.layers for t in layer.tensors} == types
    tokens = llm.tokenize(b"In the beginning was the word")
    assert len(tokens) >= 4
    with llm.decoding():
        found = logits(llm, tokens[:3])
    assert llm.stats().decode.tokens == 3
    llm.close()
    assert np.isfinite(found).all() and (found.std(axis=1) > 0.5).all()
    unhooked = llama_cpp.Llama(str(path), lazy_mode=3, use_mmap=False, **options)
    np.testing.assert_array_equal(found, logits(unhooked, tokens[:3]))


def logits(llm: llama_cpp.Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    """After each of the tokens, decoded one by one."""
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


@pytest.mark.parametrize("name", [n for n in shapes.SHAPES if catalogue.load_catalogue()[n].quantisation == "Q4_K_M"])
def test_types_are_those_that_the_catalogue_gives_for_the_real_file(name: str) -> None:
    entry, dense = catalogue.load_catalogue()[name], shapes.SHAPES[name][1].get("n_dense", 0)
    facts = quant_mix.Facts(entry.layers + dense, entry.experts, 1)
    widths = {"gate": entry.n_embd, "up": entry.n_embd, "down": entry.n_ff}
    types = Counter(
        quant_mix.tensor_type("Q4_K_M", f"blk.{layer}.ffn_{part}_exps.weight", n_in, facts)
        for layer in range(dense, facts.n_layer)
        for part, n_in in widths.items()
    )
    assert types == entry.expert_types


@pytest.mark.parametrize(
    ("mix", "name", "n_expert", "n_in", "expected"),
    [
        ("Q4_K_M", "output.weight", 64, 2048, "Q6_K"),
        ("Q4_K_M", "output.weight", 64, 2880, "Q8_0"),
        ("Q4_K_M", "token_embd.weight", 64, 2048, "Q4_K"),
        ("Q4_K_M", "blk.0.attn_v.weight", 64, 2048, "Q6_K"),
        ("Q4_K_M", "blk.2.attn_v.weight", 64, 2048, "Q4_K"),
        ("Q4_K_M", "blk.2.attn_v.weight", 8, 2048, "Q8_0"),
        ("Q4_K_M", "blk.2.attn_output.weight", 8, 2048, "Q5_K"),
        ("Q4_K_M", "blk.0.ffn_down_shexp.weight", 64, 1408, "Q8_0"),
        ("IQ4_XS", "blk.2.attn_v.weight", 64, 2048, "Q5_K"),
        ("IQ4_XS", "blk.1.ffn_down_exps.weight", 64, 1408, "Q5_1"),
        ("MXFP4", "blk.1.attn_q.weight", 32, 2880, "Q8_0"),
        ("Q6_K", "blk.1.attn_q.weight", 32, 80, "F16"),  # no multiple of 32 either
    ],
)
def test_rules_of_the_mixes(mix: str, name: str, n_expert: int, n_in: int, expected: str) -> None:
    assert quant_mix.tensor_type(mix, name, n_in, quant_mix.Facts(16, n_expert, 4)) == expected


@pytest.mark.parametrize("quant", ["Q4_0", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"])
def test_random_blocks_have_the_deviation_that_was_asked_for(quant: str) -> None:
    """As the gguf package reads them; MXFP4 scales are powers of two."""
    qtype = GGMLQuantizationType[quant]
    values = quants.dequantize(random_blocks.blocks(np.random.default_rng(1), 0, 4096, 0.02, qtype), qtype)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(0.02, rel=0.42 if quant == "MXFP4" else 0.03)
    assert abs(values.mean()) < 0.001


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_experts_are_as_large_as_the_real_ones(name: str) -> None:
    shape, entry = shapes.shape(name), catalogue.load_catalogue()[name]
    assert (shape["n_embd"], shape["n_ff"]) == (entry.n_embd, entry.n_ff)
    assert shape["n_layer"] - shape.get("n_dense", 0) == entry.layers
    assert len(shapes.shape(name, layers=2)) == len(shape)


def test_another_number_of_experts_has_as_many_bytes() -> None:
    for experts in (32, 64, 256):
        shape = shapes.shape("qwen3-30b-a3b", experts=experts)
        assert (shape["n_expert"], shape["n_expert"] * shape["n_ff"]) == (experts, 128 * 768)
    for experts in (4, 100, 4096):
        with pytest.raises(UsageError, match=f"cannot have {experts} experts"):
            shapes.shape("qwen3-30b-a3b", experts=experts)


def test_tokens_do_not_all_choose_the_same_experts(tmp_path: Path) -> None:
    """What layers write must not drown what tokens are."""
    path = shapes.write("qwen3-30b-a3b", tmp_path / "m.gguf", layers=4, **(SMALLER | {"n_head_kv": 2, "n_embd": 256, "n_ff": 64}))
    with_cache = Llama(str(path), budget="50%", io="none", n_ctx=128, n_threads=1, verbose=False)
    text = " ".join(shapes.frequent_words()[20:120])
    with with_cache.decoding():
        for token in with_cache.tokenize(text.encode())[:100]:
            with_cache.eval([token])
    for layer in with_cache.decoded_by_layer():
        assert layer.miss_rate > 0.3
    with_cache.close()


def test_an_existing_file_is_not_overwritten_without_force(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    done = run("mixtral-8x7b", "--out", tmp_path / "m.gguf")
    assert done.returncode == 2 and done.stderr == f"make_shape_model: {tmp_path}/m.gguf exists; give another name, or --force.\n"
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_number_of_layers_the_model_cannot_have_is_refused(tmp_path: Path) -> None:
    done = run("deepseek-v2-lite", "--layers", 1, "--out", tmp_path / "m.gguf")
    assert done.returncode == 2
    assert done.stderr == "make_shape_model: deepseek-v2-lite has 27 layers, so give --layers 2 to 27.\n"
    assert list(tmp_path.iterdir()) == []
