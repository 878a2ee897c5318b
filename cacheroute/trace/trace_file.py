"""Traces: the router's scores and choices by token and layer, in a file that numpy reads.

The file is one line of JSON, padded with spaces, then records of one fixed size until the end, then the line `end`. A trace
that was interrupted lacks the end and perhaps a part of its last record; the complete records are valid. Five lines read it:

    import json, numpy as np
    with open("my.trace", "rb") as file:
        header = json.loads(file.readline())
        records = np.fromfile(file, np.dtype([tuple(field) for field in header["dtype"]]))
    top = np.argsort(-records["z"].astype(float), kind="stable")[:, : header["n_used"]]    # what the model itself chooses

One record is one token in one layer, in the order in which they ran; a prompt runs layer by layer.

    sequence  u4        0, 1, ...: each starts from an empty cache
    token     u4        position in its sequence
    layer     u2        index into the header's `layers`, which has llama.cpp's numbers
    flags     u1        1: decoded, else of the prompt; 2: the model itself prescribed the ids; 4: the mass is softmax(z);
                        8: the first token of a micro-batch in its layer (traces of earlier versions do not have it)
    n_run     u1        how many of the ids ran
    ids       u2[K]     experts chosen, best z first; those that did not run repeat the first
    resident  u1[E/8]   the cache before the token, bit e % 8 of byte e // 8 (np.unpackbits(..., bitorder="little"))
    z         f2[E]     the scores that were ranked, minus the largest; -inf where an expert may not be chosen
    mass      f2[E]     router mass; only where it is not softmax(z)

float16 makes ties, and ties go to the lower expert. Where that would change the model's own choice, its order, or the order of
its masses, a score was lowered by the few units in the last place that keep them: the K best of `z` are the model's own K, in
order. (Where ids are prescribed, this holds for those ids.) `original` therefore replays exactly as it ran; a lossy routing
replays on scores of 11 bits, and on the tokens that were recorded, not on those that its own choice would have led to.

engine.Llama.tracing() records traces, simulate.py replays them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheroute import files
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model.experts import ExpertLayer, ExpertLayout, ExpertTensor

FORMAT, VERSION = "cacheroute-trace", 1
DECODE, PRESCRIBED, SOFTMAX_MASS, BATCH = 1, 2, 4, 8
_MOST_EXPERTS = 1 << 16  # ids have 16 bits
_ALIGN, _END = 64, b"end\n"

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Header:
    """Model and settings of a trace. `expert_bytes`: of one expert, by layer."""

    model: str
    architecture: str
    n_expert: int
    n_used: int
    layers: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    routing: str
    eviction: str
    budget_experts: int

    @staticmethod
    def of(layout: ExpertLayout, routing: str, eviction: str, budget_experts: int) -> Header:
        return Header(
            model=layout.model,
            architecture=layout.architecture,
            n_expert=layout.n_expert,
            n_used=layout.n_used,
            layers=layout.indices,
            expert_bytes=tuple(layer.expert_bytes for layer in layout.layers),
            routing=routing,
            eviction=eviction,
            budget_experts=budget_experts,
        )

    @property
    def layout(self) -> ExpertLayout:
        """The model's layout as far as a trace knows it: no files, one tensor a layer."""
        layers = [ExpertLayer(i, (ExpertTensor("", "", 0, 0, n),)) for i, n in zip(self.layers, self.expert_bytes, strict=True)]
        return ExpertLayout((), self.architecture, self.n_expert, self.n_used, tuple(layers), self.model)


@dataclass(frozen=True)
class Trace:
    """A trace that was read. `complete`: it was not interrupted."""

    header: Header
    records: Records
    complete: bool


def record_dtype(n_expert: int, n_used: int, *, mass: bool) -> np.dtype[np.void]:
    """The record of a model with E = `n_expert`, K = `n_used`; native/trace.h writes it, always with `mass`."""
    fields: list[Any] = [("sequence", "<u4"), ("token", "<u4"), ("layer", "<u2"), ("flags", "u1"), ("n_run", "u1")]
    fields += [("ids", "<u2", (n_used,)), ("resident", "u1", (-(-n_expert // 8),)), ("z", "<f2", (n_expert,))]
    return np.dtype(fields + ([("mass", "<f2", (n_expert,))] if mass else []))


class TraceWriter:
    """Writes FILE.part as records come, and makes it FILE when it is closed without an error; used with `with`.

    Raises UsageError when FILE or FILE.part exists and `force` is not given or there is no such folder, CacherouteError when it
    cannot write.
    """

    def __init__(self, path: Path, header: Header, *, force: bool = False) -> None:
        self.path, self.header = path, header
        self._target = files.written(path)
        self.part = self._target.with_name(self._target.name + ".part")
        self.n_records = 0
        self._failed = False  # a disk is full, say: what is in FILE.part then is of no use
        self._with_mass: bool | None = None
        for file in (path, self.part):
            files.check_new(file, force=force)
        try:
            self._file = self.part.open("wb" if force else "xb", buffering=0)
        except OSError as e:
            raise files.unwritable(self.part, e) from None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self.n_records:
                self._write(_END)
                os.replace(self.part, self._target)
        except OSError as e:
            raise CacherouteError(f"{self.path} cannot be written ({e.strerror}).") from None
        finally:
            self._file.close()
            if self._failed or not self.n_records:
                self.part.unlink(missing_ok=True)

    def append(self, data: bytes) -> None:
        """Appends records as the native hook gives them; they are in the file when this returns."""
        h = self.header
        full = record_dtype(h.n_expert, h.n_used, mass=True)
        records: Records = np.frombuffer(data, full)
        if not len(records):
            return
        if self._with_mass is None:
            self._with_mass = not (records["flags"] & SOFTMAX_MASS).all()
            self._write(_encode(h, record_dtype(h.n_expert, h.n_used, mass=self._with_mass)))
        if not self._with_mass:
            short: Records = np.empty(len(records), record_dtype(h.n_expert, h.n_used, mass=False))
            for name in short.dtype.names or ():
                short[name] = records[name]
            records = short
        self._write(records.tobytes())
        self.n_records += len(records)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as e:
            self._failed = True
            raise CacherouteError(f"{self.part} cannot be written ({e.strerror}).") from None


def write(path: Path, header: Header, records: Records, *, force: bool = False) -> None:
    """Writes a whole trace; `records` as record_dtype() has them, with mass or without."""
    with TraceWriter(path, header, force=force) as writer:
        full: Records = np.zeros(len(records), record_dtype(header.n_expert, header.n_used, mass=True))
        for name in records.dtype.names or ():
            full[name] = records[name]
        writer.append(full.tobytes())


def _encode(header: Header, dtype: np.dtype[np.void]) -> bytes:
    content = {"format": FORMAT, "version": VERSION, "cacheroute": files.VERSION, **asdict(header), "dtype": _fields(dtype)}
    line = json.dumps(content).encode()
    return line + b" " * (-(len(line) + 1) % _ALIGN) + b"\n"


def _fields(dtype: np.dtype[np.void]) -> list[list[Any]]:
    """A record as the header has it."""
    columns = [(name, dtype[name]) for name in dtype.names or ()]
    return [[name, c.base.str, list(c.shape)] if c.shape else [name, c.str] for name, c in columns]


def read(path: Path) -> Trace:
    """Maps a trace into memory. Raises UsageError for a file that is none, of another version, damaged, or without a token."""
    part = path.with_name(path.name + ".part")
    files.check_regular(path, "a trace", missing=f"{part} is what an interrupted run left." if part.exists() else "")
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(size, len(_END)), os.SEEK_END)
            tail = file.read()
    except OSError as e:
        raise files.unreadable(path, e) from None
    header, with_mass = _decode(path, line)
    dtype = record_dtype(header.n_expert, header.n_used, mass=with_mass)
    n, rest = divmod(size - len(line), dtype.itemsize)
    if n == 0:
        raise UsageError(f"{path} was cut short before its first record; trace again.")
    records: Records = np.memmap(path, dtype, mode="r", offset=len(line), shape=(n,))
    if (records["layer"] >= len(header.layers)).any() or (records["ids"] >= header.n_expert).any():
        raise UsageError(f"{path} is damaged: it names experts or layers that its model does not have.")
    if (records["n_run"] > header.n_used).any() or not all(_are_scores(records, name) for name in ("z", "mass")[: 1 + with_mass]):
        raise UsageError(f"{path} is damaged: it has scores that are no numbers; trace again.")
    return Trace(header, records, complete=rest == len(_END) and tail == _END)


def _are_scores(records: Records, name: str) -> bool:
    """Whether a field has neither NaN nor +inf, which the router could not rank; a million values at a time."""
    step = max((1 << 20) // records.dtype[name].shape[0], 1)
    pieces = (np.asarray(records[start : start + step][name]) for start in range(0, len(records), step))
    return all(bool((piece < np.inf).all()) for piece in pieces)


def _decode(path: Path, line: bytes) -> tuple[Header, bool]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a trace; `cacheroute trace` makes one.")
    if content.get("version") != VERSION:
        raise UsageError(f"{path} is a trace of version {content.get('version')}; this cacheroute reads version {VERSION}.")
    try:
        header = Header(
            model=str(content["model"]),
            architecture=str(content["architecture"]),
            n_expert=int(content["n_expert"]),
            n_used=int(content["n_used"]),
            layers=_ints(content["layers"]),
            expert_bytes=_ints(content["expert_bytes"]),
            routing=str(content["routing"]),
            eviction=str(content["eviction"]),
            budget_experts=int(content["budget_experts"]),
        )
        stored = content["dtype"]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(f"{path} has a damaged header; trace again.") from None
    fits = 0 < header.n_used <= header.n_expert <= _MOST_EXPERTS and 0 < len(header.layers) == len(header.expert_bytes)
    # compared as it was written: numpy would evaluate what a damaged header says
    forms = {mass: _fields(record_dtype(header.n_expert, header.n_used, mass=mass)) for mass in (True, False)} if fits else {}
    with_mass = stored == forms.get(True)
    if not with_mass and stored != forms.get(False, ()):
        raise UsageError(f"{path} has a header that contradicts itself; trace again.")
    return header, with_mass


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
