"""Programs that play others."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, body: str) -> None:
    """A program of bash, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)
