"""Tiny mixture-of-experts GGUF files with random weights, one per architecture that the tests need (scripts/random_model.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from random_model import ARCHS, Shape, shape_of, write

__all__ = ["ARCHS", "Shape", "shape_of", "write"]


def in_two_types(arch: str, folder: Path) -> tuple[Path, Path]:
    """A model in F16 and, twice as large, in F32; its experts are so wide that whole pages take little more."""
    large: dict[str, Any] = {"quant": "F32", "dense_quant": "F32"}
    return write(arch, folder / "m-F16.gguf", n_ff=256), write(arch, folder / "m-F32.gguf", n_ff=256, **large)
