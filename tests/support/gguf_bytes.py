"""A GGUF file taken apart and put together again, so that tests can write headers that no library would."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclass
class Tensor:
    name: str
    shape: list[int]
    type: int
    offset: int


@dataclass
class Gguf:
    """`keys`: name -> (type, value), or (ARR, (type of the elements, values)); `data` is all tensor data."""

    keys: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    magic: bytes = b"GGUF"
    n_keys: int | None = None  # what the header claims; None: what there is
    n_tensors: int | None = None
    order: str = "<"

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)

    def without(self, *names: str) -> Gguf:
        """Leaves tensors out, and their data, so that the rest lies without gaps."""
        align = self.alignment
        ends = [t.offset for t in self.tensors[1:]] + [len(self.data)]
        kept, data = [], b""
        for t, end in zip(self.tensors, ends, strict=True):
            if t.name not in names:
                kept.append(Tensor(t.name, t.shape, t.type, len(data)))
                data += self.data[t.offset : end]
                data += bytes(-len(data) % align)
        self.tensors, self.data = kept, data
        return self

    @property
    def alignment(self) -> int:
        return int(self.keys.get("general.alignment", (U32, 32))[1]) or 1

    def to_bytes(self) -> bytes:
        out = self.magic + self._pack("I", self.version)
        out += self._pack("Q", len(self.tensors) if self.n_tensors is None else self.n_tensors)
        out += self._pack("Q", len(self.keys) if self.n_keys is None else self.n_keys)
        for key, (kind, value) in self.keys.items():
            out += self._text(key) + self._pack("I", kind)
            if kind == ARR:
                element, values = value
                out += self._pack("I", element) + self._pack("Q", len(values)) + b"".join(self._value(element, v) for v in values)
            else:
                out += self._value(kind, value)
        for t in self.tensors:
            out += self._text(t.name) + self._pack("I", len(t.shape))
            out += b"".join(self._pack("Q", n % 2**64) for n in t.shape) + self._pack("I", t.type) + self._pack("Q", t.offset)
        return out + bytes(-len(out) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path

    def _pack(self, form: str, value: Any) -> bytes:
        return struct.pack(self.order + form, value)

    def _text(self, text: str | bytes) -> bytes:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return self._pack("Q", len(data)) + data

    def _value(self, kind: int, value: Any) -> bytes:
        return self._text(value) if kind == STR else self._pack(_FORMATS.get(kind, "I"), value)


def read(data: bytes) -> Gguf:
    """Takes a file of version 3 apart."""
    at = 4

    def number(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        n = number("Q")
        at += n
        return data[at - n : at].decode("utf-8", "surrogateescape")

    def value(kind: int) -> Any:
        if kind == ARR:
            element, n = number("I"), number("Q")
            return element, [value(element) for _ in range(n)]
        return text() if kind == STR else number(_FORMATS[kind])

    gguf = Gguf(version=number("I"))
    n_tensors, n_keys = number("Q"), number("Q")
    for _ in range(n_keys):
        key, kind = text(), number("I")
        gguf.keys[key] = kind, value(kind)
    for _ in range(n_tensors):
        name = text()
        shape = [number("Q") for _ in range(number("I"))]
        gguf.tensors.append(Tensor(name, shape, number("I"), number("Q")))
    gguf.data = data[at + (-at % gguf.alignment) :]
    return gguf
