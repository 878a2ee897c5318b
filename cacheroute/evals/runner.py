"""Computes cells, a cell being one routing on one chunk, with a model loaded in this process.

A cell depends on its request and the tokens of its chunk only, so cells may be computed in any order and in any process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cacheroute.evals import loading
from cacheroute.evals.perplexity import ChunkScore, LogP, score
from cacheroute.evals.text import Chunk
from cacheroute.install.machine import available_memory, big_cores
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import EXPERTS, Routing, routing_key
from cacheroute.trace.trace_file import Header, Trace, record_dtype

if TYPE_CHECKING:
    from cacheroute.engine.checkpoint import Checkpoint
    from cacheroute.engine.llama import Llama


class Request(NamedTuple):
    """One cell: a routing, the experts of each layer in memory, an eviction, a chunk's index, and whether the KL is wanted."""

    routing: Routing
    budget: int
    eviction: str
    chunk: int
    kl: bool = False

    @property
    def place(self) -> tuple[str, int, str, int]:
        return routing_key(self.routing), self.budget, self.eviction, self.chunk


@dataclass(frozen=True, kw_only=True)
class Cell(ChunkScore):
    """The score of a request.

    `routing` as routing_key() writes it. `kl`: nats of KL(original || routing), summed over the scored tokens, None where it was
    not wanted. `timing`: the conditions under which `seconds` are a speed, "" where they are not (see Job).
    """

    routing: str
    budget: int
    eviction: str
    kl: float | None = None
    timing: str = ""

    @property
    def place(self) -> tuple[str, int, str, int]:
        return self.routing, self.budget, self.eviction, self.chunk


@dataclass(frozen=True)
class Job:
    """What all cells of a session have in common, in all processes.

    `text` is the fingerprint of the chunks. `n_threads` of each process, 0 for all cores of its machine. `timing` is not empty
    where one cell runs at a time and misses are read: then decoding is timed, after a prompt that was evaluated in this run.
    """

    model: Path
    text: str
    n_ctx: int
    n_threads: int
    io: str
    flash_mbps: float | None = None
    n_processes: int = 1
    timing: str = ""


class Runner:
    """Computes cells of one job with a loaded model, and changes that model's settings as it needs.

    Prompts are routed by `original`, so the state after a chunk's prompt is the same for every routing of one budget and
    eviction: it is kept, up to `room` bytes, and not evaluated again.
    """

    def __init__(self, llm: Llama, job: Job, room: int | None = None) -> None:
        self.llm, self._job = llm, job
        llm.flash_mbps = job.flash_mbps
        self._room = (available_memory() or 0) // (8 * job.n_processes) if room is None else room
        self._prompts: dict[tuple[int, int, str, tuple[float, ...]], Checkpoint] = {}
        self._sequences: dict[int, bytes] = {}  # by chunk: the same at every budget
        self._configured: tuple[str, int, str] | None = None
        self._reference: tuple[int, list[LogP]] | None = None  # of the last chunk only: it is many MB

    def run(self, request: Request, chunk: Chunk) -> Cell:
        reference = self._original(chunk) if request.kl else []
        kl = 0.0
        position = 0

        def add_kl(log_p: LogP) -> None:
            nonlocal kl, position
            ref = reference[position]
            kl += float(np.dot(np.exp(ref), ref - log_p))
            position += 1

        self._configure(request.routing, request.budget, request.eviction)
        # a policy in Python keeps a state that no checkpoint has
        prompt = None if self._job.timing or request.routing.policy else self._prompt
        s = next(score(self.llm, [chunk], watch=add_kl if request.kl else None, prompt=prompt))
        return self._cell(request, s, kl if request.kl else None)

    def carried(self, request: Request, chunks: Sequence[Chunk]) -> Iterator[Cell]:
        """Cells of chunks in their order, where cache and running ranges go from each to the next; request.chunk is unused."""
        self._configure(request.routing, request.budget, request.eviction)
        for s in score(self.llm, chunks, carry=True):
            yield self._cell(request, s, None)

    def trace(self, chunks: Sequence[Chunk]) -> Trace:
        """What the routers see in those chunks, a sequence each, when `original` decodes their scored tokens one by one."""
        records: list[bytes] = []
        layout = self.llm.layout
        self._configure(Routing("original"), layout.n_expert, DEFAULT)
        with self.llm.tracing(records.append):
            for _ in score(self.llm, chunks):
                pass
        header = Header.of(layout, "original", DEFAULT, layout.n_expert)
        return Trace(header, np.frombuffer(b"".join(records), record_dtype(layout.n_expert, layout.n_used, mass=True)), True)

    def _cell(self, request: Request, s: ChunkScore, kl: float | None) -> Cell:
        key = routing_key(request.routing)
        timing = "" if request.kl else self._job.timing
        return Cell(**vars(s), routing=key, budget=request.budget, eviction=request.eviction, kl=kl, timing=timing)

    def _original(self, chunk: Chunk) -> list[LogP]:
        """log_probabilities() of every scored position of a chunk, routed by `original`."""
        if self._reference is None or self._reference[0] != chunk.index:
            rows: list[LogP] = []
            self._configure(Routing("original"), self.llm.layout.n_expert, DEFAULT)
            for _ in score(self.llm, [chunk], watch=rows.append, prompt=self._prompt):
                pass
            self._reference = chunk.index, rows
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
        settings = (routing_key(routing), budget, eviction)
        if settings != self._configured:
            self.llm.configure(budget=budget, routing=routing, eviction=eviction, io=self._job.io)
            self._configured = settings


_loaded: dict[Job, Runner] = {}  # of this process, one at most


def compute(job: Job, request: Request, chunk: Chunk) -> Cell:
    """A cell, in a process of its own or of a cluster: it loads the model of `job` and keeps it for the next request."""
    if job not in _loaded:
        while _loaded:
            _loaded.popitem()[1].llm.close()
        _loaded[job] = Runner(loading.load(job.model, job.n_ctx, job.n_threads or big_cores()), job)
    return _loaded[job].run(request, chunk)
