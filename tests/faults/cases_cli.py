"""Faults of the command line: arguments, streams, templates, folders, interrupts."""

from __future__ import annotations

from faults.runner import Case

CASES: list[Case] = [
    Case("an output that does not exist", "generate -o xml -m {tiny}", sentence="There is no output 'xml'"),
]
