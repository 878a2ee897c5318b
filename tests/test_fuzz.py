"""Some seconds of scripts/fuzz with its saved corpus; ten minutes are for a person or a night."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import fuzz_readers
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("target", fuzz_readers.TARGETS)
def test_the_corpus_breaks_no_reader(target: str, tmp_path: Path, own_cache: Path) -> None:
    found = [*sorted((fuzz_readers.CORPUS / target).iterdir()), *sorted((fuzz_readers.CORPUS / "found").glob(f"{target}-*"))]
    assert found
    rng = random.Random(1)
    for path in found:
        fuzz_readers.try_input(target, path.read_bytes(), tmp_path)
        for _ in range(20):
            fuzz_readers.try_input(target, fuzz_readers.mutated(target, path.read_bytes(), rng), tmp_path)


def test_the_same_inputs_each_time_break_nothing() -> None:
    """New ones are looked for by scripts/fuzz SECONDS, not where a finding would stop other work."""
    done = subprocess.run(
        [sys.executable, fuzz_readers.__file__, "--inputs", "1500"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_finding_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(fuzz_readers.TARGETS, "task", broken)
    with pytest.raises(RuntimeError):
        fuzz_readers.try_input("task", b"{}", tmp_path)
