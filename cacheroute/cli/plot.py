"""`cacheroute plot`: draws the results of bench, simulate, eval, frontier and trace."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cacheroute.cli import table
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, pip_install
from cacheroute.plot import chart, figures


def plot(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Results of other commands (json, jsonl or csv), or a trace.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .png or .svg file. [default: print a table instead]")
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", help=f"{', '.join(figures.KINDS)}. [default: chosen by the content of the files]")
    ] = "",
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer shown by --kind residency. [default: one in the middle]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Draw what the other commands have written.

    Quality against bytes, speed, miss rates by budget, the cache over time, or expert use by layer. The bytes on an axis are
    either missed bytes (simulate, eval, frontier) or bytes read from the device (bench), never both.
    """
    if output:
        chart.check_path(output, force=force)
        if importlib.util.find_spec("matplotlib") is None:
            raise CacherouteError(
                f"{output} cannot be drawn without matplotlib: run {pip_install('matplotlib')}. Without -o there is a table."
            )
    figure = figures.chart(files, kind, layer)
    if figure.note:
        say(figure.note)
    if output:
        chart.save(figure, output, force=force)
        say(f"{output} is written. In words: {figure.alt}")
    else:
        print(table.as_markdown(figure.cells), flush=True)
        if figure.legend:
            say(figure.legend)
