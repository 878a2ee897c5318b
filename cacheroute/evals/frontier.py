"""Quality against bytes missed: many (routing, budget, eviction), each scored on the same text.

A row of the frontier is the sum of one arm's cells over all chunks. `original` comes first, as the others are compared with it.
Knows no command line.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
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

FORMAT = "cacheroute-frontier-2"


@dataclass(frozen=True, kw_only=True)
class FrontierRow(PerplexityRow):
    """`ts`: decoded tokens per second, scoring included; null where the session does not measure it. `chunk_nll`: sums of nll
    over each chunk, which rows that are computed later are paired with."""

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
    names = dict.fromkeys(["original", *routing])
    return [rows.arm(layout, r, e, b) for r, b, e in itertools.product(names, budget, eviction)]


def header(model: Path, source: Source) -> dict[str, Any]:
    """Identifies the rows of a results file: model, text and version; rows of others are refused."""
    digest = hashlib.sha256(text.read(source.path, source.column).encode()).hexdigest()[:16]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": gguf_file.fingerprint(model),
        "text": digest,
        "chunks": [source.chunk, source.stride, source.limit],
    }


def finished(lines: Iterable[dict[str, Any]]) -> dict[Arm, FrontierRow]:
    """The rows in the lines of a results file, but those without a KL, which an earlier version has written: they are scored
    again.

    Raises UsageError for a line that is no row.
    """
    try:
        found = [FrontierRow(**{**line, "chunk_nll": tuple(map(float, line["chunk_nll"]))}) for line in lines]
        for row in found:
            for field in fields(row):
                value, text = getattr(row, field.name), "str" in str(field.type)
                if field.name != "chunk_nll" and not isinstance(value, str if text else (int, float, type(None))):
                    raise TypeError(f"{field.name} is {value!r}")
        return {Arm(row.routing, row.eviction, row.budget, row.budget_experts): row for row in found if row.kl is not None}
    except (KeyError, TypeError, ValueError) as e:
        raise no_row(e) from None


def no_row(reason: Exception) -> UsageError:
    """For a line of a results file; `reason` names the field."""
    lacks = f"it lacks {reason}" if isinstance(reason, KeyError) else str(reason)
    return UsageError(f"The results file has a line that is no row of frontier ({lacks}); choose another file, or remove it.")


def run(
    scorer: Scorer, source: Source, wanted: Sequence[Arm], done: dict[Arm, FrontierRow], keep: Callable[[FrontierRow], None]
) -> None:
    """Adds the rows of `wanted` that are missing to `done`; `keep` is called with each as soon as it is complete.

    A row is compared with `original` at any budget, as its likelihood does not depend on the budget.
    """
    base = next((row.chunk_nll for row in done.values() if row.routing == "original"), None)
    left = {arm: arm.requests(len(scorer.chunks)) for arm in wanted if arm not in done}
    for arm, cells in zip(left, scorer.groups(list(left.values())), strict=True):
        own = tuple(cell.nll_sum for cell in cells)
        base = base or own  # the first arm is `original`
        row = rows.perplexity_row(scorer.llm.layout.model or scorer.job.model.name, source, arm, base, cells)
        ts = row.n_tokens / row.seconds if scorer.job.timing else None
        done[arm] = FrontierRow(**asdict(row), ts=ts, chunk_nll=own)
        keep(done[arm])
