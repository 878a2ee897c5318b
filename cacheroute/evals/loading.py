"""A model loaded for scoring, and its text as chunks. Knows no command line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cacheroute.evals import text
from cacheroute.install.machine import available_memory
from cacheroute.model import context_memory
from cacheroute.model.experts import ExpertLayout

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


@dataclass(frozen=True)
class Source:
    """What is scored: a file (None: the held-out text of the package), its column, and how it is cut (see text.cut)."""

    path: Path | None = None
    column: str = "text"
    chunk: int = 1024
    stride: int | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        return self.path.name if self.path else "heldout.txt"


def load(path: Path, n_ctx: int, n_threads: int) -> Llama:
    """A model with a context of `n_ctx` tokens and no hook yet: `configure` sets budget and routing."""
    from cacheroute.engine.llama import Llama

    context_memory.check(path, n_ctx, option="--chunk or -c")
    return Llama(
        str(path),
        routing=None,
        n_ctx=n_ctx,
        n_batch=min(max(n_ctx, 32), 512),
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )


def default_io(layout: ExpertLayout) -> str:
    """ "none" where all experts fit into free memory (once for all processes): equal scores and misses, faster; else "auto"."""
    free = available_memory()
    return "none" if free is not None and layout.all_expert_bytes < 0.8 * free else "auto"


def chunks(llm: Llama, source: Source) -> list[text.Chunk]:
    """Raises UsageError for text that cannot be read or is shorter than a chunk."""
    tokens = llm.tokenize(text.read(source.path, source.column).encode(), add_bos=True)
    bos = llm.token_bos() if llm._model.add_bos_token() else None
    return text.cut(tokens, source.chunk, source.stride, source.limit, bos)


def text_fingerprint(chunks: Sequence[text.Chunk]) -> str:
    """sha256 of the tokens of all chunks and where scoring begins in each, 16 hex digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(f"{chunk.first}:{','.join(map(str, chunk.tokens))};".encode())
    return digest.hexdigest()[:16]
