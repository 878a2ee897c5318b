"""Writes GGUF files with tensors drawn from a seed, one expert in memory at a time.

Knows tensors and a synthetic tokenizer; knows no block (random_blocks.py does) and no architecture (random_model.py).

Every tensor is drawn from its own generator, seeded by the file's seed and the tensor's name. So a
file split into shards, or one with merged gate and up tensors, holds the very weights of its plain
twin, and tests may compare their outputs.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import random_blocks
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "that", "was", "he", "for", "on", "are", "with", "this")

Array = npt.NDArray[Any]
Key = float | bool | str  # a GGUF key's value; whole numbers are written as unsigned integers


@dataclass(frozen=True)
class Tensor:
    """A tensor still to be drawn: its numpy shape, its type, and its bytes in pieces of at most one expert."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    draw: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.qtype]
        return math.prod(self.shape) // int(block) * int(block_bytes)

    def tofile(self, file: IO[bytes]) -> None:
        """What GGUFWriter.write_tensor_data asks of an array."""
        for piece in self.draw():
            file.write(np.ascontiguousarray(piece).data.cast("B"))


def random_tensor(seed: int, name: str, shape: tuple[int, ...], *, std: float, mean: float = 0.0, quant: str = "F32") -> Tensor:
    """Normal values, or random blocks of a quantised type; of three dimensions, the first is the expert."""
    qtype = GGMLQuantizationType[quant]
    return Tensor(name, shape, qtype, lambda: _values(_rng(seed, name), seed, shape, std, mean, qtype))


def merged_tensor(name: str, parts: Sequence[Tensor]) -> Tensor:
    """One tensor that holds, for each expert, the rows of all `parts`."""
    n_expert, _, width = parts[0].shape
    shape = (n_expert, sum(part.shape[1] for part in parts), width)

    def draw() -> Iterator[Array]:
        for pieces in zip(*(part.draw() for part in parts), strict=True):
            yield np.concatenate(pieces)

    return Tensor(name, shape, parts[0].qtype, draw)


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _values(
    rng: np.random.Generator, seed: int, shape: tuple[int, ...], std: float, mean: float, qtype: GGMLQuantizationType
) -> Iterator[Array]:
    if qtype in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        values: Array = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        values = values.astype(np.float16) if qtype is GGMLQuantizationType.F16 else values
        yield from values if len(shape) == 3 else [values]
        return
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    row_blocks = shape[-1] // block
    rows = shape[-2]
    if len(shape) == 3:
        pieces = [rows] * shape[0]
    else:
        at_once = max(random_blocks.pool_blocks(qtype) // row_blocks, 1)
        pieces = [min(at_once, rows - first) for first in range(0, rows, at_once)]
    for n_rows in pieces:
        yield random_blocks.blocks(rng, seed, n_rows * row_blocks, std, qtype).reshape(n_rows, row_blocks * block_bytes)


def add_keys(writer: GGUFWriter, keys: dict[str, Key]) -> None:
    """Metadata of a model."""
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


@functools.lru_cache(maxsize=2)
def tokenizer(words: tuple[str, ...] = WORDS, n_vocab: int = 0) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary: controls, all bytes, letters, words.

    `n_vocab`: words that find no room are left out, and room that is left is filled with unused tokens; 0: as many as needed.
    """
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
    tokens: list[tuple[str, float, int]] = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    tokens += [(f"<0x{i:02X}>", 0.0, byte) for i in range(256)]
    seen: set[str] = set()
    for word in words:
        # A word is merged letter by letter, so each of its prefixes must be a token too.
        piece = "\u2581" + word
        missing = [part for part in dict.fromkeys([*(piece[: n + 1] for n in range(len(piece))), *piece]) if part not in seen]
        if n_vocab and len(tokens) + len(missing) > n_vocab:
            break
        seen.update(missing)
        tokens += [(part, -float(len(tokens) + i), normal) for i, part in enumerate(missing)]
    tokens += [(f"<unused{i}>", 0.0, unused) for i in range(n_vocab - len(tokens))]
    names, scores, types = zip(*tokens, strict=True)
    return list(names), list(scores), list(types)


def add_tokenizer(writer: GGUFWriter, words: tuple[str, ...], n_vocab: int, chat_template: str | None) -> None:
    """The tokenizer's keys."""
    tokens, scores, types = tokenizer(words, n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template:
        writer.add_chat_template(chat_template)


def write_shards(
    arch: str, path: Path, tensors: Sequence[Tensor], shards: int, add_metadata: Callable[[GGUFWriter], None]
) -> Path:
    """Writes one file, or with `shards` > 1 NAME-00001-of-0000N.gguf and its siblings; returns the first."""
    paths = [path]
    if shards > 1:
        paths = [path.with_name(f"{path.stem}-{i + 1:05d}-of-{shards:05d}.gguf") for i in range(shards)]
    per_shard = -(-len(tensors) // shards)
    for i, part_path in enumerate(paths):
        part = tensors[i * per_shard : (i + 1) * per_shard]
        writer = GGUFWriter(str(part_path), arch)
        if i == 0:
            add_metadata(writer)
        if shards > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", shards)
            writer.add_int32("split.tensors.count", len(tensors))
        for t in part:
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in part:
            writer.write_tensor_data(t)
        writer.close()
    return paths[0]
