"""Evaluation text: from a file or a dataset's column to chunks of tokens. Knows no model but its tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError, pip_install
from cacheroute.files import check_regular, decoded, read_text

DOCUMENT_BREAK = "\n\f\n"  # a line that holds only a form feed, as in data/heldout.txt
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Chunk:
    """Tokens that are scored as one sequence.

    tokens[:first] are the prompt. Each of tokens[first:-1] is decoded on its own, and its logits are scored against the token
    that follows.
    """

    index: int
    tokens: tuple[int, ...]
    first: int

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - 1 - self.first


def read(path: Path | None, column: str = "text") -> str:
    """The text of a file: .jsonl and .parquet by `column`, rows joined by a blank line; anything else as it is.

    None is the held-out text of the package. Raises UsageError for what cannot be read, is not UTF-8 or has no such column.
    """
    if column != "text" and (path is None or path.suffix not in (".parquet", *_JSON_LINES)):
        raise UsageError(f"{path or 'The held-out text'} has no columns, as .jsonl and .parquet have; leave --column out.")
    try:
        if path is None:
            text = files("cacheroute").joinpath("data/heldout.txt").read_text(encoding="utf-8")
        elif path.suffix == ".parquet":
            text = "\n\n".join(_parquet(path, column))
        elif path.suffix in _JSON_LINES:
            text = "\n\n".join(_jsonl(path, column))
        else:
            text = decoded(read_text(path), str(path))
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or e}).") from None
    return text.replace(DOCUMENT_BREAK, "\n\n")


def _jsonl(path: Path, column: str) -> list[str]:
    rows = []
    for number, line in enumerate(decoded(read_text(path), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{path}, line {number}, is not JSON.") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            names = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise UsageError(
                f"{path}, line {number}, has no text in a column {column!r} (its columns: {names}); choose with --column."
            )
        rows.append(row[column])
    return rows


def pyarrow_of(path: Path) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, to read a regular file. Raises CacherouteError without them, UsageError for a file
    that is none."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise CacherouteError(f"Parquet files need pyarrow; run {pip_install('pyarrow')}.") from None
    check_regular(path, "a parquet file")
    return pa, pq


def _parquet(path: Path, column: str) -> list[str]:
    pa, pq = pyarrow_of(path)
    try:
        names = pq.read_schema(path).names
        if column not in names:
            raise UsageError(f"{path} has no column {column!r} (its columns: {', '.join(names)}); choose with --column.")
        values: list[str] = pq.read_table(path, columns=[column])[column].to_pylist()
    except pa.ArrowInvalid as e:
        raise UsageError(f"{path} is not a parquet file ({e}).") from None
    if not all(isinstance(v, str) for v in values):
        raise UsageError(f"The column {column!r} of {path} does not hold text; choose with --column.")
    return values


def cut(
    tokens: Sequence[int], length: int, stride: int | None = None, limit: int | None = None, bos: int | None = None
) -> list[Chunk]:
    """Cuts tokens into chunks of `length`, one beginning every `stride` tokens (default: `length`).

    As llama-perplexity does it: the first half of a chunk is context, what follows its middle is scored (the last `stride`
    tokens, if those are fewer, so that no token is scored twice); `bos`, if given, replaces the first token of each chunk;
    what is left over at the end is not scored. `limit` bounds the scored tokens, rounded up to whole chunks.

    Raises UsageError when there is not one chunk.
    """
    stride = stride or length
    if length < 4 or not 0 < stride <= length:
        raise UsageError(f"A chunk has at least 4 tokens and a stride is 1 to its length, not {length} and {stride}.")
    if len(tokens) < length:
        raise UsageError(
            f"The text has {len(tokens)} tokens, fewer than one chunk of {length}; give more text or a smaller --chunk."
        )
    first = length - 1 - n_scored(length, stride)
    chunks: list[Chunk] = []
    for start in range(0, len(tokens) - length + 1, stride):
        part = list(tokens[start : start + length])
        if bos is not None:
            part[0] = bos
        chunks.append(Chunk(len(chunks), tuple(part), first))
    return first_ones(chunks, limit)


def n_scored(length: int, stride: int | None = None) -> int:
    """Scored tokens of a chunk that is cut so."""
    return min(stride or length, length - 1 - length // 2)


def first_ones(chunks: list[Chunk], limit: int | None) -> list[Chunk]:
    """The first chunks with `limit` scored tokens, rounded up to whole chunks, at least one; None: all."""
    return chunks if limit is None else chunks[: max(-(-limit // chunks[0].n_scored), 1)]
