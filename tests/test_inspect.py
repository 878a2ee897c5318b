"""`cacheroute inspect`: the header in numbers, quickly, and without touching tensor data."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import time
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model.gguf_file import GgufFile, TensorInfo
from cacheroute.model.report import Report
from support import tiny_models

inspector = importlib.import_module("cacheroute.model.report")
inspect = partial(importlib.import_module("cacheroute.cli.inspect").inspect, None)  # outside of a command line


def report_of(arch: str, folder: Path, **shape: object) -> Report:
    report: Report = inspector.inspect(tiny_models.write(arch, folder / f"{arch}.gguf", **shape))
    return report


@pytest.mark.parametrize(
    ("arch", "gating", "bias", "groups", "shared"),
    [
        ("qwen3moe", "softmax", False, 0, 0),
        ("qwen2moe", "softmax", False, 0, 2),
        ("granitemoe", "softmax", False, 0, 2),
        ("deepseek2", "sigmoid", True, 4, 1),
        ("deepseek2-softmax", "softmax", False, 0, 1),
        ("gpt-oss", "softmax-weight", False, 0, 0),
    ],
)
def test_gating_and_shared_experts(tmp_path: Path, arch: str, gating: str, bias: bool, groups: int, shared: int) -> None:
    report = report_of(arch, tmp_path)
    assert (report.gating, report.selection_bias, report.groups, report.shared) == (gating, bias, groups, shared)


def test_sizes_of_a_small_model(tmp_path: Path) -> None:
    report = report_of("qwen3moe", tmp_path, n_layer=3, n_expert=16, n_used=4, n_embd=64, n_ff=32, quant="Q8_0")
    expert = 3 * 64 * 32 * 34 // 32  # gate, up, down; 34 bytes for 32 weights
    assert (report.architecture, report.blocks, report.layers, report.prediction_layers) == ("qwen3moe", 3, 3, 0)
    assert (report.experts, report.used, report.shards) == (16, 4, 1)
    assert (report.expert_bytes, report.expert_bytes_all_layers) == (expert, 3 * expert)
    assert report.all_expert_bytes == 16 * 3 * expert
    assert (
        report.dense_bytes + report.embedding_bytes + report.all_expert_bytes
        == report.total_bytes
        == sum(c.nbytes for c in report.tensors)
    )
    by_class = {c.name: c for c in report.tensors}
    both = by_class["experts, gate and up"], by_class["experts, down"]
    assert sum(c.nbytes for c in both) == report.all_expert_bytes
    assert [c.types for c in both] == [{"Q8_0": 6}, {"Q8_0": 3}]
    assert by_class["router"].types == {"F32": 3}
    rows = [(b.budget, b.experts, b.resident_bytes, b.worst_read_bytes_per_token) for b in report.budgets]
    every, pages = 3 * expert, 3 * 3 * 2 * mmap.PAGESIZE  # an expert of a tensor may lie across two pages
    assert rows == [  # 25% is the least budget: not said twice
        ("least", 4, 4 * pages, 4 * every),
        ("50%", 8, 8 * pages, 4 * every),
        ("75%", 12, 12 * pages, 4 * every),
        ("all", 16, 16 * pages, 0),
    ]


def test_a_split_model_is_the_whole_model(tmp_path: Path) -> None:
    whole = report_of("deepseek2", tmp_path)
    split = report_of("deepseek2", tmp_path, shards=3)
    assert split.shards == 3
    assert (split.total_bytes, split.tensors, split.budgets) == (whole.total_bytes, whole.tensors, whole.budgets)


def large_split_model(folder: Path, shards: int, layers: int) -> Path:
    """Headers of a model that claims some 100 GB, with a vocabulary of real size; the data is one hole."""
    e, d, ff, q8 = 128, 4096, 2048, GGMLQuantizationType.Q8_0
    vocabulary = [f"token{i}" for i in range(150_000)]
    paths = [folder / f"large-{i + 1:05}-of-{shards:05}.gguf" for i in range(shards)]
    block, size = GGML_QUANT_SIZES[q8]
    for i, path in enumerate(paths):
        w = gguf.GGUFWriter(str(path), "qwen3moe")
        w.add_uint16("split.no", i)
        w.add_uint16("split.count", shards)
        if i == 0:
            for key, value in {"block_count": layers, "expert_count": e, "expert_used_count": 8, "context_length": 40960}.items():
                w.add_uint32(f"qwen3moe.{key}", value)
            w.add_token_list(vocabulary)
            w.add_token_merges([f"to ken{i}" for i in range(150_000)])
        total = 0
        for layer in range(i * layers // shards, (i + 1) * layers // shards):
            shapes = [(f"ffn_{part}_exps", (e, ff, d)) for part in ("gate", "up")] + [
                ("ffn_down_exps", (e, d, ff)),
                ("attn_q", (d, d)),
            ]
            for name, shape in shapes:
                nbytes = int(np.prod(shape)) // block * size
                w.add_tensor_info(f"blk.{layer}.{name}.weight", shape, np.dtype(np.float32), nbytes, raw_dtype=q8)
                total += nbytes
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        w.close()
        os.truncate(path, path.stat().st_size + 64 + total)
    return paths[0]


def test_a_split_model_of_100_gb_takes_less_than_a_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = large_split_model(tmp_path, shards=3, layers=30)
    seconds = []
    for _ in range(3):  # of the processor: this machine may be busy
        start = time.process_time()
        inspect(str(path), "json")
        seconds.append(time.process_time() - start)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["total_bytes"] > 100e9 and report["shards"] == 3 and report["layers"] == 30
    assert report["expert_bytes"] == 3 * 4096 * 2048 * 34 // 32
    assert min(seconds) < 1, seconds


def test_multi_token_prediction_layers_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.write("deepseek2", tmp_path / "m.gguf")
    real = inspector.gguf_file.read(path)
    more = {**real.metadata, "deepseek2.nextn_predict_layers": 1}
    monkeypatch.setattr(inspector.gguf_file, "read", lambda _: GgufFile(real.paths, more, real.tensors))
    assert inspector.inspect(path).prediction_layers == 1


def test_every_tensor_has_a_class() -> None:
    classes = {
        "blk.0.ffn_gate_up_exps.weight": "experts, gate and up",
        "blk.0.ffn_down_exps.weight": "experts, down",
        "blk.0.ffn_down_exps.bias": "expert biases and scales",
        "blk.0.ffn_gate_shexp.weight": "shared experts",
        "blk.0.ffn_gate_inp_shexp.weight": "shared experts",
        "blk.0.ffn_gate_inp.weight": "router",
        "blk.0.exp_probs_b.bias": "router",
        "blk.0.attn_norm.weight": "norms",
        "blk.0.attn_kv_b.weight": "attention",
        "blk.0.ssm_in.weight": "state space",
        "blk.0.ffn_up.weight": "dense FFN",
        "blk.46.nextn.eh_proj.weight": "prediction layers",
        "token_embd.weight": "embedding",
        "output.weight": "output",
        "rope_freqs.weight": "other",
    }
    for name, expected in classes.items():
        assert [c.name for c in inspector._classes((TensorInfo(name, (32,), "f32", 0, 0, 128),))] == [expected], name


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(tiny_models.write("deepseek2", tmp_path / "m-v3.gguf", shards=2)))
    out = capsys.readouterr().out
    for fact in ("and 1 more shard", "3, 2 with experts", "sigmoid, selection bias, 2 of 4 groups", "F16 x6", "least"):
        assert fact in out, out


def test_experts_of_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a Q4_K_M file: down projections of some layers have more bits."""
    path = tiny_models.write("qwen3moe", tmp_path / "m.gguf", mix="Q4_K_M", n_layer=4, n_embd=256, n_ff=256)
    small, large = 3 * 256 * 144, 256 * (2 * 144 + 210)  # rows of one block: Q4_K has 144 bytes, Q6_K 210
    report = inspector.inspect(path)
    assert report.expert_sizes == ((small, 2), (large, 2))
    assert report.expert_bytes_all_layers == 2 * (small + large)
    assert {c.name: c.types for c in report.tensors}["experts, down"] == {"Q4_K": 2, "Q6_K": 2}
    inspect(str(path))
    out = capsys.readouterr().out
    assert "one expert        0.11 MiB in 2 layers, 0.12 MiB in 2 layers, 0.45 MiB in all layers" in out, out


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        inspect(str(tmp_path / "none.gguf"))
    with pytest.raises(UsageError, match="text and json"):
        inspect(None, "xml")
    no_gguf = tmp_path / "no.gguf"
    no_gguf.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not a GGUF"):
        inspect(str(no_gguf))
    cut = tiny_models.write("olmoe", tmp_path / "cut.gguf")
    os.truncate(cut, cut.stat().st_size - 1000)
    with pytest.raises(CacherouteError, match="cut short"):
        inspect(str(cut))
