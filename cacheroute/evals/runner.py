"""Computes cells, a cell being one routing on one chunk, with a model loaded in this process.

A cell depends on its request and the tokens of its chunk only, so cells may be computed in any order and in any process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from cacheroute.errors import CacherouteError
from cacheroute.evals import divergence, loading, reference
from cacheroute.evals.divergence import Position
from cacheroute.evals.perplexity import ChunkScore, Floats, LogP, score
from cacheroute.evals.text import Chunk
from cacheroute.install.machine import available_memory, big_cores
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import EXPERTS, Routing, routing_key
from cacheroute.trace.trace_file import Header, Trace, record_dtype

if TYPE_CHECKING:
    from cacheroute.engine.checkpoint import Checkpoint
    from cacheroute.engine.llama import Llama


_UNWRITTEN = 16  # chunks


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

    `routing` as routing_key() writes it. `timing`: the conditions under which `seconds` are a speed, "" where they are not (see
    Job). None where no KL was wanted: `kl32`, bytes of little-endian float32, nats of KL(original || routing) of each token, and
    `same_top`, the tokens for which both have the same likeliest one.
    """

    routing: str
    budget: int
    eviction: str
    timing: str = ""
    kl32: bytes | None = None
    same_top: int | None = None

    @property
    def kl(self) -> Floats:
        """Nats of each scored token, [n]. Raises ValueError where no KL was wanted."""
        if self.kl32 is None:
            raise ValueError("This cell has no KL.")
        return np.frombuffer(self.kl32, "<f4").astype(np.float64)

    @property
    def place(self) -> tuple[str, int, str, int]:
        return self.routing, self.budget, self.eviction, self.chunk


@dataclass(frozen=True)
class Job:
    """What all cells of a session have in common, in all processes.

    `text` is the fingerprint of the chunks. `n_threads` of each process, 0 for all cores of its machine. `timing` is not empty
    where one cell runs at a time and misses are read: then decoding is timed, after a prompt that was evaluated in this run.
    `references`: the folder of what is kept of `original` (evals/reference.py), "" for none: then only that of the last chunk is.
    `reference`: the file whose `original` all is compared with, where that is another one than `model`.
    """

    model: Path
    text: str
    n_ctx: int
    n_threads: int
    io: str
    flash_mbps: float | None = None
    n_processes: int = 1
    timing: str = ""
    references: str = ""
    reference: Path | None = None


class _WithModel(Protocol):
    llm: Llama


T = TypeVar("T", bound=_WithModel)


class _Comparison:
    """Compares each position of a chunk with what is kept of `original`."""

    def __init__(self, positions: Sequence[Position]) -> None:
        self._positions = positions
        self._kl: list[float] = []
        self._same = 0

    def __call__(self, log_p: LogP) -> None:
        position = self._positions[len(self._kl)]
        self._kl.append(position.kl(log_p))
        self._same += int(log_p.argmax()) == position.likeliest

    def result(self) -> dict[str, Any]:
        """The fields of a Cell."""
        return {"kl32": np.array(self._kl, "<f4").tobytes(), "same_top": self._same}


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
        self._reference: tuple[int, list[Position]] | None = None  # of the last chunk only: it is a MB
        self._unwritten: dict[int, list[Position]] = {}  # likewise, of some chunks where the cache folder cannot be written

    def run(self, request: Request, chunk: Chunk) -> Cell:
        kept = self._kept(chunk) if request.kl else None
        own: list[Position] = []
        watch: Callable[[LogP], None] | None = None
        comparison = None
        if request.kl and not kept and not request.routing.lossy and not self._job.reference:
            watch = _keeping(own)  # this run is what others are compared with
        elif request.kl:
            watch = comparison = _Comparison(kept or self._original(chunk))
        self._configure(request.routing, request.budget, request.eviction)
        # a policy in Python keeps a state that no checkpoint has
        prompt = None if self._job.timing or request.routing.policy else self._prompt
        s = next(score(self.llm, [chunk], watch=watch, prompt=prompt))
        if own:
            self._keep(chunk, own)
        return self._cell(request, s, comparison.result() if comparison else _itself(s) if own else {})

    def carried(self, request: Request, chunks: Sequence[Chunk]) -> Iterator[Cell]:
        """Cells of chunks in their order, where cache and running ranges go from each to the next; request.chunk is unused."""
        comparisons = [_Comparison(self._kept(chunk) or self._original(chunk)) for chunk in chunks] if request.kl else []
        at = -1

        def watch(log_p: LogP) -> None:
            comparisons[at](log_p)

        self._configure(request.routing, request.budget, request.eviction)
        scores = score(self.llm, chunks, carry=True, watch=watch if comparisons else None)
        for at in range(len(chunks)):
            s = next(scores)
            yield self._cell(request, s, comparisons[at].result() if comparisons else {})

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

    def _cell(self, request: Request, s: ChunkScore, kl: dict[str, Any]) -> Cell:
        key = routing_key(request.routing)
        return Cell(**vars(s), **kl, routing=key, budget=request.budget, eviction=request.eviction, timing=self._job.timing)

    def keep_reference(self, chunk: Chunk) -> None:
        """Has what others are compared with kept for a chunk, where it is not. Only of the model that is the reference."""
        if not self._kept(chunk):
            self._original(chunk, must=True)

    def _original(self, chunk: Chunk, *, must: bool = False) -> list[Position]:
        """Scores a chunk with `original`, for others to be compared with."""
        if self._job.reference:
            gone = f"What was kept of {self._job.reference.name} for chunk {chunk.index} is gone from the cache folder"
            raise CacherouteError(f"{gone}; run the same command again.")
        own: list[Position] = []
        self._configure(Routing("original"), self.llm.layout.n_expert, DEFAULT)
        for _ in score(self.llm, [chunk], watch=_keeping(own), prompt=self._prompt):
            pass
        self._keep(chunk, own, must=must)
        return own

    def _kept(self, chunk: Chunk) -> list[Position] | None:
        if self._reference is None or self._reference[0] != chunk.index:
            found = reference.read(self._job.references, chunk) if self._job.references else None
            found = found or self._unwritten.get(chunk.index)
            if found is None:
                return None
            self._reference = chunk.index, found
        return self._reference[1]

    def _keep(self, chunk: Chunk, positions: list[Position], *, must: bool = False) -> None:
        self._reference = chunk.index, positions
        if self._job.references:
            try:
                reference.write(self._job.references, chunk, positions)
            except CacherouteError:
                if must:  # another file's session reads it from there
                    raise
                self._unwritten[chunk.index] = positions
                if len(self._unwritten) > _UNWRITTEN:
                    del self._unwritten[next(iter(self._unwritten))]

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


def _keeping(positions: list[Position]) -> Callable[[LogP], None]:
    return lambda log_p: positions.append(divergence.keep(log_p))


def _itself(s: ChunkScore) -> dict[str, Any]:
    """The fields of a Cell that is compared with itself."""
    return {"kl32": np.zeros(s.n, "<f4").tobytes(), "same_top": s.n}


class Loaded(Generic[T]):
    """What a process computes requests with: of one job, whose model stays loaded until another job comes."""

    def __init__(self) -> None:
        self._of: dict[Job, T] = {}

    def get(self, job: Job, make: Callable[[Llama], T]) -> T:
        """`make` gets the model of the job, where it is not loaded yet."""
        if job not in self._of:
            while self._of:
                self._of.popitem()[1].llm.close()
            self._of[job] = make(loading.load(job.model, job.n_ctx, job.n_threads or big_cores()))
        return self._of[job]


_runners: Loaded[Runner] = Loaded()


def compute(job: Job, request: Request, chunk: Chunk) -> Cell:
    """A cell, in a process of its own or of a cluster: it loads the model of `job` and keeps it for the next request.

    What another file has to be known for it, and is not kept on this machine, is computed first.
    """
    if request.kl and job.reference and reference.read(job.references, chunk) is None:
        own = replace(job, model=job.reference, reference=None, timing="")
        _runner(own).keep_reference(chunk)
    return _runner(job).run(request, chunk)


def _runner(job: Job) -> Runner:
    return _runners.get(job, lambda llm: Runner(llm, job))
