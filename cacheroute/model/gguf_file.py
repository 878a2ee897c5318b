"""Reads the header of a GGUF file, all shards of a split one, without touching tensor data.

Uses the reader of llama.cpp's own library: the `gguf` package takes seconds for a real vocabulary. Knows nothing of experts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cacheroute.errors import CacherouteError, UsageError

Scalar = int | float | bool | str

# enum gguf_type of the GGUF specification -> the suffix of gguf_get_val_*, and its C type
_SCALARS: dict[int, tuple[str, type]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    8: ("str", ctypes.c_char_p),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as GGUF has it (fastest first), `offset` in bytes from the start of its file."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a model: its shards in order, scalar metadata of the first, tensors of all."""

    paths: tuple[Path, ...]
    metadata: dict[str, Scalar]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in all shards."""
        return sum(t.nbytes for t in self.tensors)


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@functools.cache
def _library() -> ctypes.CDLL:
    from cacheroute.install import patched_llama_cpp

    lib = patched_llama_cpp.shared_library("ggml-base")
    p, i64, name = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    for symbol, result, arguments in [
        ("gguf_init_from_file", p, [name, _InitParams]),
        ("gguf_free", None, [p]),
        ("gguf_get_n_kv", i64, [p]),
        ("gguf_get_key", name, [p, i64]),
        ("gguf_get_kv_type", ctypes.c_int, [p, i64]),
        ("gguf_get_data_offset", ctypes.c_size_t, [p]),
        ("gguf_get_n_tensors", i64, [p]),
        ("gguf_get_tensor_name", name, [p, i64]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [p, i64]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [p, i64]),
        ("gguf_get_tensor_type", ctypes.c_int, [p, i64]),
        ("gguf_get_tensor_ne", ctypes.POINTER(i64), [p, i64]),
        ("ggml_type_name", name, [ctypes.c_int]),
        ("ggml_log_get", None, [p, p]),
        ("ggml_log_set", None, [p, p]),
    ]:
        function = getattr(lib, symbol)
        function.restype, function.argtypes = result, arguments
    for suffix, ctype in _SCALARS.values():
        function = getattr(lib, f"gguf_get_val_{suffix}")
        function.restype, function.argtypes = ctype, [p, i64]
    return lib


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_IGNORE = _LogCallback(lambda level, text, data: None)


@contextlib.contextmanager
def _silence(lib: ctypes.CDLL) -> Iterator[None]:
    """Silences the library's messages about a file; the caller raises its own error."""
    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    lib.ggml_log_get(ctypes.byref(callback), ctypes.byref(data))
    lib.ggml_log_set(ctypes.cast(_IGNORE, ctypes.c_void_p), None)
    try:
        yield
    finally:
        lib.ggml_log_set(callback, data)


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Reads the header of `path`, the only or the first shard of a model.

    Raises UsageError where there is no such file, it is no GGUF, not the first shard, or a shard is missing;
    CacherouteError where tensor data ends early.
    """
    first = Path(path)
    _check_readable(first)
    metadata, tensors = _read_one(first, 0)
    paths = [first]
    count = int(metadata.get("split.count", 1))
    if count > 1:
        paths = _shards(first, int(metadata.get("split.no", 0)), count)
        for i, shard in enumerate(paths[1:], start=1):
            _check_readable(shard)
            tensors += _read_one(shard, i)[1]
    return GgufFile(tuple(paths), metadata, tuple(tensors))


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give the path of a .gguf file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}; `cacheroute models` lists the models that are here.") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
    if magic != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file.")


def _shards(first: Path, number: int, count: int) -> list[Path]:
    match = _SHARD.match(first.name)
    if not match or int(match["count"]) != count:
        raise UsageError(
            f"{first} is one of {count} shards but is not named ...-00001-of-{count:05}.gguf; rename the shards back."
        )
    paths = [first.with_name(f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number != 0:
        raise UsageError(f"{first} is shard {number + 1} of {count}; give the first one, {paths[0]}.")
    return paths


def _read_one(path: Path, file: int) -> tuple[dict[str, Scalar], list[TensorInfo]]:
    lib = _library()
    with _silence(lib):
        handle = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if not handle:
        raise UsageError(f"The header of {path} is damaged or of a version this build does not read; download the file again.")
    try:
        metadata: dict[str, Scalar] = {}
        for i in range(lib.gguf_get_n_kv(handle)):
            kind = lib.gguf_get_kv_type(handle, i)
            if kind in _SCALARS:
                value = getattr(lib, f"gguf_get_val_{_SCALARS[kind][0]}")(handle, i)
                metadata[lib.gguf_get_key(handle, i).decode()] = (
                    value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                )
        start = lib.gguf_get_data_offset(handle)
        tensors = []
        for i in range(lib.gguf_get_n_tensors(handle)):
            shape = lib.gguf_get_tensor_ne(handle, i)[:4]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            tensors.append(
                TensorInfo(
                    name=lib.gguf_get_tensor_name(handle, i).decode(),
                    shape=tuple(shape),
                    type=lib.ggml_type_name(lib.gguf_get_tensor_type(handle, i)).decode(),
                    file=file,
                    offset=start + lib.gguf_get_tensor_offset(handle, i),
                    nbytes=lib.gguf_get_tensor_size(handle, i),
                )
            )
    finally:
        lib.gguf_free(handle)
    size, needed = path.stat().st_size, max((t.offset + t.nbytes for t in tensors), default=0)
    if needed > size:
        raise CacherouteError(f"{path} is cut short: {needed} bytes are needed and {size} are there; download it again.")
    return metadata, tensors


def fingerprint(path: Path) -> str:
    """Identifies a model: sha256 over the sizes of all shards and the first and last MiB of each, 16 hex digits.

    A hash of the whole content would read all of a model that is larger than the memory.
    """
    digest = hashlib.sha256()
    for shard in read(path).paths:
        size = shard.stat().st_size
        digest.update(str(size).encode())
        with shard.open("rb") as f:
            digest.update(f.read(1 << 20))
            f.seek(max(size - (1 << 20), 0))
            digest.update(f.read())
    return digest.hexdigest()[:16]
