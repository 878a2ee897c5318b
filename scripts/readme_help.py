"""Writes the table of commands in README.md, from the first sentence of each command's own help; --check only compares.

The table stands between two marks, and everything else stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import typer

from cacheroute.cli import app, groups

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- commands: scripts/readme_help.py -->", "<!-- end of commands -->"


def table(group: Any) -> str:
    """The Markdown table of all commands in a group under the headings of `--help`, those of a group in it together."""
    lines = ["| | command | what it does |", "|---|---|---|"]
    for heading, commands in groups.grouped(group):
        for name, command in commands:
            typed = f"{name} {'`, `'.join(command.commands)}" if hasattr(command, "commands") else name
            lines.append(f"| {heading} | `{typed}` | {groups.summary(command).replace('|', chr(92) + '|')} |")
            heading = ""
    return "\n".join(lines)


def updated(text: str) -> str:
    """A README with the table of this cacheroute. Raises ValueError where the marks are not in it, once each and in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{README.name} needs {BEGIN} and {END} around the table of commands")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(typer.main.get_command(app))}\n{END}{after}"


def main() -> None:
    """Writes it, or with --check exits with 1 where the README has another table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if asked.check and old != new:
        sys.exit("README.md has another table of commands: run scripts/readme_help.py")
    if old != new:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
