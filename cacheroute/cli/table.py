"""Rows as Markdown, JSON or JSON lines. `bench` has csv, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cacheroute.errors import UsageError
from cacheroute.files import printable

OUTPUTS = ("md", "json", "jsonl")


def check(output: str) -> None:
    """Raises UsageError for an output that does not exist: before the work, not after it."""
    if output not in OUTPUTS:
        raise UsageError(f"There is no output {output!r}; there are {', '.join(OUTPUTS)}.")


def write(rows: Sequence[Any], output: str, markdown: Sequence[Sequence[str]]) -> None:
    """Prints dataclass `rows`, or for md the cells of `markdown`, whose first row is the head."""
    if output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif output == "jsonl":
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print(as_markdown(markdown))


def as_markdown(cells: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first row is the head."""
    cells = [[printable(cell) for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def signed(value: float | None, digits: int = 2) -> str:
    """+1.23, or ? for what is not known."""
    return "?" if value is None else f"{value:+.{digits}f}"
