"""Bytes that files, routings and evictions miss at the same KL, from the results of `cacheroute frontier --files`.

    cacheroute frontier f.jsonl --files q4.gguf,q3.gguf,q8.gguf --budget 25%,50%,75% --eviction lru,soft-lfu \\
        --routing cache-prior:lambda=0.05,cache-prior:lambda=0.1,cache-prior:lambda=0.2,tuned
    python scripts/files_table.py f.jsonl

In each memory: what `tuned` misses (of the file that misses fewest bytes with it), against one lambda with LRU of each file alone
at the same KL, interpolated between the lambdas that were scored; the gain is against the best of these files. Intervals by a
bootstrap over chunks, in which everything is interpolated and the best file chosen anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cacheroute.cli import table
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import across
from cacheroute.evals.across import FilesRow
from cacheroute.files import MIB
from cacheroute.plot import rows as plot_rows

Floats = npt.NDArray[np.float64]
_RESAMPLES = 2000


def curve(rows: Sequence[FilesRow], pick: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
    """(KL, missed bytes) of one file's LRU rows on the chunks `pick`, the least KL first; sums."""
    points = [(float(np.array(r.chunk_kl)[pick].sum()), float(np.array(r.chunk_missed)[pick].sum())) for r in rows]
    ordered = np.array(sorted(points))
    return ordered[:, 0], np.minimum.accumulate(ordered[:, 1])


def missed_at(kl: float, rows: Sequence[FilesRow], pick: npt.NDArray[np.intp]) -> float:
    """Bytes that one file misses at that KL; infinite where it always loses more."""
    x, y = curve(rows, pick)
    return float("inf") if kl < x[0] else float(np.interp(kl, x, y))


def line(own: FilesRow, files: dict[str, list[FilesRow]]) -> list[str]:
    """The cells of one memory."""
    n = len(own.chunk_kl)
    every = np.arange(n)
    draws = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))

    def ratio(pick: npt.NDArray[np.intp]) -> tuple[float, dict[str, float]]:
        kl, missed = float(np.array(own.chunk_kl)[pick].sum()), float(np.array(own.chunk_missed)[pick].sum())
        theirs = {name: missed_at(kl, rows, pick) for name, rows in files.items()}
        best = min(theirs.values())
        return (missed / best if np.isfinite(best) and best > 0 else float("nan")), theirs

    value, theirs = ratio(every)
    found = np.array([ratio(pick)[0] for pick in draws])
    tokens = own.n_tokens
    cells = [f"{own.budget} ({own.memory_mib:.1f} MiB)", own.label, f"{1000 * (own.kl or 0):.1f}"]
    cells += [f"{own.missed_mib_per_token:.3f}"]
    cells += ["; ".join(f"{f} {'-' if np.isinf(b) else f'{b / MIB / tokens:.3f}'}" for f, b in theirs.items())]
    if np.isnan(value):
        return [*cells, "none: a file misses nothing at that KL"]
    low, high = np.nanquantile(1 - found, [0.025, 0.975])
    return [*cells, f"{100 * (1 - value):.1f}% [{100 * low:.1f}, {100 * high:.1f}]"]


def report(rows: Sequence[FilesRow]) -> str:
    """The table, a line for each memory with a tuned routing."""
    head = [
        "memory",
        "tuned",
        "KL, millinats",
        "missed MiB/token",
        "one lambda, LRU, at the same KL",
        "fewer bytes than the best",
    ]
    cells = [head]
    for _, group in across.by_memory(rows):
        tuned = [r for r in group if r.routing.startswith("tuned:")]
        files: dict[str, list[FilesRow]] = {}
        for r in group:
            if r.whole or (r.eviction == "lru" and r.routing.partition(":")[0] in ("original", "cache-prior")):
                files.setdefault(r.file, []).append(r)
        if tuned and files:
            cells.append(line(min(tuned, key=lambda r: r.missed_mib_per_token), files))
    if len(cells) == 1:
        raise UsageError("There is no memory with a tuned row and rows with lru; see the commands in --help.")
    return table.as_markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    a = parser.parse_args()
    _, *lines = plot_rows.read(a.results)
    rows = list(across.finished(lines).values())
    print(report(rows))
    print(f"\n{rows[0].n_tokens} tokens, KL against {rows[0].reference}")


if __name__ == "__main__":
    try:
        main()
    except CacherouteError as e:
        sys.exit(f"{Path(__file__).name}: {e}")
