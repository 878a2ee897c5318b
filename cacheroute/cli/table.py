"""Rows for people and for programs: an aligned table of text, Markdown, CSV, JSON, JSON lines, and SQL."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from cacheroute.cli import terminal
from cacheroute.errors import UsageError
from cacheroute.files import as_json, printable

OUTPUTS = ("text", "md", "csv", "json", "jsonl", "sql")
WIDTH = 80
MARK = "!"  # of a row that is not to be trusted
_LEAST_NAME = 12  # letters of a name in a line
_FIGURE = re.compile(r"[-+]?[\d?]")

Cells = Sequence[Sequence[str]]
"""The rows of a table; the first one is the head."""


@dataclass(frozen=True)
class View:
    """What people see of rows: `brief`, the columns that fit a terminal, `whole`, all of them, as in Markdown, and the lines in
    words above and below the brief ones."""

    brief: Cells
    whole: Cells
    above: Sequence[str] = ()
    below: Sequence[str] = ()


def check(output: str, outputs: Sequence[str] = OUTPUTS, *, wide: bool = False) -> None:
    """Raises UsageError for an unknown output, and for --wide with another than text; called before the work begins."""
    if output not in outputs:
        raise UsageError(f"There is no output {output!r}; there are {', '.join(outputs[:-1])} and {outputs[-1]}.")
    if wide and output != "text":
        raise UsageError(f"--wide is for the table of text; -o {output} has all columns without it.")


def write(rows: Sequence[Any], output: str, view: View, *, wide: bool = False, name: str = "results") -> None:
    """Prints dataclass `rows`, or what people see of them; `name` of SQL's table."""
    if output == "json":
        print(as_json([asdict(row) for row in rows], indent=2))
    elif output == "jsonl":
        for row in rows:
            print(as_json(asdict(row)))
    elif output == "csv":
        _write_csv(rows)
    elif output == "sql":
        print("\n".join(_sql(rows, name)))
    elif output == "md":
        print(as_markdown(view.whole))
    elif wide:
        show([*as_text(view.whole).splitlines()], view.above, view.below)
    else:
        show(fitted(view.brief, columns()), view.above, view.below)


def columns() -> int:
    """Of the terminal; of a pipe as many as most terminals have."""
    return terminal.columns(sys.stdout) or WIDTH


def show(table: Sequence[str], above: Sequence[str] = (), below: Sequence[str] = ()) -> None:
    """Prints the lines of a table of text with lines in words around it: on a terminal its head in bold, and doubts in yellow.
    The lines in words are broken where a terminal ends, or would."""
    above, below = [printable(line) for line in above], [printable(line) for line in below]
    if not sys.stdout.isatty():
        above, below = ([part for line in lines for part in terminal.folded(line, columns(), 2)] for lines in (above, below))
    lines = [*above, *([""] if above else []), *table, *([""] if below else []), *below]
    if not sys.stdout.isatty():
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    console, head = Console(), len(above) + bool(above)
    for i, line in enumerate(lines):
        style = "bold" if i == head else "yellow" if line.startswith(MARK) else ""
        console.print(Text(line, style), soft_wrap=head <= i < head + len(table))


def as_markdown(cells: Cells) -> str:
    """An aligned Markdown table."""
    cells = [[printable(cell) for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_text(cells: Cells, width: int | None = None) -> str:
    """Aligned columns: figures to the right, names to the left. The longest column of names takes several lines where the table
    would be wider than `width`."""
    cells = [[printable(cell) for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [_are_figures([row[i] for row in cells[1:]]) for i in range(len(widths))]
    names = [i for i in range(len(widths)) if not right[i]]
    if width and names:
        longest = max(names, key=lambda i: widths[i])
        excess = sum(widths) + 2 * (len(widths) - 1) - width
        widths[longest] = max(widths[longest] - max(excess, 0), min(widths[longest], _LEAST_NAME))
    lines = []
    for row in cells:
        parts = [_cut(cell, widths[i]) for i, cell in enumerate(row)]
        for n in range(max(map(len, parts))):
            of_line = [part[n] if n < len(part) else "" for part in parts]
            aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(of_line, widths, right, strict=True))
            lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def fitted(cells: Cells, width: int | None) -> list[str]:
    """The lines of as_text(); where the columns are too many for a narrow terminal, a few lines for each row instead."""
    lines = as_text(cells, width).splitlines()
    return lines if width is None or max(map(len, lines)) <= width else list(_stacked(cells, width))


def _stacked(cells: Cells, width: int) -> Iterator[str]:
    """Of each row its first cell, then the others with the names of their columns, below it."""
    head, *rows = [[printable(cell) for cell in row] for row in cells]
    first = 1 if head[0] == "" else 0  # a mark has no name
    for row in rows:
        yield " ".join(cell for cell in row[: first + 1] if cell)
        pairs = [f"{name} {cell}" for name, cell in zip(head[first + 1 :], row[first + 1 :], strict=True) if cell]
        line = ""
        for pair in pairs:
            if len(pair) + 3 > width:
                yield from (f"  {part}" for part in terminal.folded(line.strip() + ", " * bool(line) + pair, width - 2, 2))
                line = ""
                continue
            if line and len(line) + 3 + len(pair) > width:  # a comma at each end
                yield f"{line},"
                line = ""
            line = f"{line}, {pair}" if line else f"  {pair}"
        if line:
            yield line


def _are_figures(cells: Sequence[str]) -> bool:
    """Whether most of a column's cells begin as numbers do."""
    given = [cell for cell in cells if cell]
    return 2 * sum(bool(_FIGURE.match(cell)) for cell in given) > len(given)


def _cut(cell: str, width: int) -> list[str]:
    """A cell in lines of at most `width`, where it can be after a comma, a colon, a slash or a space."""
    lines = []
    while len(cell) > width:
        at = max(cell.rfind(c, 0, width) for c in ",:/ ") + 1 or width
        lines.append(cell[:at].rstrip())
        cell = cell[at:].lstrip()
    return [*lines, cell]


def _write_csv(rows: Sequence[Any]) -> None:
    names = [f.name for f in fields(rows[0])] if rows else []
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _flat(value) for name, value in asdict(row).items()})


def _flat(value: Any) -> Any:
    """A list as one value: numbers between spaces, sentences between semicolons."""
    if not isinstance(value, list | tuple):
        return value
    return "; ".join(value) if any(isinstance(v, str) for v in value) else " ".join(f"{v:.6g}" for v in value)


def _sql(rows: Sequence[Any], table: str) -> list[str]:
    """A table and its rows, as llama-bench writes them: for `sqlite3 FILE.db`, any number of times."""
    if not rows:
        return []
    of = fields(rows[0])
    lines = [f"CREATE TABLE IF NOT EXISTS {table} (", ",\n".join(f'  "{f.name}" {_sql_type(str(f.type))}' for f in of), ");", ""]
    names = ", ".join(f'"{f.name}"' for f in of)
    for row in rows:
        values = ", ".join(_sql_value(_flat(value)) for value in asdict(row).values())
        lines.append(f"INSERT INTO {table} ({names}) VALUES ({values});")
    return lines


def _sql_type(annotation: str) -> str:
    first, *_ = annotation.split(" | ")
    return {"int": "INTEGER", "bool": "INTEGER", "float": "REAL"}.get(first, "TEXT")


def _sql_value(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "NULL"
    if isinstance(value, int | float):
        return repr(int(value) if isinstance(value, bool) else value)
    return "'" + str(value).replace("'", "''") + "'"


def signed(value: float | None, digits: int = 2) -> str:
    """A number as +1.23, or ? for None."""
    return "?" if value is None else f"{value:+.{digits}f}"


def number(value: float | None, factor: float = 1, digits: int = 2, unit: str = "") -> str:
    """A cell; ? for an unknown value."""
    return "?" if value is None else f"{factor * value:.{digits}f}{unit}"


def spread(value: float, sd: float, n: int, digits: int = 2) -> str:
    """A mean with its standard deviation, which one run does not have."""
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if n > 1 else "")
