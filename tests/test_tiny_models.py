"""The tiny models load in the stock engine, decode, and give the same bits with lazily mapped experts."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader

from support import tiny_models
from support.decoding import last_logits

Logits = npt.NDArray[np.float32]

# LLAMA_LAZY_MODE_EXPERTS of patches/0002; no extra buffer types, in which AMX computes other bits
LAZY: dict[str, Any] = {"lazy_mode": 3, "use_mmap": False, "use_extra_bufts": False}
MAPPED: dict[str, Any] = {"use_mmap": True, "use_extra_bufts": False}

# Every architecture as it is, then what else changes how experts are stored.
CASES: dict[str, tuple[str, dict[str, Any]]] = {arch: (arch, {}) for arch in tiny_models.ARCHS} | {
    "split": ("qwen3moe", {"shards": 3}),
    "merged": ("deepseek2", {"merged": True}),
    "Q8_0": ("qwen3moe", {"quant": "Q8_0"}),
    "Q4_0": ("qwen3moe", {"quant": "Q4_0"}),
    "MXFP4": ("olmoe", {"quant": "MXFP4"}),
    "F16": ("gpt-oss", {"quant": "F16"}),
    "Q4_K_M": ("qwen3moe", {"mix": "Q4_K_M", "n_embd": 256, "n_ff": 256}),
}


@dataclass(frozen=True)
class Case:
    """One model file and its shape."""

    path: Path
    shape: tiny_models.Shape


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each of CASES in turn, in a folder of its own."""
    arch, overrides = CASES[request.param]
    path = tiny_models.write(arch, tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf", **overrides)
    return Case(path, tiny_models.shape_of(arch, **overrides))


def load(path: Path, **options: Any) -> llama_cpp.Llama:
    """Load with one thread: these models are so small that a second one only waits."""
    return llama_cpp.Llama(str(path), verbose=False, n_ctx=128, n_threads=1, n_threads_batch=1, **options)


def decode(llm: llama_cpp.Llama, n_tokens: int) -> Logits:
    """The logits after each of n random tokens, decoded one by one."""
    tokens = np.random.default_rng(1).integers(3, llm.n_vocab(), n_tokens)
    rows = []
    for token in tokens.tolist():
        llm.eval([token])
        rows.append(last_logits(llm))
    return np.array(rows)


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Where this process has a file mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            start, _, end = line.split()[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def test_the_unhooked_engine_decodes(case: Case) -> None:
    logits = decode(load(case.path), 3)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.5).all()
    assert not np.array_equal(logits[0], logits[1])


def test_lazy_experts_give_the_same_bits(case: Case) -> None:
    np.testing.assert_array_equal(decode(load(case.path, **LAZY), 8), decode(load(case.path, **MAPPED), 8))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_only_experts_and_embeddings_stay_in_the_file(case: Case) -> None:
    """Expert weights are mapped, and token embeddings that are not the output; each address is that of the tensor's own bytes."""
    llm = load(case.path, **LAZY)
    tensor_data = llama_cpp.llama_cpp._lib.llama_model_tensor_data  # patches/0003
    tensor_data.argtypes, tensor_data.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
    n_experts, own_output = 0, tensor_data(llm._model.model, b"output.weight") is not None
    for shard in sorted(case.path.parent.iterdir()):
        ranges = mapped_ranges(shard)  # before the reader maps the file as well
        for tensor in GGUFReader(shard).tensors:
            address = tensor_data(llm._model.model, tensor.name.encode())
            mapped = any(start <= address < end for start, end in ranges)
            expert, embedding = tensor.name.endswith("_exps.weight"), tensor.name == "token_embd.weight"
            assert mapped == (expert or (embedding and own_output)), tensor.name
            if mapped:
                assert ctypes.string_at(address, tensor.n_bytes) == tensor.data.tobytes()
                n_experts += expert
    assert n_experts == (case.shape.n_layer - case.shape.n_dense) * (2 if case.shape.merged else 3)
    assert tensor_data(llm._model.model, b"no.such.tensor") is None


@pytest.mark.parametrize("arch, overrides", [("qwen3moe", {"shards": 2}), ("deepseek2", {"merged": True})])
def test_models_in_two_formats_hold_the_same_weights(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_models.write(arch, tmp_path / "plain.gguf")
    other = tiny_models.write(arch, tmp_path / "other.gguf", **overrides)
    np.testing.assert_array_equal(decode(load(plain), 4), decode(load(other), 4))


def test_same_seed_same_file(tmp_path: Path) -> None:
    one, two, three = (
        tiny_models.write("llama", tmp_path / f"{i}.gguf", seed=seed).read_bytes() for i, seed in enumerate((5, 5, 6))
    )
    assert one == two != three


def test_text_survives_the_tokenizer(tmp_path: Path) -> None:
    llm = load(tiny_models.write("llama", tmp_path / "m.gguf"))
    for text in ("the cat was in this house\n", "caf\u00e9 \u2603"):
        assert llm.detokenize(llm.tokenize(text.encode())).decode() == text


def test_chat_template_is_kept(tmp_path: Path) -> None:
    llm = load(tiny_models.write("llama", tmp_path / "m.gguf", chat_template="{{ messages[0]['content'] }}"))
    assert llm.metadata["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0"])
def test_large_experts_are_written_fast(quant: str, tmp_path: Path) -> None:
    """Budget tests ask for experts of a megabyte or more."""
    start = time.process_time()
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_embd=512, n_ff=1280, n_expert=8, quant=quant)
    assert time.process_time() - start < 5  # a quarter of this on an idle machine
    tensors = [t for t in GGUFReader(path).tensors if t.name.endswith("_exps.weight")]
    assert sum(t.n_bytes for t in tensors) / 2 / 8 >= 2**20
    logits = decode(load(path, **LAZY), 2)
    assert np.isfinite(logits).all() and (logits.std(axis=1) > 0.5).all()


@pytest.mark.parametrize(
    "arch, overrides",
    [("llama", {"merged": True}), ("olmoe", {"n_group": 4}), ("qwen3moe", {"quant": "Q4_0", "n_ff": 24})],
)
def test_impossible_shapes_are_refused(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        tiny_models.write(arch, tmp_path / "m.gguf", **overrides)
