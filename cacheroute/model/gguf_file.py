"""Reads the header of a GGUF file, all shards of a split one, without touching tensor data.

Uses the reader of llama.cpp's own library: the `gguf` package takes seconds for a real vocabulary. Knows nothing of experts.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cacheroute.errors import UsageError
from cacheroute.files import check_regular, unreadable

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

_ARRAY, _STRING = 9, 8
_MOST_ENTRIES = 2**31 - 1  # of keys and of tensors: llama.cpp counts them with an int
_NUMBERS_KEPT = 4096  # of an array: those with a number for each layer, not a vocabulary's
_TOKENS = b"tokenizer.ggml.tokens"
_LONGEST_ARRAY, _LONGEST_TEXT = 2**21, 2**26  # the largest vocabularies have 300 thousand tokens
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

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
    """The header of a model: its shards in order, scalar metadata of the first, tensors of all.

    kinds: the type of each key, as "u32" or "str"; "[u32]" of an array.
    lengths: of the arrays.
    lists: the arrays of numbers that are no longer than a number for each layer.
    duplicate_token: one that the vocabulary has twice; None without such.
    texts: sha256 of each array of texts, such as the vocabulary, 16 hex digits.
    """

    paths: tuple[Path, ...]
    metadata: dict[str, Scalar]
    tensors: tuple[TensorInfo, ...]
    kinds: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    lists: dict[str, tuple[int | float, ...]] = field(default_factory=dict)
    duplicate_token: str | None = None
    texts: dict[str, str] = field(default_factory=dict)

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
        ("gguf_get_arr_type", ctypes.c_int, [p, i64]),
        ("gguf_get_arr_n", ctypes.c_size_t, [p, i64]),
        ("gguf_get_arr_data", p, [p, i64]),
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

    Raises UsageError where there is no such file, it is no GGUF, ends early, is not the first shard, or a shard is missing or of
    another model.
    """
    first = Path(path)
    head = _read_one(first, 0)
    count = _count(head, "split.count", 1)
    if count < 2:
        return _joined([first], [head])
    paths = _shards(first, _count(head, "split.no", 0), count)
    heads = [head]
    for i, shard in enumerate(paths[1:], start=1):
        heads.append(_read_one(shard, i))
        _check_shard(shard, i, heads[-1], head)
    whole = _joined(paths, heads)
    stated = head.metadata.get("split.tensors.count")
    if isinstance(stated, int) and stated != len(whole.tensors):
        raise UsageError(
            f"{first} names {stated} tensors (split.tensors.count) and its shards have {len(whole.tensors)}: "
            "one of them is of another model; download them again."
        )
    return whole


def _joined(paths: list[Path], heads: list[GgufFile]) -> GgufFile:
    """One model of its shards; what the first says counts."""
    tensors = tuple(t for head in heads for t in head.tensors)
    names = {t.name for t in tensors}
    if len(names) != len(tensors):
        seen: set[str] = set()
        twice = next(t for t in tensors if t.name in seen or seen.add(t.name))  # type: ignore[func-returns-value]
        raise UsageError(
            f"{paths[twice.file]} has the tensor {twice.name}, which another shard has too; download the shards again."
        )
    return dataclasses.replace(heads[0], paths=tuple(paths), tensors=tensors)


def _count(head: GgufFile, key: str, default: int) -> int:
    value = head.metadata.get(key, default)
    if key in head.kinds and head.kinds[key] != "u16":
        raise UsageError(f"{head.paths[0]}: the key {key} is no number of shards (u16); download the file again.")
    return int(value)


def _check_shard(path: Path, number: int, head: GgufFile, first: GgufFile) -> None:
    """Raises UsageError for a file that is not shard `number` of the model of `first`."""
    if head.kinds.get("split.no") != "u16" or head.metadata["split.no"] != number:
        raise UsageError(f"{path} is not shard {number + 1} of its model, as its name says (split.no); download it again.")
    for key in ("split.count", "split.tensors.count", "general.architecture", "general.name"):
        ours, others = head.metadata.get(key), first.metadata.get(key)
        if ours is not None and others is not None and ours != others:
            raise UsageError(f"{path} is a shard of another model: its {key} is {ours}, not {others}; download it again.")


def _check_start(path: Path) -> None:
    """The first bytes, before llama.cpp's reader sees the file: what it is, for which machine, and whether its counts can be."""
    check_regular(path, "a model", missing="`cacheroute models` lists the models that are here.")
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as e:
        raise unreadable(path, e) from None
    if not start:
        raise UsageError(f"{path} is empty; download it again.")
    if start[:4] != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file.")
    if len(start) < 24:
        raise UsageError(f"The header of {path} is damaged: the file ends after {len(start)} bytes; download it again.")
    version, tensors, keys = struct.unpack("<IQQ", start[4:])
    if version and not version & 0xFFFF:
        raise UsageError(f"{path} is a GGUF for big-endian machines; get the one for little-endian machines.")
    if version not in (2, 3):
        raise UsageError(f"{path} is a GGUF of version {version} and this build reads 2 and 3; convert the model again.")
    for what, n in (("tensors", tensors), ("keys", keys)):
        if n > _MOST_ENTRIES:
            raise UsageError(f"The header of {path} is damaged: it claims {n} {what}; download the file again.")


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


def _read_one(path: Path, file: int) -> GgufFile:
    """The header of one file, which is shard `file`."""
    _check_start(path)
    duplicate, texts = _scan(path)
    lib = _library()
    with _silence(lib):
        handle = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if not handle:
        raise UsageError(f"The header of {path} is damaged or of a version this build does not read; download the file again.")
    try:
        head = _header(lib, handle, path, file)
    finally:
        lib.gguf_free(handle)
    size, needed = path.stat().st_size, max((t.offset + t.nbytes for t in head.tensors), default=0)
    if needed > size:
        raise UsageError(f"{path} is cut short: {needed} bytes are needed and {size} are there; download it again.")
    return dataclasses.replace(head, duplicate_token=duplicate, texts=texts)


def _header(lib: ctypes.CDLL, handle: int, path: Path, file: int) -> GgufFile:
    """What the library has read, as values of Python."""
    metadata: dict[str, Scalar] = {}
    kinds: dict[str, str] = {}
    lengths: dict[str, int] = {}
    lists: dict[str, tuple[int | float, ...]] = {}
    for i in range(lib.gguf_get_n_kv(handle)):
        key, kind = _text(lib.gguf_get_key(handle, i)), lib.gguf_get_kv_type(handle, i)
        if kind in _SCALARS:
            kinds[key] = _SCALARS[kind][0]
            value = getattr(lib, f"gguf_get_val_{kinds[key]}")(handle, i)
            metadata[key] = _text(value) if isinstance(value, bytes) else value
        elif kind == _ARRAY:
            element, n = lib.gguf_get_arr_type(handle, i), lib.gguf_get_arr_n(handle, i)
            suffix, ctype = _SCALARS.get(element, ("?", ctypes.c_uint8))
            kinds[key], lengths[key] = f"[{suffix}]", n
            if element != _STRING and n <= _NUMBERS_KEPT:
                data = lib.gguf_get_arr_data(handle, i)
                lists[key] = tuple((ctype * n).from_address(data)) if n else ()
    start = lib.gguf_get_data_offset(handle)
    tensors = []
    for i in range(lib.gguf_get_n_tensors(handle)):
        shape = lib.gguf_get_tensor_ne(handle, i)[:4]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        tensors.append(
            TensorInfo(
                name=_text(lib.gguf_get_tensor_name(handle, i)),
                shape=tuple(shape),
                type=lib.ggml_type_name(lib.gguf_get_tensor_type(handle, i)).decode(),
                file=file,
                offset=start + lib.gguf_get_tensor_offset(handle, i),
                nbytes=lib.gguf_get_tensor_size(handle, i),
            )
        )
    return GgufFile((path,), metadata, tuple(tensors), kinds, lengths, lists)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _scan(path: Path) -> tuple[str | None, dict[str, str]]:
    """Walks over the keys of a file; returns a token that its vocabulary has twice, None without such, and hashes of its texts.

    llama.cpp's reader takes minutes for an array that claims 2^30 entries, which a damaged count does in any large model; that
    is refused here. What else is wrong with the keys is left to the reader. Empty tokens do not count as twice: llama.cpp gives
    each a name of its own.
    """
    # read, not mapped: a shard of 50 GB does not fit in the address space of every process
    with path.open("rb") as file:
        try:
            return _walk(file, path)
        except (struct.error, KeyError):  # the end of the file, a type that does not exist: the reader says so
            return None, {}


def _walk(file: BinaryIO, path: Path) -> tuple[str | None, dict[str, str]]:
    hashes: dict[str, str] = {}

    def number(form: struct.Struct) -> int:
        (n,) = form.unpack(file.read(form.size))
        return int(n)

    def text() -> bytes:
        n = number(_U64)
        if n > _LONGEST_TEXT:
            raise UsageError(f"The header of {path} is damaged: it claims a text of {n} bytes; download the file again.")
        return file.read(n)

    file.seek(16)
    n_keys = number(_U64)
    duplicate = None
    for _ in range(n_keys):
        key = text()
        kind = number(_U32)
        if kind == _ARRAY:
            kind, n = number(_U32), number(_U64)
            if n > _LONGEST_ARRAY:
                raise UsageError(
                    f"The header of {path} is damaged: its key {_text(key)} claims {n} entries; download the file again."
                )
            if kind == _STRING:
                entries = [text() for _ in range(n)]
                hashes[_text(key)] = hashlib.sha256(b"".join(_U64.pack(len(e)) + e for e in entries)).hexdigest()[:16]
                if key == _TOKENS:
                    duplicate = _duplicate(entries)
            else:
                file.seek(n * ctypes.sizeof(_SCALARS[kind][1]), os.SEEK_CUR)
        elif kind == _STRING:
            text()
        else:
            file.seek(ctypes.sizeof(_SCALARS[kind][1]), os.SEEK_CUR)
    return duplicate, hashes


def _duplicate(tokens: list[bytes]) -> str | None:
    seen: set[bytes] = set()
    for token in tokens:
        token = token.partition(b"\0")[0]  # as a string of C
        if token in seen:
            return _text(token)
        if token:
            seen.add(token)
    return None


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


def content_fingerprint(path: Path) -> str:
    """As fingerprint(), and over 4 KiB of each MiB up to 1,024 places: models of one shape with other weights differ. Read once
    in a process for a file that stays as it is."""
    stats = [(str(shard), shard.stat()) for shard in read(path).paths]
    return _content(path, tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


@functools.lru_cache(maxsize=32)
def _content(path: Path, shards: tuple[tuple[str, int, int, int], ...]) -> str:
    digest = hashlib.sha256(fingerprint(path).encode())
    for shard, _, size, _ in shards:
        step = max(size // 1024, 1 << 20)
        with open(shard, "rb") as f:
            for at in range(0, size, step):
                f.seek(at)
                digest.update(f.read(4096))
    return digest.hexdigest()[:16]
