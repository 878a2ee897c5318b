"""The packages in cacheroute/ and which may import which: no import goes to a later one, so there are no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import cacheroute

PACKAGE = Path(cacheroute.__file__).parent
GROUND = {"errors", "files", "interrupts"}
TOP = {"__init__", "__main__", *GROUND}
# from the ground up: a package may import from itself and from what is named here, and from the ground
MAY_IMPORT = {
    "native": set(),
    "install": set(),
    "model": {"install"},
    "routing": {"native", "model"},
    "trace": {"native", "model", "routing"},
    "engine": {"native", "install", "model", "routing", "trace"},
    "forecast": {"native", "install", "model", "routing", "trace", "engine"},
    "bench": {"native", "install", "model", "trace", "engine"},
    "evals": {"native", "install", "model", "routing", "trace", "engine"},
    "serve": {"native", "install", "model", "routing", "trace", "engine"},
    "plot": {"trace"},
    "cli": {"install", "model", "routing", "trace", "engine", "forecast", "bench", "evals", "serve", "plot"},
}


def imported(file: Path) -> set[str]:
    """Packages and top modules of cacheroute that a file imports anywhere, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module or ""] if node.module != "cacheroute" else [f"cacheroute.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("cacheroute.")}
    return found


def test_every_file_is_in_a_package() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("__pycache__", "data", "lib", "patches")}
    assert folders == set(MAY_IMPORT)
    assert {p.stem for p in PACKAGE.glob("*.py")} == TOP
    assert not [p for package in MAY_IMPORT for p in (PACKAGE / package).rglob("*/*.py")], "packages have no packages in them"


def test_no_import_goes_to_a_later_package() -> None:
    order = list(MAY_IMPORT)
    assert all(order.index(below) < order.index(package) for package, packages in MAY_IMPORT.items() for below in packages)
    for package, packages in MAY_IMPORT.items():
        for file in (PACKAGE / package).glob("*.py"):
            wrong = imported(file) - packages - {package, *GROUND}
            assert not wrong, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(wrong))}"


def test_errors_and_files_import_no_package() -> None:
    assert imported(PACKAGE / "errors.py") == imported(PACKAGE / "interrupts.py") == set()
    assert imported(PACKAGE / "files.py") == {"errors"}


def test_only_what_is_listed_is_public() -> None:
    assert cacheroute.__all__ == ["CacherouteError", "Llama", "UsageError", "__version__"]
    assert all(hasattr(cacheroute, name) for name in cacheroute.__all__)
