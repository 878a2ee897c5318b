"""`cacheroute frontier`: quality against bytes read, for every strategy, in one file that can be gone on with."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import options, progress, table
from cacheroute.cli.eval import ChunkOption, ColumnOption, IoOption, StrideOption, TextOption, perplexity_cells
from cacheroute.errors import UsageError
from cacheroute.routing.eviction import DEFAULT


def frontier(
    results: Annotated[Path, typer.Argument(metavar="FILE", help="The results, JSON lines; an unfinished file is gone on with.")],
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: Annotated[str, typer.Option("--budget", help="Budgets, separated by commas.")] = "25%,50%,75%",
    routing: Annotated[
        str | None, typer.Option("--routing", help="Routings, separated by commas. [default: a grid over all strategies]")
    ] = None,
    points: Annotated[int, typer.Option("--points", min=1, help="Values of each strategy in the grid.")] = 5,
    eviction: options.EvictionsOption = DEFAULT,
    chunk: ChunkOption = 1024,
    stride: StrideOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Score about this many tokens in each cell.")] = 10000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Cells at a time on this machine.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", metavar="ADDRESS", help="Run cells on a Dask cluster (the extra `dask`).")
    ] = None,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    flash_mbps: options.FlashOption = None,
    output: Annotated[str, typer.Option("-o", "--output", help="What goes to stdout at the end: md, json or jsonl.")] = "md",
) -> None:
    """Score many routings at several budgets; `cacheroute plot FILE` draws the result.

    Each cell is scored as `eval perplexity` does and paired with `original`. Speed is recorded where cells have the machine to
    themselves and reads are made (--io mmap or direct). With several workers, -t is threads of each.
    """
    table.check(output)
    if scheduler and workers > 1:
        raise UsageError("Give --workers or --scheduler; a cluster has its own workers.")
    from cacheroute.evals import frontier as frontiers
    from cacheroute.evals import loading
    from cacheroute.evals.results import ResultsFile
    from cacheroute.model import catalogue, experts, gguf_file

    path = catalogue.resolve(model).resolve()
    layout = experts.layout(gguf_file.read(path))
    names = options.names(routing) if routing else frontiers.grid(layout, points)
    cells = frontiers.arms(layout, names, options.names(eviction), options.names(budget))
    if not cells:
        raise UsageError("There is nothing to score; give at least one budget and eviction.")
    job = frontiers.Job(
        model=path,
        source=loading.Source(file.resolve() if file else None, column, chunk, stride, limit),
        threads=max(options.threads(threads) // (1 if threads else workers), 1),
        io=io or loading.default_io(layout),
        flash_mbps=flash_mbps,
    )
    kept = ResultsFile(results, frontiers.header(job))
    if kept.lines:
        print(f"{results} has {len(kept.lines)} cells of {len(cells)} already", file=sys.stderr)
    with ExitStack() as stack:
        if scheduler:
            submit = stack.enter_context(frontiers.cluster(scheduler))
        else:
            submit = stack.enter_context(frontiers.workers(workers) if workers > 1 else frontiers.here())
        advance = stack.enter_context(progress.bar("frontier", max(len(cells) - len(kept.lines), 1)))

        def keep(row: frontiers.FrontierRow) -> None:
            kept.append(asdict(row))
            advance(1, f"{row.routing} {row.budget}")

        rows = frontiers.run(job, cells, kept.lines, submit, keep)
    table.write(rows, output, perplexity_cells(rows))
