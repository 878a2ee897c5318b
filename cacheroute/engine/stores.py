"""How experts come into memory: chooses what `io` stands for, and opens its store.

`auto` measures both stores once for each filesystem and size of experts. `load` has none: all experts are read with the model.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import cache_dir, write_json
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings

MMAP, DIRECT, AUTO, LOAD, NONE = "mmap", "direct", "auto", "load", "none"
ALL = (MMAP, DIRECT, AUTO, LOAD, NONE)

_NEW = {MMAP: bindings.lib.cr_store_new, DIRECT: bindings.lib.cr_store_new_direct}
_ROUNDS = 24  # of the measurement: as many times the experts of one token in one layer
_SECONDS = 1.0  # after which it ends

Arguments = tuple[Any, ...]


def choose(io: str | None, *, holds_all: bool, reads: str = "", loaded: bool | None = None) -> str:
    """What `io` stands for with a budget. None: "load" where a model is to be loaded for all of its experts, else "mmap".

    Args:
        holds_all: whether the budget holds every expert of every layer.
        reads: a setting that has a meaning only where experts are read later, "" for none.
        loaded: whether the model has been loaded with all experts; None: it is not loaded yet.

    Raises UsageError for what does not exist, or does not go with how the model is or would be loaded.
    """
    if io is None:
        io = LOAD if loaded or (loaded is None and holds_all and not reads) else MMAP
    if io not in ALL:
        raise UsageError(f"There is no io {io!r}; there are {', '.join(ALL[:-1])} and {ALL[-1]}.")
    if loaded and not (io == LOAD and holds_all):
        raise UsageError(
            "This model was loaded with all of its experts in memory; for a smaller budget or another io load it again."
        )
    if io != LOAD:
        return io
    if loaded is False:
        raise UsageError("This model was loaded with its experts left in the file; load it again with a budget of all.")
    if not holds_all:
        raise UsageError("io load reads all experts with the model; give it a budget of all.")
    if reads:
        raise UsageError(f"With all experts in memory nothing is read, so {reads} has no meaning; leave it out, or take io mmap.")
    return io


def open_store(
    io: str, layout: ExpertLayout, address: Callable[[str], int | None], paths: Sequence[str] = ()
) -> tuple[int | None, str]:
    """(handle, what `io` has become): None for "none" and "load", and for "auto" one of the others.

    `address`: where llama.cpp has mapped a tensor; `paths`: of the files, by default those of the layout. Raises CacherouteError
    where it has not, and for what the filesystem cannot do.
    """
    if io in (NONE, LOAD):
        return None, io
    names = [str(p) for p in layout.paths]
    arguments = _arguments(layout, address, paths or names)
    if io != AUTO:
        return _new(io, arguments, names), io
    try:
        io = _choose(layout, arguments)
        return _new(io, arguments, names), io
    except CacherouteError as e:
        _say(f"reads through the page cache: {e}")
        return _new(MMAP, arguments, names), MMAP


def _new(io: str, arguments: Arguments, names: Sequence[str]) -> int:
    """Raises CacherouteError with the names of the files, by whatever paths they were opened."""
    try:
        return bindings.checked(_NEW[io], *arguments)
    except CacherouteError as e:
        text = str(e)
        for path, name in zip(arguments[0], names, strict=True):
            text = text.replace(os.fsdecode(path), name)
        raise CacherouteError(text) from None


def _arguments(layout: ExpertLayout, address: Callable[[str], int | None], paths: Sequence[str]) -> Arguments:
    tensors = []
    for i, layer in enumerate(layout.layers):
        for t in layer.tensors:
            at = address(t.name)
            if not at:
                raise CacherouteError(f"llama.cpp did not map {t.name}; it must stay on the CPU (n_gpu_layers=0).")
            tensors.append(bindings.Tensor(i, t.file, t.offset, t.expert_bytes, at))
    return (
        (ctypes.c_char_p * len(paths))(*(os.fsencode(p) for p in paths)),
        len(paths),
        (bindings.Tensor * len(tensors))(*tensors),
        len(tensors),
        len(layout.layers),
        layout.n_expert,
    )


_said: set[str] = set()


def _say(text: str) -> None:
    """Once in a process."""
    if text not in _said:
        print(f"cacheroute: --io auto {text}", file=sys.stderr)
    _said.add(text)


def _choose(layout: ExpertLayout, arguments: Arguments) -> str:
    """The faster one on the filesystem of the model; what was measured is kept in the user's cache.

    Raises CacherouteError where one of them is not possible.
    """
    file = cache_dir() / "io.json"
    # small experts lose more to whole pages and system calls: one measurement for each power of two
    key = f"{os.stat(arguments[0][0]).st_dev:x}:{layout.layers[0].expert_bytes.bit_length()}"
    known = _known(file)
    if str(known.get(key)) in _NEW:
        return str(known[key])
    stores: dict[str, int] = {}
    try:
        for name in _NEW:
            stores[name] = _new(name, arguments, [str(p) for p in layout.paths])
        seconds = _measure(stores, layout)
    finally:
        for store in stores.values():
            bindings.lib.cr_store_free(store)
    best = min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
    kept = f"This is kept in {file}." if _remember(file, known | {key: best}) else f"Not kept: {file} cannot be written."
    _say(f"reads {best}: an expert takes {times}. {kept}")
    return best


def _measure(stores: dict[str, int], layout: ExpertLayout) -> dict[str, float]:
    """Seconds to read an expert and to drop it again, in turns, layers and experts in random order."""
    lib, order = bindings.lib, random.Random(0)
    n = layout.n_used
    spent = dict.fromkeys(stores, 0.0)
    lib.cr_store_clear(stores[MMAP])  # empties the page cache, too
    done = 0
    while done < _ROUNDS and sum(spent.values()) < _SECONDS:
        layer = order.randrange(len(layout.layers))
        for name in order.sample(list(stores), len(stores)):
            ids = order.sample(range(layout.n_expert), n)
            start = time.perf_counter()
            bindings.exchange(stores[name], layer, load=ids)
            bindings.exchange(stores[name], layer, evict=ids)
            spent[name] += time.perf_counter() - start
        done += 1
    return {name: s / (done * n) for name, s in spent.items()}


def _known(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(file: Path, known: dict[str, Any]) -> bool:
    """Whether it is written; if not, the next run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known, force=True)
    except (OSError, CacherouteError):
        return False
    return True
