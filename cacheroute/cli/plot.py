"""`cacheroute plot`: figures of what bench, simulate, eval and trace have written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import table
from cacheroute.cli.terminal import say
from cacheroute.plot import chart, figures


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Rows (json, jsonl, csv) of any commands, or a trace.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .png or .svg file. [default: a table on the terminal]")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help=f"{', '.join(figures.KINDS)}. [default: what the files can show]")] = "",
    layer: Annotated[int | None, typer.Option("--layer", help="Layer of residency. [default: one in the middle]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Draw a frontier, arms of bench, miss rates against budgets, the cache over time, or a heat map of layers and experts.

    Bytes on an axis are those missed (simulate, eval, frontier) or those read from the device (bench): never both in one figure.
    """
    if output:
        chart.check_path(output, force=force)
    figure = figures.chart(files, kind, layer)
    if figure.note:
        say(figure.note)
    drawable = importlib.util.find_spec("matplotlib") is not None
    if output and drawable:
        chart.save(figure, output, force=force)
        say(f"{output} is drawn.")
        return
    if output:
        say(f"matplotlib is missing (pip install 'cacheroute[plot]'): instead of {output}, a table.")
    print(table.as_markdown(figure.cells))
