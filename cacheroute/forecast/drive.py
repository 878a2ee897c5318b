"""How fast experts come from the device: as measured on the filesystem of a model, kept, or as given."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from cacheroute.engine import storage, stores
from cacheroute.errors import CacherouteError
from cacheroute.forecast.crowd import Look
from cacheroute.model.experts import ExpertLayer, ExpertLayout, ExpertTensor

MEASURED, GIVEN = "measured", "given"
_ROUNDS = 3
# Processor time of reading a byte, all threads (scripts/RESULTS.md, "What the instrument costs", and LOG.md on buffered reads)
CPU_SECONDS_PER_BYTE = {stores.DIRECT: 1.2e-10, stores.BUFFERED: 4.7e-10}


@dataclass(frozen=True)
class Drive:
    """The better way to read and its bytes a second. `how`: MEASURED; GIVEN for a pace that is the least, or another drive."""

    io: str
    bytes_per_s: float
    how: str

    @property
    def cpu_seconds_per_byte(self) -> float:
        return CPU_SECONDS_PER_BYTE[self.io]


def known(layout: ExpertLayout, flash_mbps: float | None = None, io: str = stores.AUTO) -> Drive | None:
    """By what is remembered of the filesystem, which is read no faster than a pace that is given; None: neither is known."""
    return _better(stores.speeds(layout), flash_mbps, io)


def measure(layout: ExpertLayout, flash_mbps: float | None = None) -> Drive:
    """Remembered, or measured for about a second; what was measured once only, or while other programs took the processors, is
    measured again. `flash_mbps`: not this drive but one of that many 10^6 bytes/s, which may be faster, read as is known to be
    better on this one. Raises CacherouteError for a file that cannot be read."""
    if flash_mbps:
        here = known(layout)
        return Drive(here.io if here else stores.DIRECT, flash_mbps * 1e6, GIVEN)
    speeds = stores.speeds(layout, _ROUNDS)
    if not speeds:
        look = Look()
        readings = [reading for _ in range(_ROUNDS) for reading in storage.measure(layout)]
        of = {r.io: [x.mb_per_s for x in readings if x.io == r.io and not x.refused] for r in readings if not r.refused}
        speeds = {io: statistics.median(values) for io, values in of.items()}
        stores.remember_speeds(layout, speeds, 1 if look.crowded else _ROUNDS)
    found = _better(speeds, None, stores.AUTO)
    if found is None:
        raise CacherouteError(f"{layout.paths[0]} cannot be read fast enough to measure it.")
    return found


def blocks(file: Path, size: int) -> ExpertLayout:
    """Any large file as experts of `size` bytes, to measure the filesystem on which it lies. At least four blocks are needed."""
    n = file.stat().st_size // size
    layer = ExpertLayer(0, (ExpertTensor("blocks", "i8", 0, 0, size),))
    return ExpertLayout((file,), "none", n, min(4, n), (layer,))


def _better(speeds: dict[str, float], flash_mbps: float | None, io: str) -> Drive | None:
    """`io`: auto takes what the engine would."""
    if io == stores.AUTO or io not in speeds:
        if {stores.DIRECT, stores.BUFFERED} <= set(speeds):
            io = stores.faster({name: 1 / speed for name, speed in speeds.items()})
        else:
            io = next(iter(speeds), stores.DIRECT)
    own = speeds.get(io)
    if flash_mbps and (own is None or flash_mbps < own):
        return Drive(io, flash_mbps * 1e6, GIVEN)
    return Drive(io, own * 1e6, MEASURED) if own else None
