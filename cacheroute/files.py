"""Files and units that every package needs: the cache folder, hashes, reading and writing JSON."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import select
import stat
import sys
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


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MOST_JSON = 256 * MIB


def check_regular(path: Path, what: str, *, missing: str = "") -> None:
    """Raises UsageError where `path` is no file whose bytes lie on a disk: reading a pipe or a device may never end.

    `what` it should be, as in "a trace"; `missing`: what to do where nothing is there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as e:
        if missing and e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise UsageError(f"There is no file {path}; {missing}") from None
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
    except ValueError:  # a NUL in the name
        raise UsageError(f"{str(path)!r} cannot be the name of a file.") from None
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path} cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, and {what} has to be a file on a disk."
        )


def read_text(path: Path) -> bytes:
    """All of a text: of a file, or of a pipe, as `<(command)` is one, which is waited for with a word.

    Raises UsageError for a folder, a device such as /dev/zero, which would not end, and what cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISFIFO(mode):
            if not (stat.S_ISCHR(mode) and (os.path.samefile(path, os.devnull) or _is_terminal(path))):
                check_regular(path, "a text")
            return path.read_bytes()
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(pipe, "rb") as file:
            if not select.select([file], [], [], 1.0)[0]:
                print(f"waiting for text from the pipe {path}", file=sys.stderr)
                select.select([file], [], [])
            os.set_blocking(pipe, True)
            return file.read()
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None


def _is_terminal(path: Path) -> bool:
    with path.open("rb", buffering=0) as file:
        return file.isatty()


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The object in a JSON file whose `format` is `kind`. Raises UsageError for any other file or version."""
    check_regular(path, f"a {kind} file")
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UsageError(f"{path} is not a {kind} file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
    except (ValueError, RecursionError):
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
