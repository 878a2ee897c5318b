"""Models in the shape of real ones: the experts have the real sizes, and the engine loads and decodes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import make_shape_model as shapes
import numpy as np
import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.model import catalogue

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


@pytest.mark.parametrize("quant", shapes.TYPES)
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_loads_and_decodes(name: str, quant: str, tmp_path: Path) -> None:
    path = shapes.write(name, tmp_path / "m.gguf", layers=2, quant=quant, **(SMALLER | SMALLER_OF[name]))
    llm = Llama(str(path), budget="all", n_ctx=64, n_threads=1, verbose=False)
    entry = catalogue.load_catalogue()[name]
    assert (llm.layout.n_expert, llm.layout.n_used) == (entry.experts, entry.used)
    assert llm.n_vocab() == SMALLER["n_vocab"]
    assert {t.type for layer in llm.layout.layers for t in layer.tensors} == {quant}
    tokens = llm.tokenize(b"In the beginning was the word")
    assert len(tokens) >= 4
    with llm.decoding():
        for token in tokens[:3]:
            llm.eval([token])
            assert np.isfinite(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),))).all()
    assert llm.stats().decode.tokens == 3
    llm.close()


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
