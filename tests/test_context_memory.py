"""What a context takes is known from the header, and refused before it is taken."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from cacheroute import Llama
from cacheroute.errors import UsageError
from cacheroute.files import MIB
from cacheroute.model import context_memory, experts, gguf_file, memory_plan
from cacheroute.model.gguf_file import GgufFile
from support import tiny_models


def model(**metadata: int) -> GgufFile:
    keys = {"block_count": 10, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    named = {k.replace("__", "."): v for k, v in metadata.items()}
    return GgufFile((), {"general.architecture": "x", **{f"x.{k}": v for k, v in (keys | named).items()}}, ())


def test_keys_and_values_of_all_layers_in_f16() -> None:
    of_a_token = 2 * 10 * 2 * (16 + 16) + 4
    assert context_memory.least_bytes(model(), 1000) == 1000 * of_a_token
    assert context_memory.least_bytes(model(attention__key_length=32), 1) == 2 * 10 * 2 * (32 + 16) + 4


def test_where_the_header_leaves_it_open_the_least_counts() -> None:
    assert context_memory.least_bytes(model(attention__kv_lora_rank=8), 1) == 2 * 10 * 8 + 4
    assert context_memory.least_bytes(model(full_attention_interval=4), 1) == 2 * 2 * 2 * 32 + 4


def test_a_context_beyond_free_memory_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = gguf_file.read(tiny)
    least = context_memory.least_bytes(header, 1000)
    monkeypatch.setattr(context_memory, "available_memory", lambda **_: least)
    context_memory.check(tiny, 1000)
    dense = sum(t.nbytes for t in header.tensors if "_exps" not in t.name)
    fits = (least - dense) * 7 // 8 // context_memory.least_bytes(header, 1)
    with pytest.raises(UsageError, match=rf"1001 tokens takes .* give at most {fits} tokens with -c"):
        context_memory.check(tiny, 1001)
    context_memory.check(tiny, fits)
    monkeypatch.setattr(context_memory, "available_memory", lambda **_: dense)  # no context fits beside the dense weights
    with pytest.raises(UsageError, match="take a smaller model"):
        context_memory.check(tiny, 100_000)
    monkeypatch.setattr(context_memory, "available_memory", lambda **_: None)
    context_memory.check(tiny, 10**9)
    monkeypatch.setattr(context_memory, "available_memory", lambda **_: 1)
    with pytest.raises(UsageError, match="512 tokens"):
        context_memory.check(tiny, 0)


def beside(path: Path) -> int:
    """Bytes that a context of 64 tokens takes, a prompt in it and the process itself."""
    header = gguf_file.read(path)
    compute = context_memory.compute_bytes(header, experts.layout(header), 64, 64, flash_attn=True, n_outputs=1)
    return context_memory.least_bytes(header, 64) + compute + 48 * MIB


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: 1024 * 1024)
    layout = experts.layout(gguf_file.read(tiny))
    parts = r"\(.* of dense weights, .* of context, .* to compute, .* of experts\)"
    with pytest.raises(UsageError, match=rf"^[^/]*\.gguf needs .* {parts}, and 1.0 MiB are free"):
        Llama(str(tiny), n_ctx=64, budget="all", io="direct", verbose=False)
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: 1024)
    with pytest.raises(UsageError, match=r"no budget fits; free memory, or take a smaller model\.$"):
        Llama(str(tiny), n_ctx=64, budget="all", io="direct", verbose=False)
    for routing, io in ((None, "buffered"), ("original", "none")):
        monkeypatch.setattr(memory_plan, "available_memory", lambda **_: layout.dense_bytes + beside(tiny))
        with closing(Llama(str(tiny), n_ctx=64, budget="all", io=io, routing=routing, verbose=False)) as llm:
            llm.eval([5])


def test_the_advice_fits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = experts.layout(gguf_file.read(tiny))
    layer = max(layer.resident_bytes for layer in layout.layers)  # of which all experts are in memory while it computes
    free = layout.dense_bytes + beside(tiny) + 10 * layout.resident_bytes + (layout.n_expert - 10) * layer
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: free)
    with pytest.raises(UsageError, match=r": --budget 10 fits\.$"):
        Llama(str(tiny), n_ctx=64, budget="all", io="direct", verbose=False)
    with closing(Llama(str(tiny), n_ctx=64, budget=10, io="direct", verbose=False)) as llm:
        llm.eval([5])


def test_half_of_the_experts_suits_every_model(tmp_path: Path) -> None:
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", n_expert=4, n_used=3)
    with closing(Llama(str(path), budget=None, n_ctx=64, verbose=False)) as llm:
        assert llm.stats().capacity == 3
