"""Files and units that every package needs: the cache folder, hashes, reading and writing JSON."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError

MIB = 1024 * 1024
PACKAGE = Path(__file__).resolve().parent
VERSION = importlib.metadata.version("cacheroute")


def packaged(name: str) -> Path | None:
    """A file that is beside this package in a checkout and inside it once installed; None if it is in neither."""
    return next((path for path in (PACKAGE / name, PACKAGE.parent / name) if path.exists()), None)


def cache_dir() -> Path:
    """The user's cache for cacheroute; $CACHEROUTE_CACHE replaces it. The folder is not created."""
    chosen = os.environ.get("CACHEROUTE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        import platformdirs
    except ImportError:
        raise CacherouteError("platformdirs is missing: run `python -m pip install platformdirs` first") from None
    return platformdirs.user_cache_path("cacheroute")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The object in a JSON file whose `format` is `kind`. Raises UsageError for another kind of file or version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise UsageError(f"{path} is not a {kind} file.")
    if content.get("version") != version:
        raise UsageError(f"{path} is of version {content.get('version')}; this cacheroute reads version {version}.")
    return content


def write_json(path: Path, content: dict[str, Any], *, force: bool) -> None:
    """Writes a JSON file whole or not at all. Raises UsageError when it exists unless `force`, CacherouteError when it cannot."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force replaces it.")
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as f:
            try:
                json.dump(content, f, indent=1)
                f.write("\n")
            except BaseException:
                os.unlink(f.name)
                raise
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)
    except OSError as e:
        raise CacherouteError(f"{path} cannot be written ({e.strerror}).") from None
