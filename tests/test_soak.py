"""A short scripts/soak; the long one is for a person, its figures are in scripts/RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import soak

pytestmark = pytest.mark.engine


def test_2000_tokens() -> None:
    command = [sys.executable, soak.__file__, "--tokens", "2000", "--every", "100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert [line.partition(" of ")[0].split(", ")[0] for line in lines] == ["buffered: 1000 tokens", "direct: 1000 tokens"], done
    assert all(line.endswith(" 10 looks") for line in lines)


@pytest.mark.parametrize(
    "limit, value, said", [("SLACK", 0.1, "bytes are in memory of a budget of"), ("GROWTH", 0.1, "anonymous memory has grown")]
)
def test_a_violation_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, said: str) -> None:
    monkeypatch.setattr(soak, limit, value)
    with pytest.raises(soak.ViolationError, match=said):
        soak.Soak(alone, "buffered", 200, 10).run()
