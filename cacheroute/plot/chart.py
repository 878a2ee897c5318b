"""A figure that is not yet drawn, and how it is written to a file. Imports matplotlib only to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cacheroute.errors import UsageError
from cacheroute.files import check_new, replaced
from cacheroute.plot import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")


@dataclass(frozen=True)
class Chart:
    """`draw` fills a figure of style.WIDTH and `height` inches; `cells` are the same as a table; the first row is the head.

    `alt` says in a sentence or two what is to be seen, for those who do not see it; it is written into the file, too.
    `legend` says what marks in the table mean.
    """

    cells: list[list[str]]
    draw: Callable[[Figure], None]
    alt: str
    note: str = ""
    height: float = 5
    legend: str = ""


def save(chart: Chart, path: Path, *, force: bool = False) -> None:
    """Draws a PNG or SVG file. Raises UsageError for another ending or a file that exists, CacherouteError when it cannot."""
    check_path(path, force=force)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # no date and no random names in it: the same rows make the same bytes
    metadata = {"Description": chart.alt} | ({"Date": None} if path.suffix == ".svg" else {})
    with replaced(path) as part, rc_context(style.SETTINGS):
        figure = Figure(figsize=(style.WIDTH, chart.height), layout="constrained")
        chart.draw(figure)
        figure.savefig(part, format=path.suffix[1:], dpi=150, metadata=metadata)


def check_path(path: Path, *, force: bool) -> None:
    """Raises UsageError for another ending than .png or .svg, or a file that exists."""
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path} is neither a .png nor a .svg file.")
    check_new(path, force=force)
