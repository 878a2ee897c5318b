"""`cacheroute frontier`: quality against bytes missed, for every strategy, in one file that can be resumed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import frontier_files, options, progress, table
from cacheroute.cli.eval import ChunkOption, ColumnOption, IoOption, StrideOption, TextOption, perplexity_view, say_few
from cacheroute.cli.frontier_files import FilesOption, ReferenceOption
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.routing.eviction import DEFAULT


def frontier(
    ctx: typer.Context,
    results: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file of results (JSON lines); an unfinished one is resumed.")
    ],
    model: options.ModelOption = None,
    files: FilesOption = None,
    reference: ReferenceOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: options.BudgetsOption = "25%,50%,75%",
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            help="Routings, separated by commas; with --files `tuned`, too, and by default cache-prior only. [default: a grid "
            "over all strategies]",
        ),
    ] = None,
    points: Annotated[int, typer.Option("--points", min=1, help="Number of values of each strategy in the grid.")] = 5,
    eviction: options.EvictionsOption = DEFAULT,
    chunk: ChunkOption = 1024,
    stride: StrideOption = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Score at least that many tokens with each routing, in whole chunks.")
    ] = 10000,
    workers: options.WorkersOption = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="ADDRESS",
            help="Score on the workers of a Dask cluster (the extra `dask`); they share the threads of -t.",
        ),
    ] = None,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    flash_mbps: options.FlashOption = None,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Score many routings at several budgets, for `plot`.

    Each row is scored as by `eval perplexity` and paired with `original`. Scores are stored in the cache folder and shared
    with `tune` and `eval perplexity`, so nothing is computed twice.

    Speed (ts) is measured only with one worker and an --io that reads; otherwise ts is null. When it is measured, stored
    scores and rows of FILE without a speed, or with the speed of another io, pace or number of threads, are computed again.

    With --files several quantisations of one model are scored, each with as many experts as fit the same bytes, and compared
    with `original` of one of them; a file that fits whole is scored as it is. The speed of each is forecast, behind
    --flash-mbps if that is given. `plot` shows which file, routing and eviction lose least at which speed.
    """
    table.check(output, wide=wide)
    frontier_files.check_options(ctx, files, reference)
    if routing is not None:
        if not options.names(routing):
            raise UsageError("There is nothing to score; name a routing, or leave --routing out for the grid.")
        options.refuse_unused(ctx, "points", "is of the grid, which --routing takes the place of; leave it out.")
    if files is None and io in (None, "none"):
        options.refuse_unused(ctx, "flash_mbps", "is the pace of reads; give --io direct or buffered, too.")
    if scheduler and workers > 1:
        options.refuse_unused(ctx, "workers", "is of no use with --scheduler: a cluster has its own workers; leave it out.")
        workers = 1
    from cacheroute.evals import frontier as frontiers
    from cacheroute.evals import loading, scorer
    from cacheroute.evals.results import ResultsFile
    from cacheroute.model import catalogue, experts, gguf_file

    source = loading.Source(file, column, chunk, stride, limit)
    timed = io not in (None, "none") and workers == 1 and not scheduler
    timed_with = frontiers.timing(str(io), options.threads(threads), flash_mbps) if timed else ""
    evictions, budgets = options.names(eviction), options.names(budget)
    if files is not None:
        chosen = frontier_files.choose(files, reference)
        settings = frontier_files.Settings(threads, workers, scheduler, io, flash_mbps, evictions)
        grid = [r for r in frontiers.grid(chosen.copies[0].layout, points) if r.startswith("cache-prior")]
        names = grid if routing is None else options.names(routing)
        frontier_files.run(results, chosen, source, names, evictions, budgets, settings, output, timed_with=timed_with, wide=wide)
        return
    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    names = frontiers.grid(layout, points) if routing is None else options.names(routing)
    arms = frontiers.arms(layout, names, evictions, budgets)
    if not arms:
        raise UsageError("There is nothing to score; give at least one budget and eviction.")
    kept = ResultsFile(results, frontiers.header(path, source))
    rows = frontiers.finished(kept.lines, timed_with)
    keys = {arm: frontiers.key_of(arm) for arm in arms}
    left = [arm for arm in arms if keys[arm] not in rows]
    if kept.lines:
        say(f"{results} has {len(arms) - len(left)} of {len(arms)} rows already")
    if n := sum(line.get("kl") is None for line in kept.lines):
        say(f"{n} of its rows are without a KL; those that are wanted are scored again and added")
    if timed and left and any(line.get("timed_with", "") != timed_with for line in kept.lines):
        say(f"rows without a speed ({timed_with}) are timed again and added")
    if left:
        with (
            scorer.session(
                path,
                source,
                threads=threads,
                n_workers=workers,
                scheduler=scheduler,
                io=io,
                flash_mbps=flash_mbps,
                timed=timed,
                evictions=evictions,
            ) as session,
            progress.scoring(session, [r for arm in left for r in arm.requests(len(session.chunks))]),
        ):
            say_few(len(session.chunks))
            frontiers.run(session, source, arms, rows, lambda row: kept.append(asdict(row)), timed_with)
    else:
        say_few(rows[keys[arms[0]]].n_chunks)
    found = [replace(rows[keys[arm]], routing=arm.routing) for arm in arms]  # by the name of this run
    table.write(found, output, perplexity_view(found), wide=wide, name="frontier")
