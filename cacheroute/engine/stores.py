"""How experts come into memory: chooses what `io` stands for, and opens its store.

`auto` takes direct reads where they work and are not slower, which is measured once for each filesystem and size of experts;
where the page cache cannot be emptied, which would be measured instead, it takes them wherever they work.
`load` has no store: all experts are read with the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import cache_dir, is_number, recalled, remember
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings

AUTO, DIRECT, BUFFERED, LOAD, NONE = "auto", "direct", "buffered", "load", "none"
ALL = (AUTO, DIRECT, BUFFERED, LOAD, NONE)

_SECONDS = 0.2  # of the measurement, which may be a token's experts longer
_ROUNDS = 16  # at most: as many times the experts of one token in one layer
_SPEEDS = "drive.json"  # in the cache folder
_ROUNDS_KEPT = "rounds"
_FASTEST = 1e6  # 10^6 bytes a second: no drive gives that
_CLEARLY = 1.2  # so many times slower must direct reads be: they take a third of the processor time (scripts/RESULTS.md)

Arguments = tuple[Any, ...]


def choose(io: str, *, holds_all: bool, reads: str = "", loaded: bool | None = None) -> str:
    """What `io` stands for with a budget: "auto" is "load" where a model is, or is to be, loaded with all of its experts.

    Args:
        holds_all: whether the budget holds every expert of every layer.
        reads: a setting that has a meaning only where experts are read later, "" for none.
        loaded: whether the model has been loaded with all experts; None: it is not loaded yet.

    Raises UsageError for what does not exist, or does not go with how the model is or would be loaded.
    """
    if io == AUTO and (loaded or (loaded is None and holds_all and not reads)):
        io = LOAD
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
        raise UsageError(
            f"With all experts in memory nothing is read, so {reads} has no meaning; leave it out, or take io direct."
        )
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
    wanted = store_arguments(layout, address, paths)
    why = ""
    if io == AUTO:
        try:
            io, measured = _choose(layout, wanted) if drops_cached() else (DIRECT, None)
            return measured or new_store(io, wanted, names), io
        except CacherouteError as e:
            io, why = BUFFERED, f"--io auto reads through the page cache: {e}"
    store = new_store(io, wanted, names)
    _say(why)
    if io == BUFFERED and not drops_cached():
        _say(f"{NOT_DROPPED}.")
    return store, io


NOT_DROPPED = "this system keeps what was read in its page cache, so a miss may be answered from memory"


def drops_cached() -> bool:
    """Whether what was read can be taken out of the page cache: on Linux and Android; macOS has no call for it."""
    return bool(bindings.lib.cr_system() & bindings.DROPS_CACHED)


def new_store(io: str, arguments: Arguments, names: Sequence[str]) -> int:
    """A cr_store that reads directly or buffered. Raises CacherouteError with the `names` of the files, by whatever paths they
    were opened; of direct reads also where these give other bytes than are in a file (native/slots.cpp)."""
    try:
        return bindings.checked(bindings.lib.cr_store_new, *arguments, int(io == DIRECT))
    except CacherouteError as e:
        text = str(e)
        for path, name in zip(arguments[0], names, strict=True):
            text = text.replace(os.fsdecode(path), name)
        raise CacherouteError(text) from None


def store_arguments(layout: ExpertLayout, address: Callable[[str], int | None], paths: Sequence[str] = ()) -> Arguments:
    """For new_store(); as open_store()."""
    paths = paths or [str(p) for p in layout.paths]
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
    if text and text not in _said:
        print(f"cacheroute: {text}", file=sys.stderr)
    _said.add(text)


_unkept: dict[str, dict[str, str]] = {}
"""What was measured in this process and could not be written to a file, so that it is measured and reported once."""


def _choose(layout: ExpertLayout, arguments: Arguments) -> tuple[str, int | None]:
    """The better one on the filesystem of the model, and its store where it had to be opened to measure it; what was measured is
    kept in the user's cache.

    Raises CacherouteError where one of them is not possible.
    """
    file = choices_file()
    key = _place(os.stat(arguments[0][0]).st_dev, layout)
    known = _decided(file)
    if key in known:
        return known[key], None
    stores: dict[str, int] = {}
    try:
        for name in (DIRECT, BUFFERED):
            stores[name] = new_store(name, arguments, [str(p) for p in layout.paths])
        seconds = measure(stores, layout)
        best = faster(seconds)
        chosen = stores.pop(best)
    finally:
        for store in stores.values():
            bindings.lib.cr_store_free(store)
    bindings.lib.cr_store_clear(chosen)
    times = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
    kept = remember(file, known | {key: best})
    if not kept:
        _unkept.setdefault(str(file), {})[key] = best
    remember_speeds(layout, {io: layout.layers[0].expert_bytes / s / 1e6 for io, s in seconds.items()})
    if best == BUFFERED:
        where = f"this is kept in {file}." if kept else f"{file} cannot be written."
        _say(f"--io auto reads buffered ({times} an expert); {where}")
    return best, chosen


def choices_file() -> Path:
    """Where what "auto" has been decided to is kept."""
    return cache_dir() / "io.json"


def remembered(layout: ExpertLayout) -> str | None:
    """DIRECT or BUFFERED: what "auto" has been decided to on the filesystem of the model; None: nothing yet."""
    return _decided(choices_file()).get(_place(layout.paths[0].stat().st_dev, layout))


def _decided(file: Path) -> dict[str, str]:
    """DIRECT or BUFFERED by place, in the file and in this process."""
    known = recalled(file) | _unkept.get(str(file), {})
    return {place: io for place, io in known.items() if io in (DIRECT, BUFFERED)}


def faster(seconds: dict[str, float]) -> str:
    """Direct reads, unless buffered ones take clearly less time."""
    return BUFFERED if seconds[DIRECT] > _CLEARLY * seconds[BUFFERED] else DIRECT


def _place(device: int, layout: ExpertLayout) -> str:
    """What is measured once: small experts lose more to whole pages and system calls, so for each power of two."""
    return f"{device:x}:{layout.layers[0].expert_bytes.bit_length()}"


def speeds(layout: ExpertLayout, rounds: int = 1) -> dict[str, float]:
    """10^6 bytes a second by io, as they were measured on this filesystem with experts of about this size, in so many rounds at
    least; {}: they were not."""
    found = recalled(cache_dir() / _SPEEDS).get(_place(layout.paths[0].stat().st_dev, layout))
    if not isinstance(found, dict) or not is_number(found.get(_ROUNDS_KEPT, 0)) or found.get(_ROUNDS_KEPT, 0) < rounds:
        return {}
    return {io: float(found[io]) for io in (DIRECT, BUFFERED) if is_number(found.get(io)) and 0 < found[io] < _FASTEST}


def remember_speeds(layout: ExpertLayout, measured: dict[str, float], rounds: int = 1) -> None:
    """For speeds(), where the cache folder can be written. What was measured more times stays."""
    with contextlib.suppress(OSError):  # a file that is gone, or was given as an open one
        if rounds > 1 or not speeds(layout):
            file = cache_dir() / _SPEEDS
            kept = {**measured, _ROUNDS_KEPT: rounds}
            remember(file, recalled(file) | {_place(layout.paths[0].stat().st_dev, layout): kept})


def measure(stores: dict[str, int], layout: ExpertLayout) -> dict[str, float]:
    """Seconds to read an expert and to drop it again, in turns, layers and experts in random order."""
    lib, order = bindings.lib, random.Random(0)
    n = layout.n_used
    spent = dict.fromkeys(stores, 0.0)
    for store in stores.values():
        lib.cr_store_clear(store)  # empties the page cache, too
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
