"""Ctrl-C at a moment that does not depend on time."""

from __future__ import annotations

from typing import Any

import pytest

from cacheroute.evals.results import ResultsFile


def at_score(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """KeyboardInterrupt in place of the n-th score that is kept, the first being 1; those after it are kept."""
    append, count = ResultsFile.append, 0

    def interrupted(self: ResultsFile, line: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise KeyboardInterrupt
        append(self, line)

    monkeypatch.setattr(ResultsFile, "append", interrupted)
