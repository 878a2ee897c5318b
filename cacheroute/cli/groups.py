"""The commands in groups, as `--help` lists them. Plain text: rich would take what stands in brackets for markup."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import typer.core

GROUPS = {
    "Run": ("generate", "chat", "serve"),
    "Measure": ("bench", "eval", "tune", "plan", "doctor"),
    "Study": ("trace", "simulate", "frontier", "plot", "routing"),
    "Set up": ("setup", "pull", "models", "inspect"),
}
"""Heading -> commands; one that this version does not have is passed over."""
REST = "More"


class Grouped(typer.core.TyperGroup):
    """Lists its commands under the headings of GROUPS, each with the first sentence of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        below(formatter)
        super().format_options(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the lists; the second column begins at the same place in all of them."""
        groups = list(grouped(self))
        width = max((len(name) for _, commands in groups for name, _ in commands), default=0)
        for heading, commands in groups:
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), summary(command)) for name, command in commands])


def below(formatter: Any) -> None:
    """On a narrow terminal what an option does is said below its name: beside it there would be room for half a word."""
    if formatter.width < 60:
        formatter.write_dl = functools.partial(formatter.write_dl, col_max=10)


def grouped(group: Any) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """(heading, its commands with their names), without the hidden ones; under REST what is in no group."""
    left = {name: command for name, command in group.commands.items() if not command.hidden}
    for heading, names in GROUPS.items():
        found = [(name, left.pop(name)) for name in names if name in left]
        if found:
            yield heading, found
    if left:
        yield REST, list(left.items())


def summary(command: Any) -> str:
    """The first sentence of a command's help, on one line."""
    paragraph = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + "." if stop else paragraph
