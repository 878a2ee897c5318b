"""Which type llama-quantize gives to each matrix of a mixture-of-experts model, without an importance matrix.

The rules are those of llama.cpp's src/llama-quant.cpp (llama_tensor_get_type). Down projections and values of some layers get
more bits than those of others, so the experts of a Q4_K_M or IQ4_XS file have two sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from random_blocks import block_size

# The name of a mix -> the type of most of its matrices.
MIXES = {"Q4_K_M": "Q4_K", "IQ4_XS": "IQ4_XS", "MXFP4": "Q8_0", "Q6_K": "Q6_K", "Q8_0": "Q8_0"}

# What rows take that are no multiple of a type's block, 256.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model: layers in all, experts in one, and heads for each head of keys."""

    n_layer: int
    n_expert: int
    n_gqa: int


def tensor_type(mix: str, name: str, n_in: int, facts: Facts) -> str:
    """The type of a matrix by its GGUF name; `n_in` are the values in one of its rows. `mix`: of MIXES."""
    wanted = _wanted(mix, name, n_in, facts)
    if n_in % block_size(wanted):
        wanted = _FALLBACK.get(wanted, wanted)
    return wanted if n_in % block_size(wanted) == 0 else "F16"


def _wanted(mix: str, name: str, n_in: int, facts: Facts) -> str:
    base = MIXES[mix]
    if name == "output.weight":
        return "Q8_0" if base == "Q8_0" or n_in % block_size(base) else "Q6_K"
    if mix == "MXFP4":
        return "MXFP4" if "_exps." in name else base
    parts = name.split(".")
    if parts[0] != "blk":
        return base
    layer, part, eight = int(parts[1]), parts[2], facts.n_expert == 8
    if part in ("attn_v", "attn_k") and eight:
        return "Q8_0"
    if part in ("attn_v", "attn_kv_b"):
        if mix == "IQ4_XS" and facts.n_gqa >= 4:
            return "Q5_K"
        return "Q6_K" if mix == "Q4_K_M" and more_bits(layer, facts.n_layer) else base
    if part.startswith("ffn_down"):
        if mix == "IQ4_XS" and layer < facts.n_layer // 8:
            return "Q5_K"
        return "Q6_K" if mix == "Q4_K_M" and more_bits(layer, facts.n_layer) else base
    if part == "attn_output" and eight and mix in ("Q4_K_M", "IQ4_XS"):
        return "Q5_K"
    return base


def more_bits(layer: int, n_layer: int) -> bool:
    """The first eighth of the layers, the last, and every third between them."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
