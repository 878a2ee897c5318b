"""Random blocks of ggml's quantised types, written directly: packing floats would take hours for a large model.

A block is random bytes but for its scales (ggml/src/ggml-common.h): these are valid, give the standard deviation that was
asked for, and a mean of 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Array = npt.NDArray[Any]

# ggml's kvalues_iq4nl
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def _mins_like_scales(blocks: Array) -> None:
    """Q4_K and Q5_K: sub-block j is d * sc[j] * q - dmin * m[j], eight pairs of 6 bits in bytes 4 to 15. Makes m[j] = sc[j]."""
    blocks[:, 8:12] = blocks[:, 4:8]
    blocks[:, 12:16] = (blocks[:, 12:16] & 0x0F) * 0x11


@dataclass(frozen=True)
class _Form:
    """Where the scales of a type are.

    spread: standard deviation of a block's values, in its scale. at: offset of the scale, F16. sign: the scale takes either sign
    (the codes have a mean below 0, weights should not). least: offset and factor of a second F16, in the scale: what is added or
    taken away. prepare: fits other fields of the blocks.
    """

    spread: float
    at: int = 0
    sign: bool = False
    least: tuple[int, float] | None = None
    prepare: Callable[[Array], None] | None = None


_SIX_BITS = _rms(range(64))  # of K-quants' scales of sub-blocks
_FORMS = {
    GGMLQuantizationType.Q4_0: _Form(4.6, sign=True),
    GGMLQuantizationType.Q8_0: _Form(73.9, sign=True),
    GGMLQuantizationType.MXFP4: _Form(2.9),  # ggml's kvalues_mxfp4, in halves
    GGMLQuantizationType.Q5_0: _Form(_rms(range(-16, 16)), sign=True),
    GGMLQuantizationType.Q5_1: _Form(_rms(np.arange(32) - 15.5), least=(2, -15.5)),
    GGMLQuantizationType.IQ4_NL: _Form(_rms(_IQ4_NL), sign=True),
    GGMLQuantizationType.IQ4_XS: _Form(_rms(np.arange(64) - 32) * _rms(_IQ4_NL)),
    GGMLQuantizationType.Q4_K: _Form(_SIX_BITS * _rms(np.arange(16) - 7.5), least=(2, 7.5), prepare=_mins_like_scales),
    GGMLQuantizationType.Q5_K: _Form(_SIX_BITS * _rms(np.arange(32) - 15.5), least=(2, 15.5), prepare=_mins_like_scales),
    GGMLQuantizationType.Q6_K: _Form(_rms(range(-128, 128)) * _rms(range(-32, 32)), at=208),
}


def block_size(quant: str) -> int:
    """Values in one block of a type: a row is a multiple of it."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[quant]][0])


def pool_blocks(qtype: GGMLQuantizationType) -> int:
    """Blocks in the pool of a type, 34 million values. A prime: no two rows of a matrix start at the same block."""
    return 2**20 + 7 if GGML_QUANT_SIZES[qtype][0] == 32 else 2**17 + 29


@functools.lru_cache(maxsize=4)  # 19 to 36 MB each; a mix has three types or four
def _pool(seed: int, qtype: GGMLQuantizationType) -> Array:
    """Random blocks; drawing each expert anew would take minutes for a large model."""
    n, block_bytes = pool_blocks(qtype), int(GGML_QUANT_SIZES[qtype][1])
    blocks = np.frombuffer(np.random.default_rng(seed).bytes(n * block_bytes), dtype=np.uint8).reshape(n, block_bytes)
    prepare = _FORMS[qtype].prepare
    if prepare:
        blocks = blocks.copy()
        prepare(blocks)
    return blocks


def blocks(rng: np.random.Generator, seed: int, n: int, std: float, qtype: GGMLQuantizationType) -> Array:
    """`n` blocks [n, bytes of one] from a random place of the pool on, with the scales that give the standard deviation `std`."""
    pool, form = _pool(seed, qtype), _FORMS[qtype]
    data = np.empty((n, pool.shape[1]), dtype=np.uint8)
    at, done = int(rng.integers(len(pool))), 0
    while done < n:
        part = pool[at : at + n - done]
        data[done : done + len(part)] = part
        done, at = done + len(part), 0
    scale = std / form.spread
    if qtype is GGMLQuantizationType.MXFP4:
        data[:, 0] = 127 + round(math.log2(scale))  # one byte of exponent
        return data
    low, high = _half(scale)
    data[:, form.at] = low
    data[:, form.at + 1] = data[:, form.at + 1] & 0x80 | high if form.sign else high
    if form.least:
        offset, factor = form.least
        data[:, offset], data[:, offset + 1] = _half(scale * factor)
    return data


def _half(value: float) -> tuple[np.uint8, np.uint8]:
    low, high = np.array([value], dtype="<f2").view(np.uint8)
    return low, high
