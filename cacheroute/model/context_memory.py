"""What a context takes in memory, at least, from a model's header: one that cannot be is refused in time."""

from __future__ import annotations

from pathlib import Path

from cacheroute.errors import UsageError
from cacheroute.install.machine import available_memory
from cacheroute.model import gguf_file
from cacheroute.model.gguf_file import GgufFile

GIB = 1024**3
_F16, _F32 = 2, 4


def least_bytes(model: GgufFile, n_ctx: int, n_batch: int = 0) -> int:
    """Of keys and values in F16 and of the scores of a batch. Where the header leaves something open, the least that may be."""
    per_token = _F16 * _kv_layers(model) * _kv_width(model) + _F32  # and the token's id
    return n_ctx * per_token + n_batch * _n_vocab(model) * _F32


def check(path: Path, n_ctx: int, n_batch: int = 0, *, option: str = "-c") -> None:
    """Raises UsageError when a context of `n_ctx` tokens (0: as the model was trained) does not fit the memory that is free."""
    model, free = gguf_file.read(path), available_memory()
    n_ctx = n_ctx or _number(model, "context_length", 0)
    needed = least_bytes(model, n_ctx, n_batch)
    if free is None or needed <= free:
        return
    fits = max((free - n_batch * _n_vocab(model) * _F32) // max(least_bytes(model, 1), 1), 0)
    raise UsageError(
        f"A context of {n_ctx} tokens takes {needed / GIB:.1f} GiB of memory beside the model, and {free / GIB:.1f} GiB are "
        f"free: give at most {fits} tokens with {option}."
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
