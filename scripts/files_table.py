"""Bytes that files, routings and evictions miss at the same KL, from the results of `cacheroute frontier --files`.

    cacheroute frontier f.jsonl --files q4.gguf,q3.gguf,q8.gguf --budget 25%,50%,75% --eviction lru,soft-lfu \\
        --routing cache-prior:lambda=0.05,cache-prior:lambda=0.1,cache-prior:lambda=0.2,tuned
    python scripts/files_table.py f.jsonl

In each memory: what a smaller file misses with LRU and one lambda, against the larger files with LRU and the lambda that has the
same KL, interpolated between those that were scored; and what `tuned` misses against these, and against all files. The gain is
against the best of them. Intervals by a bootstrap over chunks, in which everything is interpolated and the best file chosen anew.
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
    """Bytes that one file misses at that KL; infinite where it always loses more, NaN where it loses less with every lambda."""
    x, y = curve(rows, pick)
    if kl < x[0]:
        return float("inf")
    return float("nan") if kl > x[-1] and y[-1] > 0 else float(np.interp(kl, x, y))


def line(own: FilesRow, files: dict[str, list[FilesRow]]) -> list[str]:
    """The cells of one row against those of `files`."""
    n = len(own.chunk_kl)
    every = np.arange(n)
    draws = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))

    def ratio(pick: npt.NDArray[np.intp]) -> tuple[float, dict[str, float]]:
        kl, missed = float(np.array(own.chunk_kl)[pick].sum()), float(np.array(own.chunk_missed)[pick].sum())
        theirs = {name: missed_at(kl, rows, pick) for name, rows in files.items()}
        best = float(np.min(list(theirs.values())))  # NaN where one of them is
        return (missed / best if np.isfinite(best) and best > 0 else float("nan")), theirs

    value, theirs = ratio(every)
    cells = [f"{own.budget} ({own.memory_mib:.1f} MiB)", f"{own.label}, {own.eviction}", f"{1000 * (own.kl or 0):.1f}"]
    cells += [f"{own.missed_mib_per_token:.3f}"]
    known = {f: b / MIB / own.n_tokens for f, b in theirs.items() if np.isfinite(b)}
    cells += ["; ".join(f"{f} {known[f]:.3f}" if f in known else f"{f} -" for f in theirs)]
    if np.isnan(value):
        return [*cells, f"none: {why_none(list(theirs.values()))}"]
    low, high = np.nanquantile([1 - ratio(pick)[0] for pick in draws], [0.025, 0.975])
    return [*cells, f"{100 * (1 - value):.1f}% [{100 * low:.1f}, {100 * high:.1f}]"]


def why_none(theirs: Sequence[float]) -> str:
    """Why there is no gain against files of which each misses so many bytes, by missed_at()."""
    if np.isnan(theirs).any():
        return "no lambda that was scored has that KL"
    return "all lose more" if np.isinf(theirs).all() else "a file misses nothing"


def report(rows: Sequence[FilesRow]) -> str:
    """The table, a line for each row that is compared. Raises UsageError where there is none."""
    head = [
        "memory",
        "file and routing",
        "KL, millinats",
        "missed MiB/token",
        "one lambda, LRU, at the same KL",
        "fewer bytes than the best",
    ]
    cells = [head]
    for _, group in across.by_memory(rows):
        files: dict[str, list[FilesRow]] = {}
        for r in group:
            if r.whole or (r.eviction == "lru" and r.routing.partition(":")[0] in ("original", "cache-prior")):
                files.setdefault(r.file, []).append(r)
        for own in group:
            larger = {f: of for f, of in files.items() if of[0].experts_mib > own.experts_mib and not of[0].whole}
            if own.routing.startswith("tuned:"):
                cells += [line(own, against) for against in (larger, files) if against and (against is files or larger != files)]
            elif larger and own in files.get(own.file, []) and not own.whole:
                cells.append(line(own, larger))
    if len(cells) == 1:
        raise UsageError("There is no memory with two files and rows with lru; see the commands in --help.")
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
