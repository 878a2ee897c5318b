"""Headers of models: the order of what a token uses, what is refused, and that real layouts are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cacheroute.errors import UsageError
from cacheroute.model import checks, experts, gguf_file
from cacheroute.model.experts import NotRoutableError
from support import gguf_bytes, tiny_models
from support.systems import LINUX


def parts_of(path: Path) -> list[list[str]]:
    layers = experts.layout(gguf_file.read(path)).layers
    return [[t.name.split(".")[2].removesuffix("_exps") for t in layer.tensors] for layer in layers]


def header_order(path: Path) -> list[str]:
    return [t.name for t in gguf_file.read(path).tensors if "_exps.weight" in t.name]


@pytest.mark.parametrize(
    "overrides, order", [({}, ["ffn_gate", "ffn_up", "ffn_down"]), ({"merged": True}, ["ffn_gate_up", "ffn_down"])]
)
def test_experts_are_in_the_order_of_their_use_and_the_file_is_not(
    overrides: dict[str, Any], order: list[str], tmp_path: Path
) -> None:
    path = tiny_models.write("deepseek2", tmp_path / "m.gguf", **overrides)
    assert parts_of(path) == [order] * 2
    assert header_order(path)[0] == "blk.1.ffn_down_exps.weight", "as llama-quantize writes it"


def test_any_order_of_the_file_is_the_same_layout(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf")
    gguf = gguf_bytes.read(path.read_bytes())
    ends = [*(t.offset for t in gguf.tensors[1:]), len(gguf.data)]
    pieces = [(t, gguf.data[t.offset : end]) for t, end in zip(gguf.tensors, ends, strict=True)]
    gguf.tensors, gguf.data = [], b""
    for t, data in reversed(pieces):
        gguf.tensors.append(gguf_bytes.Tensor(t.name, t.shape, t.type, len(gguf.data)))
        gguf.data += data
    other = gguf.write(tmp_path / "reversed.gguf")
    assert header_order(other) == header_order(path)[::-1]
    assert parts_of(other) == parts_of(path) == [["ffn_gate", "ffn_up", "ffn_down"]] * 2


@pytest.mark.parametrize("arch", tiny_models.ARCHS)
def test_models_in_order_pass(arch: str, tmp_path: Path) -> None:
    checks.check(gguf_file.read(tiny_models.write(arch, tmp_path / "m.gguf", shards=2)))


@pytest.mark.parametrize("n_expert, n_used", [(1, 1), (2, 2), (1024, 2)])
def test_few_and_many_experts_pass(n_expert: int, n_used: int, tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_expert=n_expert, n_used=n_used)
    assert experts.layout(gguf_file.read(path)).n_expert == n_expert


def test_a_name_that_is_no_utf8_is_read(tmp_path: Path) -> None:
    gguf = gguf_bytes.read(tiny_models.write("qwen3moe", tmp_path / "m.gguf").read_bytes())
    gguf.keys["general.name"] = gguf_bytes.STR, b"caf\xe9"
    gguf.keys["odd\udcff"] = gguf_bytes.U32, 1
    assert experts.layout(gguf_file.read(gguf.write(tmp_path / "n.gguf"))).model == "caf\ufffd"


def test_a_dense_model_is_not_a_damaged_one(tmp_path: Path) -> None:
    gguf = gguf_bytes.read(tiny_models.write("llama", tmp_path / "m.gguf").read_bytes())
    gguf.without(*(t.name for t in gguf.tensors if "_exps" in t.name))
    del gguf.keys["llama.expert_count"]
    path = gguf.write(tmp_path / "dense.gguf")
    with pytest.raises(NotRoutableError, match="is a dense model"):
        experts.layout(gguf_file.read(path))


@pytest.mark.engine
@pytest.mark.skipif(not LINUX, reason="forks")
@pytest.mark.parametrize("align", [8, 16])
def test_an_alignment_that_happens_to_fit_loads(align: int, tmp_path: Path) -> None:
    """What counts is where the first expert tensor of a file is, not the key."""
    from cacheroute.engine.llama import Llama

    gguf = gguf_bytes.read(tiny_models.write("qwen3moe", tmp_path / "m.gguf").read_bytes())
    gguf.keys["general.alignment"] = gguf_bytes.U32, align
    gguf.keys["padding"] = gguf_bytes.STR, ""
    head = len(gguf.to_bytes()) - len(gguf.data)
    gguf.keys["padding"] = gguf_bytes.STR, "x" * (-head % 32)
    path = gguf.write(tmp_path / "a.gguf")
    llm = Llama(str(path), budget="50%", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    llm.eval([5, 6, 7])
    llm.close()
    gguf.keys["padding"] = gguf_bytes.STR, "x" * (-head % 32 + align)
    with pytest.raises(UsageError, match="multiples of 32"):
        Llama(str(gguf.write(path)), verbose=False)
