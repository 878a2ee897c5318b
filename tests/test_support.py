"""What tests share lives in tests/support/: no file there, and no test, imports from a test file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TEST_FILES = {p.stem for p in TESTS.glob("test_*.py")} | {"conftest"}


def imported(file: Path) -> set[str]:
    """The first part of the name of every module that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
    return found


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_nothing_imports_from_a_test_file(file: Path) -> None:
    assert not imported(file) & TEST_FILES


def test_helpers_live_in_support() -> None:
    assert {p.stem for p in TESTS.glob("*.py")} == TEST_FILES
