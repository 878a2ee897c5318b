"""Quality against bytes read: many (routing, budget, eviction), each scored on the same text, here or on many machines.

A cell depends on nothing but its settings and the text, so cells run side by side and in any order; `original` comes first, as
the others are compared with it. Knows no command line.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import loading, paired, processes, text, tune
from cacheroute.evals.loading import Source
from cacheroute.evals.rows import Arm, PerplexityRow, differences, perplexity_row
from cacheroute.files import VERSION
from cacheroute.model import gguf_file
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

FORMAT = "cacheroute-frontier"


@dataclass(frozen=True)
class Job:
    """What all cells have in common."""

    model: Path
    source: Source
    threads: int
    io: str
    flash_mbps: float | None = None


@dataclass(frozen=True)
class FrontierRow(PerplexityRow):
    """A cell. `ts`: decoded tokens per second, scoring included; null where it says nothing: reads were not made, or several
    cells shared a machine. `chunk_nll`: sums of nll over each chunk, which later cells are paired with."""

    ts: float | None
    chunk_nll: tuple[float, ...]


def grid(layout: ExpertLayout, points: int) -> list[str]:
    """`original` and `points` values of every strategy, evenly spaced on its ladder (tune.ladder)."""
    found = ["original"]
    for strategy in strategies.STRATEGIES:
        rungs = tune.ladder(strategy, layout)
        n = min(points, len(rungs))
        found += [str(rungs[round(i * (len(rungs) - 1) / max(n - 1, 1))]) for i in range(n if rungs else 0)]
    return found


def arms(layout: ExpertLayout, routing: Sequence[str], eviction: Sequence[str], budget: Sequence[str]) -> list[Arm]:
    """All combinations, `original` first. Raises UsageError for what does not fit the model."""
    for name in routing:
        strategies.parse(name).check(layout.n_expert, layout.n_used, layout.indices, layout.model)
    names = dict.fromkeys(["original", *routing])
    return [Arm(r, e, b, budgets.parse(b, layout).capacity) for r, b, e in itertools.product(names, budget, eviction)]


def header(job: Job) -> dict[str, Any]:
    """What a results file holds cells of: model, text and version; others are never mixed in."""
    s = job.source
    digest = hashlib.sha256(text.read(s.path, s.column).encode()).hexdigest()[:16]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": gguf_file.fingerprint(job.model),
        "text": digest,
        "chunks": [s.chunk, s.stride, s.limit],
    }


_loaded: dict[Job, Llama] = {}  # of this process: a worker's cells share a model


def compute(job: Job, arm: Arm) -> FrontierRow:
    """Scores one cell; its differences are still to be filled in (compared). Runs in any process."""
    from cacheroute.evals.perplexity import score

    if job not in _loaded:
        _unload()
        _loaded[job] = loading.load(job.model, job.source.chunk, job.threads)
    llm = _loaded[job]
    llm.flash_mbps = job.flash_mbps
    llm.configure(budget=arm.budget, routing=arm.routing, eviction=arm.eviction, io=job.io)
    scores = list(score(llm, loading.chunks(llm, job.source)))
    row = perplexity_row(llm.layout.model or job.model.name, job.source, arm, scores, scores)
    ts = row.n_tokens / row.seconds if job.io != "none" else None
    return FrontierRow(**asdict(row), ts=ts, chunk_nll=tuple(float(s.nll.sum()) for s in scores))


def _unload() -> None:
    while _loaded:
        _loaded.popitem()[1].close()


def compared(row: FrontierRow, base: FrontierRow) -> FrontierRow:
    """With its differences to `base`."""
    tokens = [row.n_tokens // row.n_chunks] * row.n_chunks
    return replace(row, **differences(paired.compare(base.chunk_nll, row.chunk_nll, tokens)))


Map = Callable[[Job, Sequence[Arm]], Iterable[FrontierRow]]
"""Computes cells and yields them as they come."""


@contextmanager
def here() -> Iterator[Map]:
    """One after the other in this process."""
    try:
        yield lambda job, cells: (compute(job, arm) for arm in cells)
    finally:
        _unload()


@contextmanager
def workers(n: int) -> Iterator[Map]:
    """`n` processes of this machine."""
    with processes.pool(n) as pool:

        def run(job: Job, cells: Sequence[Arm]) -> Iterator[FrontierRow]:
            futures = [pool.submit(compute, job, arm) for arm in cells]
            try:
                for future in as_completed(futures):
                    yield replace(future.result(), ts=None)
            finally:
                for future in futures:
                    future.cancel()

        yield run


@contextmanager
def cluster(scheduler: str) -> Iterator[Map]:
    """The workers of a Dask scheduler; the model must have the same path there.

    Raises UsageError when dask.distributed is missing, CacherouteError when nobody answers.
    """
    try:
        from distributed import Client
        from distributed import as_completed as dask_as_completed
    except ModuleNotFoundError:
        raise UsageError("--scheduler needs dask.distributed; install it with `pip install cacheroute[dask]`.") from None
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError) as e:
        raise CacherouteError(f"No Dask scheduler answers at {scheduler} ({type(e).__name__}).") from None
    with closing(client):

        def run(job: Job, cells: Sequence[Arm]) -> Iterator[FrontierRow]:
            futures = [client.submit(compute, job, arm, pure=False) for arm in cells]
            for _, row in dask_as_completed(futures, with_results=True):
                yield replace(row, ts=None)

        yield run


def run(
    job: Job, cells: Sequence[Arm], done: Iterable[dict[str, Any]], submit: Map, keep: Callable[[FrontierRow], None]
) -> list[FrontierRow]:
    """All rows, in the order of `cells`; those that are `done` (lines of a results file) are not computed again.

    `keep` is called with each new row at once, compared with `original` of any budget (its likelihood is the same at all).
    """
    rows = {}
    for line in done:
        row = FrontierRow(**{**line, "chunk_nll": tuple(line["chunk_nll"])})
        rows[Arm(row.routing, row.eviction, row.budget, row.budget_experts)] = row
    base = next((row for row in rows.values() if row.routing == "original"), None)
    left = [arm for arm in cells if arm not in rows]
    if base is None:
        base, left = _first(job, left, submit), left[1:]
        rows[cells[0]] = base
        keep(base)
    for row in submit(job, left):
        row = compared(row, base)
        rows[Arm(row.routing, row.eviction, row.budget, row.budget_experts)] = row
        keep(row)
    return [rows[arm] for arm in cells]


def _first(job: Job, left: Sequence[Arm], submit: Map) -> FrontierRow:
    return next(iter(submit(job, left[:1])))
