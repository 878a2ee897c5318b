"""What is kept of the distributions of `original`, a file for each chunk of text, in the user's cache.

The likelihood of `original` does not depend on budget or eviction, so a chunk is scored once for all that is compared with it.
The files belong to a model, an engine and the tokens of a chunk: texts that are cut alike share them. 2.5 KB for each scored
token, and less where a model is surer. A file that is missing or damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cacheroute.errors import CacherouteError
from cacheroute.evals import divergence
from cacheroute.evals.divergence import Position
from cacheroute.evals.loading import text_fingerprint
from cacheroute.evals.text import Chunk
from cacheroute.files import VERSION, cache_dir, replaced
from cacheroute.install import patched_llama_cpp
from cacheroute.model import gguf_file

_FORMAT = "cacheroute-reference-1"


def folder_name(model: Path) -> str:
    """Of the files of a model, below the cache folder of whoever scores."""
    of = [_FORMAT, VERSION, patched_llama_cpp.module().__version__, gguf_file.content_fingerprint(model)]
    kept = [divergence.FLOOR, divergence.DRAWS]
    return "reference-" + hashlib.sha256(json.dumps([of, kept]).encode()).hexdigest()[:16]


def _file(folder: str, chunk: Chunk) -> Path:
    return cache_dir() / "scores" / folder / f"{text_fingerprint([chunk])}.npz"


def read(folder: str, chunk: Chunk) -> list[Position] | None:
    """What is kept of each scored position of a chunk, or None."""
    try:
        with np.load(_file(folder, chunk)) as file:
            likeliest, n_top, n, tokens, log_p = (file[name] for name in ("likeliest", "n_top", "n", "tokens", "log_p"))
        if not len(likeliest) == len(n_top) == len(n) == chunk.n_scored or not len(tokens) == len(log_p) == n.sum():
            return None
        if log_p.dtype != np.float32 or any(a.dtype != np.uint32 for a in (likeliest, n_top, n, tokens)) or (n_top > n).any():
            return None
        if not np.isfinite(log_p).all():
            return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(n)
    parts = zip(likeliest, n_top, ends - n, ends, strict=True)
    return [Position(int(best), int(top), tokens[a:b], log_p[a:b]) for best, top, a, b in parts]


def write(folder: str, chunk: Chunk, positions: Sequence[Position]) -> None:
    """Raises CacherouteError when it cannot be written."""
    path = _file(folder, chunk)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CacherouteError(f"{path.parent} cannot be made ({e.strerror}).") from None
    with replaced(path) as part, part.open("wb") as file:
        np.savez(
            file,
            likeliest=np.array([p.likeliest for p in positions], np.uint32),
            n_top=np.array([p.n_top for p in positions], np.uint32),
            n=np.array([len(p.tokens) for p in positions], np.uint32),
            tokens=np.concatenate([p.tokens for p in positions]),
            log_p=np.concatenate([p.log_p for p in positions]),
        )
