"""One scoring session for `eval perplexity`, `tune` and `frontier`: each cell is computed once and kept in the user's cache.

Cells are computed in this process, in several processes of this machine, or on a Dask cluster; the cells are the same
everywhere. -t is the number of compute threads of all local processes together.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError
from cacheroute.evals import loading, processes, reference
from cacheroute.evals.results import ResultsFile
from cacheroute.evals.runner import Cell, Job, Request, Runner, compute
from cacheroute.evals.session import floats32, kept_scores, opened
from cacheroute.evals.text import Chunk, first_ones
from cacheroute.files import is_count, is_number
from cacheroute.routing.eviction import DEFAULT
from cacheroute.routing.strategies import Routing
from cacheroute.trace import score_files
from cacheroute.trace.simulate import Replay

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama


class Scorer:
    """Scores chunks of one text with one model, in this process or by an `executor`.

    `after` is called with each cell that is computed and not found in `results`, of which `n_kept` were there at the start,
    `n_without_kl` without a KL.
    """

    def __init__(
        self,
        llm: Llama,
        chunks: Sequence[Chunk],
        job: Job,
        results: ResultsFile | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.llm, self.chunks, self.job = llm, chunks, job
        self.after: Callable[[Cell], None] = lambda cell: None
        self.memo: dict[tuple[object, ...], Any] = {}  # what callers derive from chunks and need again in this session
        self._results, self._executor = results, executor
        self._runner = Runner(llm, job)
        self._cells: dict[tuple[str, int, str, int], list[Cell]] = {}  # by place: with and without a KL, and by timing
        self._pending: dict[tuple[object, ...], Future[Cell]] = {}
        kept = [cell for cell in map(_from_json, results.lines if results else ()) if cell.chunk < len(chunks)]
        for cell in kept:
            self._add(cell)
        self.n_kept = len(kept)
        self.n_without_kl = sum(_lack_kl(cells) for cells in self._cells.values())

    def cell(self, routing: Routing, budget: int, eviction: str, chunk: int, *, kl: bool = False) -> Cell:
        """The score of a chunk at a budget of so many experts per layer.

        Raises CacherouteError when a process that scores has ended.
        """
        request = Request(routing, budget, eviction, chunk, kl)
        known = self._known(request)
        if known:
            return known
        try:
            cell = self._compute(request)
        except BrokenExecutor:
            raise CacherouteError("A process that scores has ended, perhaps for lack of memory; give fewer --workers.") from None
        self._add(cell)
        if self._results and not routing.policy:  # the code of a policy may change under the same name
            self._results.append(_to_json(cell))
        self.after(cell)
        return cell

    def cells(self, routing: Routing, budget: int, eviction: str, chunks: Sequence[int], *, kl: bool = False) -> list[Cell]:
        """The scores of several chunks."""
        return next(self.groups([[Request(routing, budget, eviction, i, kl) for i in chunks]]))

    def groups(self, groups: Sequence[Sequence[Request]]) -> Iterator[list[Cell]]:
        """The scores of each group of requests, while an executor works on the next ones."""
        self.submit_next([request for group in groups for request in group])
        for group in groups:
            yield [self.cell(*request[:4], kl=request.kl) for request in group]

    def carried(self, routing: Routing, budget: int, eviction: str, *, kl: bool = False) -> list[Cell]:
        """All chunks in their order, where cache and running ranges go from each to the next.

        Each cell depends on those before it, so they are computed in this process and neither kept nor taken from what is kept.
        """
        cells = []
        for cell in self._runner.carried(Request(routing, budget, eviction, 0, kl), self.chunks):
            cells.append(cell)
            self.after(cell)
        return cells

    def keep_references(self) -> None:
        """Has what other files are compared with kept for all chunks. An executor's processes do that as they need it."""
        if self._executor is None:
            for chunk in self.chunks:
                self._runner.keep_reference(chunk)

    def replay(self, chunks: Sequence[int]) -> Replay:
        """A replay of what the routers see in those chunks; traced once in a session, in this process."""
        key = ("replay", *chunks)
        if key not in self.memo:
            self.memo[key] = Replay(self._runner.trace([self.chunks[i] for i in chunks]))
        found: Replay = self.memo[key]
        return found

    def submit_next(self, requests: Sequence[Request]) -> None:
        """Has an executor begin with these requests, in this order, and cancels what it has not begun of earlier ones."""
        if self._executor is None:
            return
        for old, future in list(self._pending.items()):
            if future.cancel():
                del self._pending[old]
        for request in requests:
            key = (request.place, request.kl)
            if not self._known(request) and key not in self._pending:
                self._pending[key] = self._submit(request)

    def without_kl(self, requests: Sequence[Request]) -> int:
        """Scored tokens of those requests that were scored before there was a KL, and are scored again for it."""
        again = (r for r in requests if r.kl and _lack_kl(self._cells.get(r.place, [])))
        return sum(self.chunks[r.chunk].n_scored for r in again)

    def missing(self, requests: Sequence[Request]) -> int:
        """Scored tokens of those requests that are still to be computed."""
        return sum(self.chunks[r.chunk].n_scored for r in requests if not self._known(r))

    def _compute(self, request: Request) -> Cell:
        if self._executor is None:
            return self._runner.run(request, self.chunks[request.chunk])
        return (self._pending.pop((request.place, request.kl), None) or self._submit(request)).result()

    def _submit(self, request: Request) -> Future[Cell]:
        assert self._executor
        return self._executor.submit(compute, self.job, request, self.chunks[request.chunk])

    def _add(self, cell: Cell) -> None:
        self._cells.setdefault(cell.place, []).append(cell)

    def _known(self, request: Request) -> Cell | None:
        """Nll and counts are the same in all variants of a cell; only a KL and a speed have to be measured."""
        for cell in self._cells.get(request.place, ()):
            if (cell.kl32 is not None or not request.kl) and (cell.timing == self.job.timing or not self.job.timing):
                return cell
        return None


def _lack_kl(cells: Sequence[Cell]) -> bool:
    """Whether a place has been scored, and none of its cells has a KL."""
    return bool(cells) and all(cell.kl32 is None for cell in cells)


def _to_json(cell: Cell) -> dict[str, Any]:
    kl32 = None if cell.kl32 is None else base64.b64encode(cell.kl32).decode()
    return asdict(cell) | {"nll32": base64.b64encode(cell.nll32).decode(), "kl32": kl32}


def _from_json(line: dict[str, Any]) -> Cell:
    """Raises ValueError, KeyError or TypeError for what no session has written."""
    cell = Cell(
        **{name: value for name, value in line.items() if name != "kl"}  # format 2 had a sum named so
        | {
            "nll32": floats32(line["nll32"]),
            "kl32": None if line.get("kl32") is None else floats32(line["kl32"]),
            "misses": tuple(line["misses"]),
            "swapped": tuple(line["swapped"]),
        }
    )
    counts = (cell.chunk, cell.selected, cell.dropped, cell.examined, cell.missed_bytes, cell.budget, *cell.misses, *cell.swapped)
    texts = (cell.routing, cell.eviction, cell.timing)
    if not (is_count(*counts) and is_number(cell.seconds) and all(isinstance(text, str) for text in texts)):
        raise TypeError("a value is of another type")
    same = (cell.same_top is None) if cell.kl32 is None else is_count(cell.same_top) and len(cell.kl32) == len(cell.nll32)
    if not same or len(cell.misses) != len(cell.swapped) or (cell.same_top or 0) > cell.n:
        raise ValueError("the lengths differ")
    return cell


def _check(line: dict[str, Any], chunks: Sequence[Chunk], n_layers: int) -> None:
    """Raises ValueError, KeyError or TypeError for a line that is not of these chunks and this model."""
    cell = _from_json(line)
    if cell.chunk >= len(chunks) or cell.n != chunks[cell.chunk].n_scored or len(cell.misses) != n_layers:
        raise ValueError("it is of another text or model")


@contextmanager
def session(
    path: Path,
    source: loading.Source,
    *,
    threads: int | None = None,
    n_workers: int = 1,
    scheduler: str | None = None,
    io: str | None = None,
    flash_mbps: float | None = None,
    timed: bool = False,
    evictions: Sequence[str] = (DEFAULT,),
    reference_model: Path | None = None,
) -> Iterator[Scorer]:
    """A scorer of a model and a text, with all cells that this build has ever computed for them, in the user's cache.

    Args:
        threads: compute threads in total, shared out among the local processes or the workers of the cluster. None: all cores,
            of this machine or of each one of the cluster.
        n_workers: processes of this machine that score, each with the model loaded.
        scheduler: address of a Dask scheduler; its workers score instead and need the model at the same path.
        timed: measure the speed of decoding, with one worker and an io that reads: cells that were kept without a speed, or
            with that of another io, pace or number of threads, are computed again.
        evictions: checked, as `io` is, before the text is read.
        reference_model: a file of the same model, with whose `original` everything is compared; that file's own session has
            kept its log-probabilities before (keep_references). None: `path` itself.

    Raises UsageError for settings or text that do not fit, CacherouteError when the model or the scheduler cannot be reached.
    """
    checked = [{"budget": "all", "eviction": eviction} for eviction in evictions]
    with (
        opened(path, source.chunk, checked, threads=threads, n_workers=n_workers, io=io) as own,
        processes.cluster(scheduler) if scheduler else nullcontext((own.executor, 1)) as (executor, size),
    ):
        whole = loading.chunks(own.llm, replace(source, limit=None))
        job = own.job(loading.text_fingerprint(whole))  # with any limit: what few tokens have given serves a run of more
        pace = f"{flash_mbps:g} MB/s" if flash_mbps else "unpaced"
        job = replace(
            job,
            flash_mbps=flash_mbps if timed else None,  # the reads of a score that nobody times need no pace
            timing=f"{job.io}, {job.n_threads} threads, {pace}" if timed else "",
            references=reference.folder_name(reference_model or path),
            reference=reference_model.resolve() if reference_model else None,
        )
        if scheduler:
            job = replace(job, n_threads=max(threads // size, 1) if threads else 0, io=own.asked_io)
        check = partial(_check, chunks=whole, n_layers=len(own.llm.layout.layers))
        kept = kept_scores(path, job.text, score_files.FORMAT, check, reference_model)
        yield Scorer(own.llm, first_ones(whole, source.limit), job, kept, executor)
