"""A file of results that grows line by line and can be resumed: JSON lines under a header that identifies the run."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import as_json, check_regular, named, replaced


class ResultsFile:
    """`lines`: those of earlier runs; `append` adds one and flushes it to the disk. A file that is removed in the meantime is
    written again, with all that it had.

    Args:
        path: created when it is not there, its folder not: a mistyped one is an error.
        header: everything that results of one file have in common; "format" names the kind of file.

    Raises UsageError when the file is of another kind, model, text, version or setting: those are never mixed. A last line
    that was cut short is dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._content: list[bytes] = [as_json(header).encode()]  # the header and all lines that the file should have
        try:
            if path.exists():
                check_regular(path, "a results file")
            old = path.read_bytes() if path.exists() else b""
            whole = old[: old.rfind(b"\n") + 1]
            content = whole.splitlines()
            if old:
                self._check(content, header)
            kept = len(content) == 1 + len(self.lines)
            self._content = content if kept else [*self._content, *(as_json(line).encode() for line in self.lines)]
            if not kept:
                self._write()
            elif len(whole) < len(old):  # or another process may be appending
                os.truncate(path, len(whole))
        except OSError as e:
            raise CacherouteError(f"{path} cannot be written ({e.strerror}).") from None

    def _check(self, content: Sequence[bytes], header: dict[str, Any]) -> None:
        try:
            first, *rest = content
            found, self.lines = json.loads(first), self._parsed(rest)
            other = [k for k in header.keys() | found.keys() if found.get(k) != header.get(k)]
        except (ValueError, AttributeError, RecursionError):
            raise UsageError(f"{self.path} is not a results file of cacheroute; choose another name.") from None
        if other:
            raise UsageError(f"{self.path} {_difference(found, header, other)}; choose another file or remove it.")

    def _parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        """Raises ValueError or RecursionError for a line that is damaged."""
        found = [json.loads(line) for line in lines]
        if not all(isinstance(line, dict) for line in found):
            raise ValueError("a line is no object")
        return found

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line. Raises CacherouteError when it cannot be written; what was written of it is taken back."""
        data = as_json(line).encode()
        self._content.append(data)
        try:
            # without O_CREAT: a file that begins with a row would be no results file
            with open(os.open(self.path, os.O_RDWR | os.O_APPEND), "r+b", buffering=0) as f:
                head = f.read(len(self._content[0]))
                if head and head != self._content[0]:
                    raise CacherouteError(f"{self.path} was replaced by another file; run the same command with another name.")
                if head:
                    _add(f, data + b"\n")
                    return
        except FileNotFoundError:
            pass
        except OSError as e:
            raise CacherouteError(f"{self.path} cannot be written ({e.strerror}).") from None
        print(f"{self.path} was removed or emptied during the run: it is written again.", file=sys.stderr)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CacherouteError(f"{self.path} cannot be written ({e.strerror}).") from None
        self._write()

    def _write(self) -> None:
        with replaced(self.path) as part:
            part.write_bytes(b"".join(line + b"\n" for line in self._content))


def _add(file: io.FileIO, data: bytes) -> None:
    """At the end of a file, and to the disk; nothing if not all of it. Raises OSError."""
    size = file.seek(0, os.SEEK_END)
    try:
        if (file.write(data) or 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def _difference(found: dict[str, Any], header: dict[str, Any], other: Sequence[str]) -> str:
    """What a file with the header `found` is, where `header` was wanted; they differ in the fields `other`."""
    if "format" in other:
        was, wanted = named(found.get("format")), named(header["format"])
        if was != wanted:
            return f"holds {was}, not {wanted}" if was else f"is not a file of {wanted}"
        return f"holds {was} of another version of cacheroute"
    if "version" in other:
        return f"holds results of another version of cacheroute ({found.get('version')}, and this is {header.get('version')})"
    if "model" in other:
        return "holds results of another model file"
    if "text" in other:
        return "holds results of another text (-f)"
    if "chunks" in other:
        return f"holds results of other chunks ({_chunks(found.get('chunks'))}; now {_chunks(header['chunks'])})"
    key = min(other)
    return f"holds results of another {key} ({found.get(key)}, now {header.get(key)})"


def _chunks(values: Any) -> str:
    """[chunk, stride, limit] as the options that set them."""
    if not isinstance(values, list):
        return "not named"
    return " ".join(f"--{name} {v}" for name, v in zip(("chunk", "stride", "limit"), values, strict=False) if v is not None)
