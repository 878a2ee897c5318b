"""A small model that is loaded for one test, closed at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cacheroute import Llama

SIZES: dict[str, Any] = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@contextlib.contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[Llama]:
    """With 8 experts of each layer in memory, unless `settings` say otherwise."""
    with contextlib.closing(Llama(str(path), **SIZES | {"budget": 8} | settings)) as llm:
        yield llm
