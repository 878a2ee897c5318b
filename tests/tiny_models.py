"""Tiny mixture-of-experts GGUF files with random weights, one per architecture that the tests need.

Every tensor is drawn from its own generator, seeded by the file's seed and the tensor's name. So a
file split into shards, or one with merged gate and up tensors, holds the very weights of its plain
twin, and tests may compare their outputs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

HEAD_DIM = 16
LORA_RANK = 32  # of deepseek2's compressed queries, keys and values
ROPE_DIM = 8  # the part of a deepseek2 head that is rotated
WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "that", "was", "he", "for", "on", "are", "with", "this")

Array = npt.NDArray[Any]
Key = float | bool | str  # a GGUF key's value; whole numbers are written as unsigned integers


@dataclass(frozen=True)
class Shape:
    """What the caller of `write` may choose; the defaults are those of qwen3moe."""

    n_layer: int = 2  # dense leading layers included
    n_dense: int = 0  # leading layers without experts (deepseek2 only)
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 32
    n_used: int = 4
    n_ff: int = 32  # of one expert
    n_group: int = 0  # expert groups (deepseek2 only), of which half are used
    quant: str = "F16"  # of the experts: F32, F16, Q8_0, Q4_0 or MXFP4
    merged: bool = False  # gate and up in one tensor (deepseek2 only)
    n_ctx_train: int = 512
    shards: int = 1
    chat_template: str | None = None


@dataclass
class _Tensor:
    """A tensor still to be drawn: its numpy shape, its type and how to draw its bytes."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    draw: Callable[[], Array]


@dataclass
class _Model:
    """Keys and tensors of one file, collected before anything is written."""

    arch: str
    shape: Shape
    seed: int
    keys: dict[str, Key] = field(default_factory=dict)
    tensors: list[_Tensor] = field(default_factory=list)

    def set(self, **keys: Key) -> None:
        """Add keys under the architecture's prefix; `__` stands for a dot."""
        self.keys.update({f"{self.arch}.{k.replace('__', '.')}": v for k, v in keys.items()})

    def rng(self, name: str) -> np.random.Generator:
        """The generator that belongs to one tensor name."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def add(self, name: str, *shape: int, std: float, mean: float = 0.0, quant: str = "F32") -> None:
        """A tensor of normal (or, when quantised, evenly spread) values, shape in numpy's order."""
        qtype = GGMLQuantizationType[quant]
        self.tensors.append(_Tensor(name, shape, qtype, lambda: _random(self.rng(name), shape, std, mean, qtype)))

    def linear(self, name: str, n_out: int, n_in: int, gain: float = 1.0, quant: str = "F16") -> None:
        """A matrix that maps inputs of unit variance to outputs with standard deviation `gain`."""
        self.add(name, n_out, n_in, std=gain / math.sqrt(n_in), quant=quant)

    def norm(self, name: str, n: int) -> None:
        """The weights of an RMS norm, near 1."""
        self.add(name, n, std=0.1, mean=1.0)


def _random(rng: np.random.Generator, shape: tuple[int, ...], std: float, mean: float, qtype: GGMLQuantizationType) -> Array:
    """Random values of a GGML type. Quantised blocks are drawn as bytes: packing floats would take seconds."""
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        values: Array = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        return values.astype(np.float16) if qtype is GGMLQuantizationType.F16 else values
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    n_blocks = math.prod(shape) // block
    data: Array = np.frombuffer(rng.bytes(n_blocks * block_bytes), dtype=np.uint8).reshape(n_blocks, block_bytes).copy()
    if qtype is GGMLQuantizationType.MXFP4:
        # One byte of exponent; the 16 values (in halves, see ggml's kvalues_mxfp4) have a spread of 2.9.
        data[:, 0] = 127 + round(math.log2(std / 2.9))
    else:
        spread = {GGMLQuantizationType.Q4_0: 4.6, GGMLQuantizationType.Q8_0: 73.9}[qtype]
        data[:, :2] = np.array([std / spread], dtype=np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def _attention(m: _Model, il: int, *, bias: bool = False, out_bias: bool = False, qk_norm: str = "") -> None:
    """Plain grouped-query attention. `qk_norm`: none, per 'head', or over the 'full' width."""
    s, p = m.shape, f"blk.{il}."
    widths = {"q": s.n_head * HEAD_DIM, "k": s.n_head_kv * HEAD_DIM, "v": s.n_head_kv * HEAD_DIM}
    m.norm(p + "attn_norm.weight", s.n_embd)
    for part, width in widths.items():
        m.linear(f"{p}attn_{part}.weight", width, s.n_embd)
        if bias:
            m.add(f"{p}attn_{part}.bias", width, std=0.1)
        if qk_norm and part != "v":
            m.norm(f"{p}attn_{part}_norm.weight", HEAD_DIM if qk_norm == "head" else width)
    m.linear(p + "attn_output.weight", s.n_embd, widths["q"], gain=0.3)
    if out_bias:
        m.add(p + "attn_output.bias", s.n_embd, std=0.02)


def _experts(m: _Model, il: int, *, bias: bool = False) -> None:
    """Router and routed experts.

    The router's logits spread by about 1.5, so that many experts get used; what the experts add to
    the residual stream is kept small beside the embedding, or all tokens would soon look alike and
    share their experts.
    """
    s, p = m.shape, f"blk.{il}."
    m.linear(p + "ffn_gate_inp.weight", s.n_expert, s.n_embd, gain=1.5, quant="F32")
    up_std, down_std = 1 / math.sqrt(s.n_embd), 0.6 / math.sqrt(s.n_ff)
    gate, up = p + "ffn_gate_exps.weight", p + "ffn_up_exps.weight"
    one = (s.n_expert, s.n_ff, s.n_embd)
    if s.merged:
        qtype = GGMLQuantizationType[s.quant]

        def both() -> Array:
            return np.concatenate([_random(m.rng(n), one, up_std, 0.0, qtype) for n in (gate, up)], axis=1)

        merged = (s.n_expert, 2 * s.n_ff, s.n_embd)
        m.tensors.append(_Tensor(p + "ffn_gate_up_exps.weight", merged, qtype, both))
    else:
        m.add(gate, *one, std=up_std, quant=s.quant)
        m.add(up, *one, std=up_std, quant=s.quant)
    m.add(p + "ffn_down_exps.weight", s.n_expert, s.n_embd, s.n_ff, std=down_std, quant=s.quant)
    if bias:
        m.add(p + "ffn_gate_inp.bias", s.n_expert, std=0.2)
        for part, width in (("gate", s.n_ff), ("up", s.n_ff), ("down", s.n_embd)):
            m.add(f"{p}ffn_{part}_exps.bias", s.n_expert, width, std=0.05)


def _ffn(m: _Model, il: int, suffix: str, n_ff: int) -> None:
    """A dense feed-forward block: a shared expert (`_shexp`) or a layer without experts (no suffix)."""
    s, p = m.shape, f"blk.{il}."
    m.linear(f"{p}ffn_gate{suffix}.weight", n_ff, s.n_embd)
    m.linear(f"{p}ffn_up{suffix}.weight", n_ff, s.n_embd)
    m.linear(f"{p}ffn_down{suffix}.weight", s.n_embd, n_ff, gain=0.3)


def _moe_layers(m: _Model, **attention: Any) -> None:
    """The layers that most architectures share: attention, a norm, routed experts."""
    for il in range(m.shape.n_layer):
        _attention(m, il, **attention)
        m.norm(f"blk.{il}.ffn_norm.weight", m.shape.n_embd)
        _experts(m, il)


def _qwen3moe(m: _Model) -> None:
    m.set(expert_feed_forward_length=m.shape.n_ff)
    _moe_layers(m, qk_norm="head")


def _qwen2moe(m: _Model) -> None:
    m.set(expert_feed_forward_length=m.shape.n_ff, expert_shared_feed_forward_length=2 * m.shape.n_ff)
    _moe_layers(m, bias=True)
    for il in range(m.shape.n_layer):
        m.add(f"blk.{il}.ffn_gate_inp_shexp.weight", m.shape.n_embd, std=1 / math.sqrt(m.shape.n_embd))
        _ffn(m, il, "_shexp", 2 * m.shape.n_ff)


def _olmoe(m: _Model) -> None:
    _moe_layers(m, qk_norm="full")


def _granitemoe(m: _Model) -> None:
    m.set(logit_scale=2.0, residual_scale=0.7, embedding_scale=1.5, attention__scale=0.2)
    m.set(expert_shared_feed_forward_length=2 * m.shape.n_ff)
    _moe_layers(m)
    for il in range(m.shape.n_layer):
        _ffn(m, il, "_shexp", 2 * m.shape.n_ff)


def _gpt_oss(m: _Model) -> None:
    s = m.shape
    m.set(expert_feed_forward_length=s.n_ff, attention__sliding_window=16)
    for il in range(s.n_layer):
        _attention(m, il, bias=True, out_bias=True)
        m.add(f"blk.{il}.attn_sinks.weight", s.n_head, std=1.0)
        m.norm(f"blk.{il}.post_attention_norm.weight", s.n_embd)
        _experts(m, il, bias=True)


def _deepseek2(m: _Model, *, v3: bool) -> None:
    """DeepSeek V2 (softmax router, plain attention) or V3 (sigmoid, selection bias, groups, MLA)."""
    s, nope = m.shape, HEAD_DIM
    m.set(leading_dense_block_count=s.n_dense, expert_feed_forward_length=s.n_ff, expert_shared_count=1)
    m.set(attention__q_lora_rank=LORA_RANK, attention__kv_lora_rank=LORA_RANK, rope__dimension_count=ROPE_DIM)
    if v3:
        m.set(expert_gating_func=2, expert_weights_norm=True, expert_weights_scale=2.5)
        m.set(attention__head_count_kv=1, attention__key_length=LORA_RANK + ROPE_DIM, attention__value_length=LORA_RANK)
        m.set(attention__key_length_mla=nope + ROPE_DIM, attention__value_length_mla=HEAD_DIM)
    else:
        m.set(expert_gating_func=1, expert_weights_norm=False, attention__head_count_kv=s.n_head)
        m.set(attention__key_length=nope + ROPE_DIM, attention__value_length=HEAD_DIM)
    if s.n_group:
        m.set(expert_group_count=s.n_group, expert_group_used_count=s.n_group // 2)
    for il in range(s.n_layer):
        p = f"blk.{il}."
        m.norm(p + "attn_norm.weight", s.n_embd)
        m.norm(p + "attn_q_a_norm.weight", LORA_RANK)
        m.norm(p + "attn_kv_a_norm.weight", LORA_RANK)
        m.linear(p + "attn_q_a.weight", LORA_RANK, s.n_embd)
        m.linear(p + "attn_q_b.weight", s.n_head * (nope + ROPE_DIM), LORA_RANK)
        m.linear(p + "attn_kv_a_mqa.weight", LORA_RANK + ROPE_DIM, s.n_embd)
        if v3:
            m.add(p + "attn_k_b.weight", s.n_head, LORA_RANK, nope, std=1 / math.sqrt(nope), quant="F16")
            m.add(p + "attn_v_b.weight", s.n_head, HEAD_DIM, LORA_RANK, std=1 / math.sqrt(LORA_RANK), quant="F16")
        else:
            m.linear(p + "attn_kv_b.weight", s.n_head * (nope + HEAD_DIM), LORA_RANK)
        m.linear(p + "attn_output.weight", s.n_embd, s.n_head * HEAD_DIM, gain=0.3)
        m.norm(p + "ffn_norm.weight", s.n_embd)
        if il < s.n_dense:
            _ffn(m, il, "", 4 * s.n_ff)
            continue
        _experts(m, il)
        _ffn(m, il, "_shexp", s.n_ff)
        if v3:
            m.add(p + "exp_probs_b.bias", s.n_expert, std=0.1)


_DEEPSEEK = Shape(n_layer=3, n_dense=1, n_expert=16)
# name -> (llama.cpp's name, default shape, what it adds to the file)
_ARCHS: dict[str, tuple[str, Shape, Callable[[_Model], None]]] = {
    "qwen3moe": ("qwen3moe", Shape(), _qwen3moe),
    "qwen2moe": ("qwen2moe", Shape(n_expert=12), _qwen2moe),
    "olmoe": ("olmoe", Shape(n_head_kv=4, n_expert=16), _olmoe),
    "llama": ("llama", Shape(n_expert=8, n_used=2), _moe_layers),
    "deepseek2": ("deepseek2", replace(_DEEPSEEK, n_group=4), lambda m: _deepseek2(m, v3=True)),
    "deepseek2-softmax": ("deepseek2", replace(_DEEPSEEK, n_used=3), lambda m: _deepseek2(m, v3=False)),
    "gpt-oss": ("gpt-oss", Shape(n_expert=8, n_used=2, quant="MXFP4"), _gpt_oss),
    "granitemoe": ("granitemoe", Shape(n_expert=16), _granitemoe),
}
ARCHS: tuple[str, ...] = tuple(_ARCHS)


def shape_of(arch: str, **overrides: Any) -> Shape:
    """The shape that `write` uses for an architecture."""
    return replace(_ARCHS[arch][1], **overrides)


def _tokenizer() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary: controls, all bytes, letters, some words."""
    normal, unknown, control, byte = 1, 2, 3, 6
    tokens: list[tuple[str, float, int]] = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    tokens += [(f"<0x{i:02X}>", 0.0, byte) for i in range(256)]
    tokens += [("\u2581" + w, -float(i), normal) for i, w in enumerate(WORDS)]
    seen = {"\u2581" + w for w in WORDS}
    # A word is merged pair by pair, so each of its prefixes must be a token too.
    for word in sorted(seen):
        for piece in [word[:n] for n in range(1, len(word))] + list(word):
            if piece not in seen:
                seen.add(piece)
                tokens.append((piece, -100.0 - len(tokens), normal))
    names, scores, types = zip(*tokens, strict=True)
    return list(names), list(scores), list(types)


def _add_metadata(writer: GGUFWriter, m: _Model) -> None:
    """The keys of the model and its tokenizer."""
    s, arch = m.shape, m.arch
    common: dict[str, Key] = {
        "general.name": f"tiny {arch}",
        f"{arch}.context_length": s.n_ctx_train,
        f"{arch}.embedding_length": s.n_embd,
        f"{arch}.block_count": s.n_layer,
        f"{arch}.feed_forward_length": 4 * s.n_ff if arch == "deepseek2" else s.n_ff,
        f"{arch}.attention.head_count": s.n_head,
        f"{arch}.attention.head_count_kv": s.n_head_kv,
        f"{arch}.attention.key_length": HEAD_DIM,
        f"{arch}.attention.value_length": HEAD_DIM,
        f"{arch}.rope.dimension_count": HEAD_DIM,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.expert_count": s.n_expert,
        f"{arch}.expert_used_count": s.n_used,
    }
    for key, value in {**common, **m.keys}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    tokens, scores, types = _tokenizer()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if s.chat_template:
        writer.add_chat_template(s.chat_template)


def _check(arch: str, s: Shape) -> None:
    """Refuse shapes that llama.cpp would abort on, or that an architecture cannot have."""
    if arch.partition("-")[0] != "deepseek2" and (s.merged or s.n_group or s.n_dense):
        raise ValueError(f"{arch} has no merged gate_up, expert groups or dense layers")
    if arch in ("qwen2moe", "olmoe") and s.n_embd != s.n_head * HEAD_DIM:
        raise ValueError(f"{arch} needs n_embd = n_head * {HEAD_DIM}")
    block = GGML_QUANT_SIZES[GGMLQuantizationType[s.quant]][0]
    if s.n_embd % block or s.n_ff % block:
        raise ValueError(f"rows of {s.quant} are multiples of {block}")


def write(arch: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random model and return the path to load.

    `overrides` are fields of `Shape`. With `shards=2`, NAME.gguf becomes NAME-00001-of-00002.gguf and
    its sibling, and the first is returned. One tensor at a time is held in memory.
    """
    llama_arch, default, build = _ARCHS[arch]
    shape = replace(default, **overrides)
    if overrides.get("n_embd") and "n_head" not in overrides and arch in ("qwen2moe", "olmoe"):
        n_head = shape.n_embd // HEAD_DIM  # these two have no head size of their own
        shape = replace(shape, n_head=n_head, n_head_kv=n_head)
    _check(arch, shape)
    m = _Model(llama_arch, shape, seed)
    n_vocab = len(_tokenizer()[0])
    m.add("token_embd.weight", n_vocab, shape.n_embd, std=1.0, quant="F16")
    build(m)
    m.norm("output_norm.weight", shape.n_embd)
    m.linear("output.weight", n_vocab, shape.n_embd, gain=2.0)

    paths = [path]
    if shape.shards > 1:
        paths = [path.with_name(f"{path.stem}-{i + 1:05d}-of-{shape.shards:05d}.gguf") for i in range(shape.shards)]
    per_shard = -(-len(m.tensors) // shape.shards)
    for i, part_path in enumerate(paths):
        part = m.tensors[i * per_shard : (i + 1) * per_shard]
        writer = GGUFWriter(str(part_path), llama_arch)
        if i == 0:
            _add_metadata(writer, m)
        if shape.shards > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", shape.shards)
            writer.add_int32("split.tensors.count", len(m.tensors))
        _write_tensors(writer, part)
    return paths[0]


def _write_tensors(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    """Write the header, then the tensors as they are drawn."""
    for t in tensors:
        block, block_bytes = GGML_QUANT_SIZES[t.qtype]
        nbytes = math.prod(t.shape) // block * block_bytes
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), nbytes, raw_dtype=t.qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.draw())
    writer.close()
