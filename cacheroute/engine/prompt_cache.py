"""An evaluated prompt in a file: its tokens, the KV cache after it, and the routing state and logits at its points.

The file, numbers in the byte order of the machine:

    "CRPROMPT"   uint32 version   uint32 bytes of the header   sha256 of the header   header   payload

The header is JSON: {"byteorder", "settings": what the state depends on, by name, "tokens": how many, "points": [[tokens before
it, bytes of its routing state, bytes of its logits], ...], "sequence": bytes of the KV cache, "sha256" of the payload}. The
payload is int32[tokens], then the points' states and logits, then the KV cache. Knows no model and no context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from cacheroute.errors import UsageError
from cacheroute.files import MIB, check_regular, replaced, unwritable

MAGIC, VERSION = b"CRPROMPT", 2
_HEAD = struct.Struct("=8sII32s")
_MOST_HEADER = MIB
_CHUNK = 4 * MIB  # written at a time and synced, so that Ctrl-C need not wait for more
_ELSE = "name another file, or remove this one"

Settings = dict[str, str]
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Kept:
    """What a file keeps. `points`, in the order of the sequence: (tokens before it, routing state, logits of the token that
    follows as float32[vocabulary], or nothing)."""

    tokens: list[int]
    points: Sequence[tuple[int, Buffer, Buffer]]
    sequence: Buffer


def check(path: Path) -> None:
    """Raises what can be said before anything is computed: UsageError for a file that is not a prompt cache, which is never
    overwritten, and for a folder that is not there; CacherouteError where no file can be made otherwise."""
    if path.exists():
        with _opened(path) as file:
            _header(path, file)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part") if path.name else path
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT, 0o600))
        part.unlink()
    except OSError as e:
        raise unwritable(path, e) from None


def write(path: Path, kept: Kept, settings: Settings) -> None:
    """Writes the file whole or not at all. Raises UsageError where another file is there that is not a prompt cache,
    CacherouteError when it cannot be written."""
    if path.exists():
        with _opened(path) as file:
            _header(path, file)
    parts = [memoryview(part).cast("B") for part in _payload(kept)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    content = {
        "byteorder": sys.byteorder,
        "settings": settings,
        "tokens": len(kept.tokens),
        "points": [[n, len(routing), len(logits)] for n, routing, logits in kept.points],
        "sequence": len(kept.sequence),
        "sha256": digest.hexdigest(),
    }
    header = json.dumps(content).encode()
    head = _HEAD.pack(MAGIC, VERSION, len(header), hashlib.sha256(header).digest())
    with replaced(path) as part_path, part_path.open("wb") as file:
        for part in (memoryview(head), memoryview(header), *parts):
            for first in range(0, len(part), _CHUNK):
                file.write(part[first : first + _CHUNK])
                if len(part) > _CHUNK:
                    file.flush()
                    os.fsync(file.fileno())


def read(path: Path, settings: Settings) -> Kept:
    """Raises UsageError for a file that is none, is damaged, cannot be read, or was made with other settings than these."""
    with _opened(path) as file:
        header = _header(path, file)
        if header["byteorder"] != sys.byteorder:
            raise UsageError(f"{path} was made on a machine of another byte order; {_ELSE}.")
        for name in settings:
            theirs, ours = header["settings"].get(name, "none"), settings[name]
            if theirs != ours:
                raise UsageError(f"{path} was made with the {name} {theirs}, and here it is {ours}; use that one, {_ELSE}.")
        sizes = [4 * header["tokens"], *(n for _, *both in header["points"] for n in both), header["sequence"]]
        left = os.fstat(file.fileno()).st_size - file.tell()
        if left != sum(sizes):
            raise _damaged(path, f"{left} bytes follow its header, and {sum(sizes)} should")
        payload = bytearray(left)
        if file.readinto(payload) != left or hashlib.sha256(payload).hexdigest() != header["sha256"]:
            raise _damaged(path, "its checksum is wrong")
    parts = list(_split(memoryview(payload), sizes))
    tokens = [int(t) for t in np.frombuffer(parts[0], np.int32)]
    points = [(p[0], parts[1 + 2 * i], parts[2 + 2 * i]) for i, p in enumerate(header["points"])]
    return Kept(tokens, points, parts[-1])


def _payload(kept: Kept) -> list[Buffer]:
    both = [part for _, routing, logits in kept.points for part in (routing, logits)]
    return [np.asarray(kept.tokens, np.int32).tobytes(), *both, kept.sequence]


def _split(payload: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    for size in sizes:
        yield payload[:size]
        payload = payload[size:]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    check_regular(path, "a prompt cache")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}); {_ELSE}.") from None


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path} is a damaged prompt cache ({reason}); {_ELSE}.")


def _header(path: Path, file: BufferedReader) -> dict[str, Any]:
    """Of an open file, which is then at the payload."""
    head = file.read(_HEAD.size)
    if not head.startswith(MAGIC):
        raise UsageError(f"{path} is not a prompt cache, and is left as it is; name another file.")
    if len(head) < _HEAD.size:
        raise _damaged(path, "it ends within its header")
    _, version, size, digest = _HEAD.unpack(head)
    if version != VERSION:
        raise UsageError(f"{path} is a prompt cache of version {version}, and this cacheroute reads {VERSION}; {_ELSE}.")
    header = file.read(min(size, _MOST_HEADER))
    if hashlib.sha256(header).digest() != digest:
        raise _damaged(path, "the checksum of its header is wrong")
    try:
        content: dict[str, Any] = json.loads(header)
        counts = [content["tokens"], content["sequence"], *(n for point in content["points"] for n in point)]
        whole = all(type(n) is int and n >= 0 for n in counts) and all(len(point) == 3 for point in content["points"])
        whole = whole and {*map(type, (content["byteorder"], content["sha256"], *content["settings"].values()))} == {str}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise _damaged(path, "its header has values that cannot be")
    return content
