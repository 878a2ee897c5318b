"""Mixture-of-experts models with random weights, one per architecture: which tensors and keys each of them has.

The defaults are tiny, for tests; make_shape_model.py gives the shapes of real models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import quant_mix
from gguf import GGUFWriter
from random_blocks import block_size
from random_gguf import (
    WORDS,
    Key,
    Tensor,
    add_keys,
    add_tokenizer,
    merged_tensor,
    random_tensor,
    tokenizer,
    write_shards,
)


@dataclass(frozen=True)
class Shape:
    """What the caller of `write` may choose; the defaults are those of qwen3moe."""

    n_layer: int = 2  # dense leading layers included
    n_dense: int = 0  # leading layers without experts (deepseek2 only)
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    rope_dim: int = 8  # the part of a deepseek2 head that is rotated, added to head_dim
    q_lora: int = 32  # of deepseek2's compressed queries; 0: they are not compressed
    kv_lora: int = 32  # of deepseek2's compressed keys and values
    n_expert: int = 32
    n_used: int = 4
    n_ff: int = 32  # of one expert
    n_shared: int = 0  # what always runs beside the experts (qwen2moe, granitemoe, deepseek2), in widths of one
    n_ff_dense: int = 128  # of a layer without experts
    n_group: int = 0  # expert groups (deepseek2 only), of which half are used
    window: int = 16  # of gpt-oss's local attention, tokens
    quant: str = "F16"  # of the experts: F32, F16, or a type of random_blocks.py
    dense_quant: str = "F16"  # of all other matrices but the router
    mix: str = ""  # in place of the two: types as llama-quantize mixes them, one of quant_mix.MIXES
    output_gain: float = 1.0  # how strongly layers write into the residual stream, in the strength that tiny models take
    merged: bool = False  # gate and up in one tensor (deepseek2 only)
    n_vocab: int = 0  # 0: as many tokens as `words` need
    words: tuple[str, ...] = WORDS
    n_ctx_train: int = 512
    shards: int = 1
    chat_template: str | None = None
    name: str = ""


@dataclass
class _Model:
    """Keys and tensors of one file, collected before anything is written."""

    arch: str
    shape: Shape
    seed: int
    keys: dict[str, Key] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def set(self, **keys: Key) -> None:
        """Add keys under the architecture's prefix; `__` stands for a dot."""
        self.keys.update({f"{self.arch}.{k.replace('__', '.')}": v for k, v in keys.items()})

    def add(self, name: str, *shape: int, std: float, mean: float = 0.0, quant: str = "F32") -> None:
        """A tensor of random values, shape in numpy's order."""
        self.tensors.append(random_tensor(self.seed, name, shape, std=std, mean=mean, quant=quant))

    def type_of(self, name: str, n_in: int, alone: str) -> str:
        """The type of a matrix with rows of `n_in`: the mix's, or without one `alone`."""
        s = self.shape
        if not s.mix:
            return alone
        return quant_mix.tensor_type(s.mix, name, n_in, quant_mix.Facts(s.n_layer, s.n_expert, s.n_head // s.n_head_kv))

    def linear(self, name: str, n_out: int, n_in: int, gain: float = 1.0, quant: str = "") -> None:
        """A matrix that maps inputs of unit variance to outputs with standard deviation `gain`."""
        quant = quant or self.type_of(name, n_in, self.shape.dense_quant)
        self.add(name, n_out, n_in, std=gain / math.sqrt(n_in), quant=quant)

    def output(self, name: str, n_out: int, n_in: int) -> None:
        """A matrix that writes into the residual stream."""
        self.linear(name, n_out, n_in, gain=0.3 * self.shape.output_gain)

    def norm(self, name: str, n: int) -> None:
        """The weights of an RMS norm, near 1."""
        self.add(name, n, std=0.1, mean=1.0)


def _attention(m: _Model, il: int, *, bias: bool = False, out_bias: bool = False, qk_norm: str = "") -> None:
    """Plain grouped-query attention. `qk_norm`: none, per 'head', or over the 'full' width."""
    s, p = m.shape, f"blk.{il}."
    widths = {"q": s.n_head * s.head_dim, "k": s.n_head_kv * s.head_dim, "v": s.n_head_kv * s.head_dim}
    m.norm(p + "attn_norm.weight", s.n_embd)
    for part, width in widths.items():
        m.linear(f"{p}attn_{part}.weight", width, s.n_embd)
        if bias:
            m.add(f"{p}attn_{part}.bias", width, std=0.1)
        if qk_norm and part != "v":
            m.norm(f"{p}attn_{part}_norm.weight", s.head_dim if qk_norm == "head" else width)
    m.output(p + "attn_output.weight", s.n_embd, widths["q"])
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
    up_std, down_std = 1 / math.sqrt(s.n_embd), 0.6 * s.output_gain / math.sqrt(s.n_ff)
    gate, up = p + "ffn_gate_exps.weight", p + "ffn_up_exps.weight"
    one = (s.n_expert, s.n_ff, s.n_embd)
    parts = [random_tensor(m.seed, t, one, std=up_std, quant=m.type_of(t, s.n_embd, s.quant)) for t in (gate, up)]
    m.tensors += [merged_tensor(p + "ffn_gate_up_exps.weight", parts)] if s.merged else parts
    down = p + "ffn_down_exps.weight"
    m.add(down, s.n_expert, s.n_embd, s.n_ff, std=down_std, quant=m.type_of(down, s.n_ff, s.quant))
    if bias:
        m.add(p + "ffn_gate_inp.bias", s.n_expert, std=0.2)
        for part, width in (("gate", s.n_ff), ("up", s.n_ff), ("down", s.n_embd)):
            m.add(f"{p}ffn_{part}_exps.bias", s.n_expert, width, std=0.05)


def _ffn(m: _Model, il: int, suffix: str, n_ff: int) -> None:
    """A dense feed-forward block: a shared expert (`_shexp`) or a layer without experts (no suffix)."""
    s, p = m.shape, f"blk.{il}."
    m.linear(f"{p}ffn_gate{suffix}.weight", n_ff, s.n_embd)
    m.linear(f"{p}ffn_up{suffix}.weight", n_ff, s.n_embd)
    m.output(f"{p}ffn_down{suffix}.weight", s.n_embd, n_ff)


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
    m.set(expert_feed_forward_length=m.shape.n_ff, expert_shared_feed_forward_length=m.shape.n_shared * m.shape.n_ff)
    _moe_layers(m, bias=True)
    for il in range(m.shape.n_layer):
        m.add(f"blk.{il}.ffn_gate_inp_shexp.weight", m.shape.n_embd, std=1 / math.sqrt(m.shape.n_embd))
        _ffn(m, il, "_shexp", m.shape.n_shared * m.shape.n_ff)


def _olmoe(m: _Model) -> None:
    _moe_layers(m, qk_norm="full")


def _granitemoe(m: _Model) -> None:
    m.set(logit_scale=2.0, residual_scale=0.7, embedding_scale=1.5, attention__scale=0.2)
    m.set(expert_shared_feed_forward_length=m.shape.n_shared * m.shape.n_ff)
    _moe_layers(m)
    for il in range(m.shape.n_layer):
        _ffn(m, il, "_shexp", m.shape.n_shared * m.shape.n_ff)


def _gpt_oss(m: _Model) -> None:
    s = m.shape
    m.set(expert_feed_forward_length=s.n_ff, attention__sliding_window=s.window)
    for il in range(s.n_layer):
        _attention(m, il, bias=True, out_bias=True)
        m.add(f"blk.{il}.attn_sinks.weight", s.n_head, std=1.0)
        m.norm(f"blk.{il}.post_attention_norm.weight", s.n_embd)
        _experts(m, il, bias=True)


def _deepseek2(m: _Model, *, v3: bool) -> None:
    """DeepSeek V2 (softmax router, plain attention) or V3 (sigmoid, selection bias, groups, MLA)."""
    s = m.shape
    nope = s.head_dim
    m.set(leading_dense_block_count=s.n_dense, expert_feed_forward_length=s.n_ff, expert_shared_count=s.n_shared)
    m.set(attention__q_lora_rank=s.q_lora, attention__kv_lora_rank=s.kv_lora, rope__dimension_count=s.rope_dim)
    if v3:
        m.set(expert_gating_func=2, expert_weights_norm=True, expert_weights_scale=2.5)
        m.set(attention__head_count_kv=1, attention__key_length=s.kv_lora + s.rope_dim, attention__value_length=s.kv_lora)
        m.set(attention__key_length_mla=nope + s.rope_dim, attention__value_length_mla=nope)
    else:
        m.set(expert_gating_func=1, expert_weights_norm=False, attention__head_count_kv=s.n_head)
        m.set(attention__key_length=nope + s.rope_dim, attention__value_length=nope)
    if s.n_group:
        m.set(expert_group_count=s.n_group, expert_group_used_count=s.n_group // 2)
    for il in range(s.n_layer):
        p = f"blk.{il}."
        m.norm(p + "attn_norm.weight", s.n_embd)
        m.norm(p + "attn_kv_a_norm.weight", s.kv_lora)
        if s.q_lora:
            m.norm(p + "attn_q_a_norm.weight", s.q_lora)
            m.linear(p + "attn_q_a.weight", s.q_lora, s.n_embd)
            m.linear(p + "attn_q_b.weight", s.n_head * (nope + s.rope_dim), s.q_lora)
        else:
            m.linear(p + "attn_q.weight", s.n_head * (nope + s.rope_dim), s.n_embd)
        m.linear(p + "attn_kv_a_mqa.weight", s.kv_lora + s.rope_dim, s.n_embd)
        if v3:
            m.add(p + "attn_k_b.weight", s.n_head, s.kv_lora, nope, std=1 / math.sqrt(nope), quant="F16")
            m.add(p + "attn_v_b.weight", s.n_head, nope, s.kv_lora, std=1 / math.sqrt(s.kv_lora), quant="F16")
        else:
            m.linear(p + "attn_kv_b.weight", s.n_head * 2 * nope, s.kv_lora)
        m.output(p + "attn_output.weight", s.n_embd, s.n_head * nope)
        m.norm(p + "ffn_norm.weight", s.n_embd)
        if il < s.n_dense:
            _ffn(m, il, "", s.n_ff_dense)
            continue
        _experts(m, il)
        _ffn(m, il, "_shexp", s.n_shared * s.n_ff)
        if v3:
            m.add(p + "exp_probs_b.bias", s.n_expert, std=0.1)


_DEEPSEEK = Shape(n_layer=3, n_dense=1, n_expert=16, n_shared=1)
# name -> (llama.cpp's name, default shape, what it adds to the file)
_ARCHS: dict[str, tuple[str, Shape, Callable[[_Model], None]]] = {
    "qwen3moe": ("qwen3moe", Shape(), _qwen3moe),
    "qwen2moe": ("qwen2moe", Shape(n_expert=12, n_shared=2), _qwen2moe),
    "olmoe": ("olmoe", Shape(n_head_kv=4, n_expert=16), _olmoe),
    "llama": ("llama", Shape(n_expert=8, n_used=2), _moe_layers),
    "deepseek2": ("deepseek2", replace(_DEEPSEEK, n_group=4), lambda m: _deepseek2(m, v3=True)),
    "deepseek2-softmax": ("deepseek2", replace(_DEEPSEEK, n_used=3), lambda m: _deepseek2(m, v3=False)),
    "gpt-oss": ("gpt-oss", Shape(n_expert=8, n_used=2, quant="MXFP4"), _gpt_oss),
    "granitemoe": ("granitemoe", Shape(n_expert=16, n_shared=2), _granitemoe),
}
ARCHS: tuple[str, ...] = tuple(_ARCHS)


def shape_of(arch: str, **overrides: Any) -> Shape:
    """The shape that `write` uses for an architecture."""
    return replace(_ARCHS[arch][1], **overrides)


def _add_metadata(writer: GGUFWriter, m: _Model) -> None:
    """The keys of the model and its tokenizer."""
    s, arch = m.shape, m.arch
    common: dict[str, Key] = {
        "general.name": s.name or f"tiny {arch}",
        f"{arch}.context_length": s.n_ctx_train,
        f"{arch}.embedding_length": s.n_embd,
        f"{arch}.block_count": s.n_layer,
        f"{arch}.feed_forward_length": s.n_ff_dense if s.n_dense else s.n_ff,
        f"{arch}.attention.head_count": s.n_head,
        f"{arch}.attention.head_count_kv": s.n_head_kv,
        f"{arch}.attention.key_length": s.head_dim,
        f"{arch}.attention.value_length": s.head_dim,
        f"{arch}.rope.dimension_count": s.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.expert_count": s.n_expert,
        f"{arch}.expert_used_count": s.n_used,
    }
    add_keys(writer, {**common, **m.keys})
    add_tokenizer(writer, s.words, s.n_vocab, s.chat_template)


def _check(arch: str, s: Shape) -> None:
    """Refuse shapes that llama.cpp would abort on, or that an architecture cannot have."""
    if arch.partition("-")[0] != "deepseek2" and (s.merged or s.n_group or s.n_dense):
        raise ValueError(f"{arch} has no merged gate_up, expert groups or dense layers")
    if arch in ("qwen2moe", "olmoe") and s.n_embd != s.n_head * s.head_dim:
        raise ValueError(f"{arch} needs n_embd = n_head * head_dim")
    if not s.mix and (s.n_embd % block_size(s.quant) or s.n_ff % block_size(s.quant)):
        raise ValueError(f"rows of {s.quant} are multiples of {block_size(s.quant)}")


def _place(name: str) -> tuple[int, str]:
    """Where llama-quantize puts a tensor: by layer, then by name, so that ffn_down_exps comes before ffn_gate_exps and
    ffn_up_exps, as in nearly every file that is downloaded."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1, name


def write(arch: str, path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model and return the path to load.

    `overrides` are fields of `Shape`. With `shards=2`, NAME.gguf becomes NAME-00001-of-00002.gguf and
    its sibling, and the first is returned. One expert at a time is held in memory.
    """
    llama_arch, default, build = _ARCHS[arch]
    shape = replace(default, **overrides)
    if overrides.get("n_embd") and "n_head" not in overrides and arch in ("qwen2moe", "olmoe"):
        n_head = shape.n_embd // shape.head_dim  # these two have no head size of their own
        shape = replace(shape, n_head=n_head, n_head_kv=n_head)
    _check(arch, shape)
    m = _Model(llama_arch, shape, seed)
    n_vocab = len(tokenizer(shape.words, shape.n_vocab)[0])
    quant = m.type_of("token_embd.weight", shape.n_embd, shape.dense_quant)
    m.add("token_embd.weight", n_vocab, shape.n_embd, std=1.0, quant=quant)
    build(m)
    m.norm("output_norm.weight", shape.n_embd)
    m.linear("output.weight", n_vocab, shape.n_embd, gain=2.0)
    tensors = sorted(m.tensors, key=lambda tensor: _place(tensor.name))
    return write_shards(llama_arch, path, tensors, shape.shards, lambda writer: _add_metadata(writer, m))
