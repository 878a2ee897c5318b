"""Several quantisations of one model at equal bytes of memory, each with its routings and evictions, on the same text.

Everything is compared with `original` of one file, the reference. A file whose experts all fit into the memory is in the table as
itself: it has no misses, so no routing or eviction changes anything. Knows no command line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cacheroute.evals import frontier, rows
from cacheroute.evals.frontier import FrontierRow, routing_digest
from cacheroute.evals.loading import Source
from cacheroute.evals.rows import Arm
from cacheroute.evals.scorer import Scorer
from cacheroute.files import MIB, size
from cacheroute.model.copies import Copy
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies, tuned
from cacheroute.routing.eviction import DEFAULT

FORMAT = "cacheroute-frontier-files-2"

Open = Callable[[Copy], AbstractContextManager[Scorer]]
"""A scoring session of a file, in which everything is compared with the reference."""


@dataclass(frozen=True)
class FileArm:
    """One file in `nbytes` of memory for experts, `budget` as typed, with one routing. `whole`: all its experts fit."""

    copy: Copy
    budget: str
    nbytes: int
    arm: Arm
    whole: bool

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        """Of its row in a results file, whatever the files are called."""
        routing = routing_digest(strategies.parse(self.arm.routing))
        return self.copy.fingerprint, self.budget, routing, self.arm.eviction, self.nbytes


@dataclass(frozen=True, kw_only=True)
class FilesRow(FrontierRow):
    """One FileArm on all chunks. `file` and `reference` by their short names, `fingerprint` of the file's content.

    `delta_nll` and `kl` ... `top1_se` are against `original` of the reference. MiB: `memory_mib` for experts, those that all of
    the file's take (`experts_mib`), and its dense weights. `whole`: all its experts fit, nothing is missed. `chunk_kl`: nats
    and `chunk_missed`: bytes of each chunk. `predicted_ts`: tokens per second by the forecast, null where there is none, behind
    a drive of `flash_mbps`, null for this machine's own.
    """

    file: str
    reference: str
    fingerprint: str
    memory_mib: float
    experts_mib: float
    dense_mib: float
    whole: bool
    chunk_kl: tuple[float, ...]
    chunk_missed: tuple[float, ...]
    predicted_ts: float | None = None
    flash_mbps: float | None = None

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        return self.fingerprint, self.budget, self.routing_digest, self.eviction, round(self.memory_mib * MIB)

    @property
    def label(self) -> str:
        """What runs, without the eviction and without the path of a tuned routing."""
        return f"{self.file}, all in memory" if self.whole else f"{self.file} {tuned.short(self.routing)}"


def arms(
    copies: Sequence[Copy], routings: Sequence[str], evictions: Sequence[str], memory: Sequence[str]
) -> tuple[list[FileArm], list[str]]:
    """(all combinations, a sentence for each file that is left out at some memory), file by file.

    `memory`: budgets, those without bytes of the first file's experts. `tuned`: what `tune` has found for a file and its budget.
    Raises UsageError for what does not fit the model.
    """
    found: list[FileArm] = []
    left: list[str] = []
    for copy, text in itertools.product(copies, memory):
        nbytes = budgets.in_bytes(text, copies[0].layout)
        capacity = budgets.of_bytes(nbytes, copy.layout)
        if capacity is None:
            least = copy.layout.n_used * copy.layout.resident_bytes
            left.append(f"{copy.name} needs {size(least)} for the experts of one token, so it is not at {text}")
            continue
        whole = capacity == copy.layout.n_expert
        if whole:
            found.append(FileArm(copy, text, nbytes, Arm("original", DEFAULT, text, capacity), True))
            continue
        names = dict.fromkeys(["original", *routings])
        for name, eviction in itertools.product(names, evictions):
            if name == tuned.NAME:
                continue
            own = rows.arm(copy.layout, name, eviction, str(capacity))
            found.append(FileArm(copy, text, nbytes, replace(own, budget=text), False))
        if tuned.NAME in names:
            if tuned.path(copy.path, capacity).exists():
                best = tuned.find(copy.path, str(capacity))
                own = rows.arm(copy.layout, best.routing, best.eviction, str(capacity))
                found.append(FileArm(copy, text, nbytes, replace(own, budget=text), False))
            else:
                left.append(f"nothing is tuned for {copy.name} at {text} ({capacity} experts of each layer)")
    return found, left


def header(reference: Path, source: Source) -> dict[str, Any]:
    """Identifies the rows of a results file: the reference, the text and the version."""
    return frontier.header(reference, source) | {"format": FORMAT}


def finished(lines: Iterable[dict[str, Any]], timed_with: str = "") -> dict[tuple[str, str, str, str, int], FilesRow]:
    """The rows in the lines of a results file that need not be scored again, as frontier.finished(). Raises UsageError for a line
    that is no row."""
    found = []
    try:
        for line in lines:
            lists = {name: tuple(map(float, line[name])) for name in ("chunk_nll", "chunk_kl", "chunk_missed")}
            row = FilesRow(**{**line, **lists})
            frontier.check_values(row, tuple(lists))
            found.append(row)
    except (KeyError, TypeError, ValueError) as e:
        raise frontier.no_row(e) from None
    kept = {}
    for row in found:
        if not frontier.is_custom(row) and (not timed_with or row.whole or row.timed_with == timed_with):
            kept[row.place] = row if timed_with else replace(row, ts=None, timed_with="")
    return kept


def run(
    copies: Sequence[Copy],
    reference: Copy,
    open_session: Open,
    source: Source,
    wanted: Sequence[FileArm],
    keep: Callable[[FilesRow], None],
    begin: Callable[[Scorer, Copy, Sequence[Arm]], AbstractContextManager[None]],
    timed_with: str = "",
) -> None:
    """Scores `wanted`, a session for each file, the reference's first: all is compared with it. `keep` is called with each row as
    soon as it is complete, `begin` with what each session will score."""
    base: list[float] = []
    for copy in (reference, *(c for c in copies if c is not reference)):
        own = [a for a in wanted if a.copy is copy]
        if not own and copy is not reference:
            continue
        lossless = Arm("original", DEFAULT, "all", copy.layout.n_expert)
        scored = [lossless] * (copy is reference) + [a.arm for a in own]
        with open_session(copy) as session, begin(session, copy, scored):
            n = len(session.chunks)
            groups = session.groups([arm.requests(n) for arm in scored])
            if copy is reference:
                base = [cell.nll_sum for cell in next(groups)]
                session.keep_references()
            for a, cells in zip(own, groups, strict=True):
                keep(_row(a, session, reference, source, base, cells, timed_with))


def _row(
    a: FileArm,
    session: Scorer,
    reference: Copy,
    source: Source,
    base: Sequence[float],
    cells: Sequence[Any],
    timed_with: str,
) -> FilesRow:
    row = rows.perplexity_row(session.llm.layout.model or a.copy.path.name, source, a.arm, base, cells)
    layout = a.copy.layout
    ts = row.n_tokens / row.seconds if session.job.timing and not a.whole else None  # a file in memory runs repacked
    found = FilesRow(
        **asdict(row),
        ts=ts,
        timed_with="" if ts is None else timed_with,
        chunk_nll=tuple(c.nll_sum for c in cells),
        file=a.copy.name,
        reference=reference.name,
        fingerprint=a.copy.fingerprint,
        routing_digest=routing_digest(strategies.parse(a.arm.routing)),
        memory_mib=a.nbytes / MIB,
        experts_mib=layout.all_expert_bytes / MIB,
        dense_mib=layout.dense_bytes / MIB,
        whole=a.whole,
        chunk_kl=tuple(float(c.kl.sum()) for c in cells),
        chunk_missed=tuple(0.0 if a.whole else float(c.missed_bytes) for c in cells),
    )
    # loaded whole nothing is read: the first use of an expert after an empty cache is no miss
    return replace(found, miss_rate=0.0, missed_mib_per_token=0.0) if a.whole else found


def front(found: Sequence[FilesRow]) -> list[FilesRow]:
    """Those of one memory than which no other is as fast, or misses as little, and has less KL: by predicted speed where all have
    one, else by MiB missed."""
    predicted = all(row.predicted_ts is not None for row in found)

    def cost(row: FilesRow) -> float:
        return -(row.predicted_ts or 0.0) if predicted else row.missed_mib_per_token

    ordered = sorted(found, key=lambda row: (cost(row), row.kl or 0.0))
    return [row for i, row in enumerate(ordered) if all((row.kl or 0.0) < (before.kl or 0.0) for before in ordered[:i])]


def by_memory(found: Sequence[FilesRow]) -> Iterator[tuple[str, list[FilesRow]]]:
    """Rows of the same memory, the least first."""
    for memory in sorted({(row.memory_mib, row.budget) for row in found}):
        yield memory[1], [row for row in found if (row.memory_mib, row.budget) == memory]
