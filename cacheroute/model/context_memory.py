"""What a model takes in memory, at least, from its header: what cannot fit is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from cacheroute.errors import UsageError
from cacheroute.files import size
from cacheroute.install.machine import available_memory
from cacheroute.model import gguf_file
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile

_F16, _F32 = 2, 4
_WORTH = 64  # tokens: a context worth advising
_SLACK = 1.25  # what a matrix multiplication makes of its input, and what lies between buffers
ROOM = 128
"""Tokens of a prompt that can be computed together whatever memory is free: twice flash_attention.LEAST, as fewer cannot be cut
into passes of so many."""


def least_bytes(model: GgufFile, n_ctx: int, n_batch: int = 0) -> int:
    """Of keys and values in F16 and of the scores of a batch. Where the header leaves something open, the least that may be."""
    per_token = _F16 * _kv_layers(model) * _kv_width(model) + _F32  # and the token's id
    return n_ctx * per_token + output_bytes(model, n_batch)


def trained_context(model: GgufFile) -> int:
    """Tokens that the model was trained for; 512 where the file does not say."""
    return _number(model, "context_length", 512)


def output_bytes(model: GgufFile, n_outputs: int) -> int:
    """Of the scores of the vocabulary, for so many tokens."""
    return n_outputs * _n_vocab(model) * _F32


def compute_bytes(model: GgufFile, layout: ExpertLayout, n_tokens: int, n_kv: int, *, flash_attn: bool, n_outputs: int) -> int:
    """About what llama.cpp takes to compute a batch of `n_tokens` that looks back on `n_kv` tokens, itself included.

    The residual stream and its norm, a layer's attention scores (without flash attention of every head and pair of tokens) and
    what its experts put out. They are not alive together, but llama.cpp lays them out for the longest batch, where they do not
    overlap.
    """
    embd = _number(model, "embedding_length", 0)
    heads = max(_number(model, "attention.head_count", 1), 1)
    head = _number(model, "attention.key_length", embd // heads)
    ff = _number(model, "expert_feed_forward_length", 0) or _number(model, "feed_forward_length", embd)
    experts = layout.n_used * (2 * ff + embd) + _number(model, "expert_shared_feed_forward_length", 0) * 2
    if any(t.name.endswith("_exps.bias") for t in model.tensors):
        experts = experts * 5 // 2  # each output once more with its bias, and clamped
    attention = 3 * heads * head + (0 if flash_attn else heads * n_kv)
    mask = n_kv * (1 if flash_attn else 1.5)
    live = 4 * embd + experts + attention + mask
    return int(n_tokens * live * _F32 * _SLACK) + output_bytes(model, n_outputs)


def check(path: Path, n_ctx: int, n_batch: int = 0, *, option: str = "-c") -> None:
    """Raises UsageError when a context of `n_ctx` tokens (0: as the model was trained) does not fit the memory that is free."""
    model, free = gguf_file.read(path), available_memory()
    n_ctx = n_ctx or _number(model, "context_length", 0)
    needed = least_bytes(model, n_ctx, n_batch)
    if free is None or needed <= free:
        return
    dense = sum(t.nbytes for t in model.tensors if "_exps" not in t.name)
    fits = (free - dense) * 7 // 8 // max(least_bytes(model, 1, min(n_batch, 1)), 1)
    advice = f"give at most {fits} tokens with {option}" if fits >= _WORTH else "take a smaller model"
    raise UsageError(
        f"A context of {n_ctx} tokens takes {size(needed)} of memory beside the model, and {size(free)} are free: {advice}."
    )


def _number(model: GgufFile, key: str, default: int) -> int:
    value = model.metadata.get(f"{model.architecture}.{key}", default)
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**31 else default


def _kv_layers(model: GgufFile) -> int:
    """Hybrid models keep keys in every n-th layer only."""
    layers = _number(model, "block_count", 1)
    return layers // max(_number(model, "full_attention_interval", 1), 1)


def _kv_width(model: GgufFile) -> int:
    """Numbers kept of a token in a layer."""
    heads = max(_number(model, "attention.head_count", 1), 1)
    size = _number(model, "embedding_length", 0) // heads
    if compressed := _number(model, "attention.kv_lora_rank", 0):
        return compressed
    key, value = (_number(model, f"attention.{part}_length", size) for part in ("key", "value"))
    # an array (a number for each layer, zeros among them) is not read: then one head
    return _number(model, "attention.head_count_kv", 1) * (key + value)


def _n_vocab(model: GgufFile) -> int:
    return next((t.shape[1] for t in model.tensors if t.name == "token_embd.weight" and len(t.shape) > 1), 0)
