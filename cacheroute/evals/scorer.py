"""Scores of (routing, chunk), each computed once: the memory of `tune` and of the scripts that check it.

A chunk's score depends on its tokens and the settings only (perplexity.score), so it can be kept, and an interrupted search
goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cacheroute.evals import loading, processes
from cacheroute.evals.perplexity import Row, score
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.text import Chunk
from cacheroute.files import MIB, VERSION
from cacheroute.install.machine import available_memory
from cacheroute.model import gguf_file
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import EXPERTS, Routing
from cacheroute.trace.trace_file import Header, Trace, record_dtype

if TYPE_CHECKING:
    from cacheroute.engine.checkpoint import Checkpoint
    from cacheroute.engine.llama import Llama


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


class Ask(NamedTuple):
    """One cell: a routing, the experts of each layer in memory, an eviction, a chunk's index, and whether the KL is wanted."""

    routing: Routing
    budget: int
    eviction: str
    chunk: int
    kl: bool = False


class Runner:
    """Computes cells with a loaded model.

    Prompts are routed by `original`, so what a chunk's leaves behind is the same for every routing of one budget and eviction: it
    is kept, as far as `room` bytes go, and not evaluated again.
    """

    def __init__(self, llm: Llama, chunks: Sequence[Chunk], io: str, room: int) -> None:
        self.llm, self.chunks, self._io, self._room = llm, chunks, io, room
        self._prompts: dict[tuple[int, int, str, tuple[float, ...]], Checkpoint] = {}
        self._sequences: dict[int, bytes] = {}  # by chunk: the same at every budget
        self._configured: tuple[str, int, str] | None = None
        self._reference: tuple[int, list[Row]] | None = None  # of the chunk asked for last: a chunk's are many MB

    def run(self, ask: Ask) -> Cell:
        reference = self._rows(ask.chunk) if ask.kl else []
        kl = 0.0
        position = 0

        def watch(log_p: Row) -> None:
            nonlocal kl, position
            ref = reference[position]
            kl += float(np.dot(np.exp(ref), ref - log_p))
            position += 1

        self._configure(ask.routing, ask.budget, ask.eviction)
        s = next(iter(score(self.llm, [self.chunks[ask.chunk]], watch=watch if ask.kl else None, prompt=self._prompt)))
        return Cell(
            routing=key(ask.routing),
            budget=ask.budget,
            eviction=ask.eviction,
            chunk=ask.chunk,
            n=len(s.nll),
            nll=float(s.nll.sum()),
            kl=kl if ask.kl else None,
            selected=s.counters.hits + s.counters.misses,
            misses=tuple(misses for misses, _ in s.layers),
            swapped=tuple(swapped for _, swapped in s.layers),
            read_bytes=s.read_bytes,
            seconds=s.seconds,
        )

    def trace(self, chunks: Sequence[int]) -> Trace:
        """What the routers see in those chunks, a sequence each, when `original` decodes their scored tokens one by one."""
        records: list[bytes] = []
        self._configure(Routing("original"), self.llm.layout.n_expert, DEFAULT)
        with self.llm.tracing(records.append):
            for _ in score(self.llm, [self.chunks[i] for i in chunks]):
                pass
        layout = self.llm.layout
        header = Header.of(layout, "original", DEFAULT, layout.n_expert)
        return Trace(header, np.frombuffer(b"".join(records), record_dtype(layout.n_expert, layout.n_used, mass=True)), True)

    def _rows(self, chunk: int) -> list[Row]:
        """log_probabilities() of every scored position of a chunk, routed by `original`; float32."""
        if self._reference is None or self._reference[0] != chunk:
            rows: list[Row] = []
            self._configure(Routing("original"), self.llm.layout.n_expert, DEFAULT)
            for _ in score(self.llm, [self.chunks[chunk]], watch=lambda log_p: rows.append(log_p), prompt=self._prompt):
                pass
            self._reference = chunk, rows
        return self._reference[1]

    def _prompt(self, chunk: Chunk) -> None:
        assert self._configured
        own = tuple(r.parameters.get(EXPERTS, 0) for r in self.llm.routing.layers) if self.llm.routing else ()
        at = (chunk.index, *self._configured[1:], own)
        kept = self._prompts.get(at)
        if kept:
            self.llm.return_to(kept)
            return
        self.llm.eval(chunk.tokens[: chunk.first])
        if self._room <= 0:
            return
        mark = self.llm.checkpoint(sequence=chunk.index not in self._sequences)
        if mark.sequence is not None:
            self._sequences[chunk.index] = mark.sequence
            self._room -= len(mark.sequence)
        mark.sequence = self._sequences[chunk.index]
        self._prompts[at] = mark

    def _configure(self, routing: Routing, budget: int, eviction: str) -> None:
        settings = (key(routing), budget, eviction)
        if settings != self._configured:
            self.llm.configure(budget=budget, routing=routing, eviction=eviction, io=self._io)
            self._configured = settings


class Scorer:
    """Scores chunks of one text with one model, here or in the processes of a `pool`.

    `after` is called with each cell that was not in `results`, of which `n_kept` were.
    """

    def __init__(
        self,
        llm: Llama,
        chunks: Sequence[Chunk],
        io: str,
        results: ResultsFile | None = None,
        after: Callable[[Cell], None] = lambda cell: None,
        pool: Executor | None = None,
    ) -> None:
        self.llm, self.chunks, self.after, self._results, self._pool = llm, chunks, after, results, pool
        self._runner = Runner(llm, chunks, io, _room(1))
        self._cells: dict[tuple[str, int, str, int], Cell] = {}
        self._pending: dict[tuple[str, int, str, int, bool], Future[Cell]] = {}
        self.n_kept = len(results.lines) if results else 0
        for line in results.lines if results else ():
            cell = Cell(**{**line, "misses": tuple(line["misses"]), "swapped": tuple(line["swapped"])})
            self._cells[cell.routing, cell.budget, cell.eviction, cell.chunk] = cell

    def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool = False) -> Cell:
        """The score of a chunk at a budget of so many experts per layer."""
        ask = Ask(routing, budget, eviction, chunk, kl)
        known = self._known(ask)
        if known:
            return known
        future = self._pending.pop((key(routing), *ask[1:]), None)
        cell = future.result() if future else self._pool.submit(_run, ask).result() if self._pool else self._runner.run(ask)
        self._cells[cell.routing, cell.budget, cell.eviction, cell.chunk] = cell
        if self._results:
            self._results.append(asdict(cell))
        self.after(cell)
        return cell

    def cells(self, routing: Routing, budget: int, eviction: str, chunks: Sequence[int]) -> list[Cell]:
        """The scores of several chunks."""
        self.ahead([Ask(routing, budget, eviction, i) for i in chunks])
        return [self.cell(routing, budget, eviction, i) for i in chunks]

    def trace(self, chunks: Sequence[int]) -> Trace:
        """As Runner.trace, in this process."""
        return self._runner.trace(chunks)

    def ahead(self, asks: Sequence[Ask]) -> None:
        """What will be asked for next, in that order: a pool begins with it, and leaves what was announced before."""
        if self._pool is None:
            return
        for old, future in list(self._pending.items()):
            if future.cancel():
                del self._pending[old]
        for ask in asks:
            name = (key(ask.routing), *ask[1:])
            if not self._known(ask) and name not in self._pending:
                self._pending[name] = self._pool.submit(_run, ask)

    def _known(self, ask: Ask) -> Cell | None:
        cell = self._cells.get((key(ask.routing), ask.budget, ask.eviction, ask.chunk))
        return cell if cell and (cell.kl is not None or not ask.kl) else None


def _room(n_runners: int) -> int:
    """Bytes that each of them may keep."""
    return (available_memory() or 0) // (8 * n_runners)


_runner: Runner | None = None  # of a worker process


def _load(model: Path, chunks: Sequence[Chunk], n_threads: int, io: str, room: int) -> None:
    global _runner
    _runner = Runner(loading.load(model, max(len(c.tokens) for c in chunks), n_threads), chunks, io, room)


def _run(ask: Ask) -> Cell:
    assert _runner
    return _runner.run(ask)


@contextmanager
def workers(n: int, model: Path, chunks: Sequence[Chunk], n_threads: int, io: str) -> Iterator[Executor | None]:
    """A pool of `n` processes, each with the model and so many threads; None for one, which is this process."""
    if n < 2:
        yield None
        return
    with processes.pool(n, _load, model, chunks, n_threads, io, _room(n)) as pool:
        yield pool


@contextmanager
def session(
    path: Path,
    source: loading.Source,
    n_threads: int,
    *,
    n_workers: int = 1,
    io: str | None = None,
    budget: str | int = "50%",
    eviction: str = DEFAULT,
) -> Iterator[Scorer]:
    """A scorer of a model and a text, with all scores that this version has ever computed for them, in the user's cache.

    The threads are shared out among the workers. `budget` and `eviction` are checked before the text is read.
    """
    from cacheroute.files import cache_dir

    n_threads = max(n_threads // n_workers, 1)
    with closing(loading.load(path, source.chunk, n_threads)) as llm:
        io = io or loading.default_io(llm.layout)
        llm.configure(budget=budget, eviction=eviction, io=io)
        chunks = loading.chunks(llm, source)
        header = {
            "format": "cacheroute-scores",
            "version": VERSION,
            "model": gguf_file.fingerprint(path),
            "text": loading.text_fingerprint(chunks),
        }
        name = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:16]
        results = ResultsFile(cache_dir() / "scores" / f"{name}.jsonl", header)
        with workers(n_workers, path, chunks, n_threads, io) as pool:
            yield Scorer(llm, chunks, io, results, pool=pool)


def read_mib_per_token(cells: Sequence[Cell]) -> float:
    return sum(c.read_bytes for c in cells) / MIB / sum(c.n for c in cells)


def miss_rate(cells: Sequence[Cell]) -> float:
    """Misses per selected expert."""
    return sum(sum(c.misses) for c in cells) / max(sum(c.selected for c in cells), 1)
