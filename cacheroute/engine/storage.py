"""How fast a model's experts are read where its file lies, and whether a miss really reads. Loads no model."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cacheroute.engine import stores
from cacheroute.errors import CacherouteError
from cacheroute.model.experts import ExpertLayout
from cacheroute.native import bindings

_UNKNOWN = bindings.UNKNOWN_BYTES


@dataclass(frozen=True)
class Reading:
    """One way to read. mb_per_s: 10^6 bytes a second; ms: of one expert; left_bytes: of it still in the page cache afterwards,
    None where the kernel does not tell. refused: why it cannot be read so, "" where it can."""

    io: str
    mb_per_s: float = 0.0
    ms: float = 0.0
    left_bytes: int | None = None
    refused: str = ""


@contextlib.contextmanager
def _mapped(layout: ExpertLayout) -> Iterator[list[int]]:
    """Addresses of the files, mapped and unread."""
    with contextlib.ExitStack() as stack:
        at = []
        for path in layout.paths:
            file = stack.enter_context(path.open("rb"))
            view = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            at.append(
                int(np.frombuffer(view, np.uint8).ctypes.data)
            )  # no array may outlive this line: the mapping could not close
        yield at


def measure(layout: ExpertLayout) -> list[Reading]:
    """Both ways, in turns, for about half a second; evicts what the page cache holds of the experts.

    Raises CacherouteError for a file that cannot be read.
    """
    names = [str(path) for path in layout.paths]
    starts = {t.name: (t.file, t.offset) for layer in layout.layers for t in layer.tensors}
    with _mapped(layout) as at:
        arguments = stores.store_arguments(layout, lambda name: at[starts[name][0]] + starts[name][1])
        opened: dict[str, int] = {}
        refused: dict[str, str] = {}
        try:
            for io in (stores.DIRECT, stores.BUFFERED):
                try:
                    opened[io] = stores.new_store(io, arguments, names)
                except CacherouteError as e:
                    refused[io] = str(e).rstrip(".")
            seconds = stores.measure(opened, layout) if opened else {}
            left = {io: bindings.lib.cr_store_measure_resident(store) for io, store in opened.items()}
        finally:
            for store in opened.values():
                bindings.lib.cr_store_free(store)
    size = layout.layers[0].expert_bytes
    found = [
        Reading(io, size / s / 1e6, 1000 * s, None if left[io] == _UNKNOWN else left[io]) for io, s in seconds.items() if s > 0
    ]
    return [*found, *(Reading(io, refused=why) for io, why in refused.items())]
