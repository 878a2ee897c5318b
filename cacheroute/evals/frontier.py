"""Quality against bytes missed: many (routing, budget, eviction), each scored on the same text.

A row of the frontier is the sum of one arm's cells over all chunks. `original` comes first, as the others are compared with it.
Knows no command line.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cacheroute.errors import UsageError
from cacheroute.evals import rows, text, tune
from cacheroute.evals.loading import Source
from cacheroute.evals.rows import Arm, PerplexityRow
from cacheroute.evals.scorer import Scorer
from cacheroute.files import VERSION
from cacheroute.model import gguf_file
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Routing

FORMAT = "cacheroute-frontier-3"


@dataclass(frozen=True, kw_only=True)
class FrontierRow(PerplexityRow):
    """`ts`: decoded tokens per second, scoring included; null where the session does not measure it. `chunk_nll`: sums of nll
    over each chunk, which rows that are computed later are paired with. `routing_digest` of the routing in full.
    `timed_with`: the io, threads and pace of `ts`, "" where there is none."""

    ts: float | None
    chunk_nll: tuple[float, ...]
    routing_digest: str
    timed_with: str

    @property
    def key(self) -> Key:
        """Of its arm."""
        return self.routing_digest, self.eviction, self.budget, self.budget_experts


Key = tuple[str, str, str, int]
"""What is scored: the routing by its content, for a file of `tune` may change under its name; the rest as an Arm has it."""


def routing_digest(routing: Routing) -> str:
    """16 hex digits of a routing in full: two files of `tune` under one name differ."""
    return hashlib.sha256(strategies.routing_key(routing).encode()).hexdigest()[:16]


def key_of(arm: Arm) -> Key:
    return routing_digest(strategies.parse(arm.routing)), arm.eviction, arm.budget, arm.budget_experts


def timing(io: str, n_threads: int, flash_mbps: float | None) -> str:
    """What a speed depends on beside the settings: the io as asked for, the compute threads, and the pace."""
    return f"{io}, {n_threads} thread{'s' * (n_threads != 1)}, {f'{flash_mbps:g} MB/s' if flash_mbps else 'unpaced'}"


def is_custom(row: FrontierRow) -> bool:
    """Whether it is of a policy in Python, whose code may change under the same name: never taken from a file."""
    return row.routing.partition(":")[0] == "python"


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
    names = dict.fromkeys(["original", *routing])
    return [rows.arm(layout, r, e, b) for r, b, e in itertools.product(names, budget, eviction)]


def header(model: Path, source: Source) -> dict[str, Any]:
    """Identifies the rows of a results file: model, text and version; rows of others are refused."""
    digest = hashlib.sha256(text.read(source.path, source.column).encode()).hexdigest()[:16]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": gguf_file.content_fingerprint(model),
        "text": digest,
        "chunks": [source.chunk, source.stride, source.limit],
    }


def finished(lines: Iterable[dict[str, Any]], timed_with: str = "") -> dict[Key, FrontierRow]:
    """The rows in the lines of a results file that need not be scored again. Those without a KL and those of policies in
    Python do; and where a speed is wanted, `timed_with` of these, those without it.

    Raises UsageError for a line that is no row.
    """
    try:
        found = [FrontierRow(**{**line, "chunk_nll": tuple(map(float, line["chunk_nll"]))}) for line in lines]
        for row in found:
            check_values(row, ("chunk_nll",))
    except (KeyError, TypeError, ValueError) as e:
        raise no_row(e) from None
    kept: dict[Key, FrontierRow] = {}
    for row in found:
        if row.kl is None or is_custom(row) or (timed_with and row.timed_with != timed_with):
            continue
        kept[row.key] = row if timed_with else replace(row, ts=None, timed_with="")
    return kept


def check_values(row: FrontierRow, lists: Sequence[str]) -> None:
    """Raises TypeError for a value of another type than its field's, or that is no finite number; `lists`: fields of several."""
    for field in fields(row):
        value, text = getattr(row, field.name), str(field.type).startswith("str")
        if field.name in lists:
            fits = all(map(math.isfinite, value))
        elif text:
            fits = isinstance(value, str)
        else:
            fits = value is None or (isinstance(value, int | float) and math.isfinite(value))
        if not fits:
            raise TypeError(f"{field.name} is {value!r}")


def no_row(reason: Exception) -> UsageError:
    """For a line of a results file; `reason` names the field."""
    lacks = f"it lacks {reason}" if isinstance(reason, KeyError) else str(reason)
    return UsageError(f"The results file has a line that is no row of frontier ({lacks}); choose another file, or remove it.")


def run(
    scorer: Scorer,
    source: Source,
    wanted: Sequence[Arm],
    done: dict[Key, FrontierRow],
    keep: Callable[[FrontierRow], None],
    timed_with: str = "",
) -> None:
    """Adds the rows of `wanted` that are missing to `done`; `keep` is called with each as soon as it is complete.

    A row is compared with `original` at any budget, as its likelihood does not depend on the budget. Raises UsageError where
    `original` in `done` is of other chunks.
    """
    base = next((row.chunk_nll for row in done.values() if row.routing == "original"), None)
    if base and len(base) != len(scorer.chunks):
        raise no_row(ValueError(f"chunk_nll has {len(base)} values for {len(scorer.chunks)} chunks"))
    left = {key: arm for arm in wanted if (key := key_of(arm)) not in done}
    groups = scorer.groups([arm.requests(len(scorer.chunks)) for arm in left.values()])
    for (key, arm), cells in zip(left.items(), groups, strict=True):
        own = tuple(cell.nll_sum for cell in cells)
        base = base or own  # the first arm is `original`
        row = rows.perplexity_row(scorer.llm.layout.model or scorer.job.model.name, source, arm, base, cells)
        timed = bool(scorer.job.timing)
        ts, timed_with = (row.n_tokens / row.seconds, timed_with) if timed else (None, "")
        done[key] = FrontierRow(**asdict(row), ts=ts, chunk_nll=own, routing_digest=key[0], timed_with=timed_with)
        keep(done[key])
