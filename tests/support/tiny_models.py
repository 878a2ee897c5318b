"""Tiny mixture-of-experts GGUF files with random weights, one per architecture that the tests need (scripts/random_model.py)."""

from __future__ import annotations

from random_model import ARCHS, Shape, shape_of, write

__all__ = ["ARCHS", "Shape", "shape_of", "write"]
