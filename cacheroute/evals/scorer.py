"""Scores of (routing, chunk), each computed once: the memory of `tune` and of the scripts that check it.

A chunk's score depends on its tokens and the settings only (perplexity.score), so it can be kept, and an interrupted search
goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cacheroute import __version__
from cacheroute.evals import loading
from cacheroute.evals.perplexity import Row, score
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.text import Chunk
from cacheroute.routing import Routing
from cacheroute.stats import MIB

if TYPE_CHECKING:
    from cacheroute.engine import Llama


@dataclass(frozen=True)
class Cell:
    """One routing on one chunk: sums over its `n` scored tokens.

    `nll` in nats, `kl` = KL(original || routing) in nats (None where it was not asked for), `misses` and `swapped` per MoE layer.
    """

    routing: str
    budget: int
    eviction: str
    chunk: int
    n: int
    nll: float
    kl: float | None
    selected: int
    misses: tuple[int, ...]
    swapped: tuple[int, ...]
    read_bytes: int
    seconds: float


def key(routing: Routing) -> str:
    """A routing in full; the name of a profile's file does not say what is in it."""
    if not routing.layers:
        return str(routing)
    return routing.name + json.dumps([r.parameters for r in routing.layers], sort_keys=True)


class Scorer:
    """Scores chunks of one text with one model. `after` is called with each cell that was not in `results`, `n_kept` were."""

    def __init__(
        self,
        llm: Llama,
        chunks: Sequence[Chunk],
        io: str,
        results: ResultsFile | None = None,
        after: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self.llm, self.chunks, self._io, self._results, self._after = llm, chunks, io, results, after
        self._cells: dict[tuple[str, int, str, int], Cell] = {}
        self.n_kept = len(results.lines) if results else 0
        self._configured: tuple[str, int, str] | None = None
        for line in results.lines if results else ():
            cell = Cell(**{**line, "misses": tuple(line["misses"]), "swapped": tuple(line["swapped"])})
            self._cells[cell.routing, cell.budget, cell.eviction, cell.chunk] = cell

    def cell(
        self,
        routing: Routing,
        budget: int,
        eviction: str,
        chunk: int,
        *,
        reference: Sequence[Row] | None = None,
    ) -> Cell:
        """The score of a chunk at a budget of so many experts per layer; with `reference` (log_probabilities()), its KL, too."""
        cell = self._cells.get((key(routing), budget, eviction, chunk))
        if cell and (reference is None or cell.kl is not None):
            return cell
        kl = 0.0
        position = 0

        def watch(log_p: Row) -> None:
            nonlocal kl, position
            assert reference is not None
            ref = reference[position]
            kl += float(np.dot(np.exp(ref), ref - log_p))
            position += 1

        self._configure(routing, budget, eviction)
        s = next(iter(score(self.llm, [self.chunks[chunk]], watch=watch if reference is not None else None)))
        cell = Cell(
            routing=key(routing),
            budget=budget,
            eviction=eviction,
            chunk=chunk,
            n=len(s.nll),
            nll=float(s.nll.sum()),
            kl=kl if reference is not None else None,
            selected=s.counters.hits + s.counters.misses,
            misses=tuple(misses for misses, _ in s.layers),
            swapped=tuple(swapped for _, swapped in s.layers),
            read_bytes=s.read_bytes,
            seconds=s.seconds,
        )
        self._cells[key(routing), budget, eviction, chunk] = cell
        if self._results:
            self._results.append(asdict(cell))
        self._after(cell)
        return cell

    def reference(self, chunk: int) -> list[Row]:
        """log_probabilities() of every scored position of a chunk, routed by `original`; float32."""
        rows: list[Row] = []
        self._configure(Routing("original"), self.llm.layout.n_expert, "lru")
        for _ in score(self.llm, [self.chunks[chunk]], watch=lambda log_p: rows.append(log_p)):
            pass
        return rows

    def _configure(self, routing: Routing, budget: int, eviction: str) -> None:
        settings = (key(routing), budget, eviction)
        if settings != self._configured:
            self.llm.configure(budget=budget, routing=routing, eviction=eviction, io=self._io)
            self._configured = settings


def opened(llm: Llama, path: Path, chunks: Sequence[Chunk], io: str, after: Callable[[Cell], None] = lambda cell: None) -> Scorer:
    """A scorer with all scores that this version has ever computed for a model file and these chunks, in the user's cache."""
    from cacheroute.build_tools import cache_dir

    header = {
        "format": "cacheroute-scores",
        "version": __version__,
        "model": loading.fingerprint(path),
        "text": loading.text_fingerprint(chunks),
    }
    name = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:16]
    return Scorer(llm, chunks, io, ResultsFile(cache_dir() / "scores" / f"{name}.jsonl", header), after)


def read_mib_per_token(cells: Sequence[Cell]) -> float:
    return sum(c.read_bytes for c in cells) / MIB / sum(c.n for c in cells)


def miss_rate(cells: Sequence[Cell]) -> float:
    """Misses per selected expert."""
    return sum(sum(c.misses) for c in cells) / max(sum(c.selected for c in cells), 1)
