"""The forecast in one line, for the start of a command: only from what is known already, so that nobody waits for it."""

from __future__ import annotations

import contextlib

from cacheroute.engine import stores
from cacheroute.errors import CacherouteError
from cacheroute.files import GIB, MIB
from cacheroute.forecast import candidates, drive, misses, speed, timing, workload
from cacheroute.forecast.drive import Drive
from cacheroute.forecast.speed import ComputeSpeed, Types
from cacheroute.forecast.workload import Workload
from cacheroute.install.machine import big_cores, cores
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Routing

_WHOLE_NUMBERS_FROM = 10


def first_line(
    header: GgufFile,
    layout: ExpertLayout,
    capacity: int,
    io: str = stores.AUTO,
    *,
    routing: str | Routing | None = None,
    eviction: str = evictions.DEFAULT,
    n_threads: int | None = None,
    flash_mbps: float | None = None,
) -> str:
    """As in "Qwen3-30B-A3B: 3.6 of 14.5 GiB of experts in memory, direct reads at 1.3 GB/s; about 5 tok/s; 12 at 1% loss with
    --routing tuned".

    capacity: experts of each layer in memory. io: as the engine takes it. routing: the one that runs, None: `original`.
    What has not been measured on this machine (`cacheroute plan` does) is left out. Takes some 50 ms.
    """
    work = workload.of_header(header, layout)
    room = "room for " if capacity >= layout.n_expert and io not in (stores.AUTO, stores.LOAD) else ""
    text = f"{work.name}: {room}{held(layout, capacity)} of experts in memory"
    with contextlib.suppress(CacherouteError):  # no folder for what has been measured
        text += _known(work, layout, capacity, io, routing, eviction, n_threads, flash_mbps)
    return text


def _known(
    work: Workload,
    layout: ExpertLayout,
    capacity: int,
    io: str,
    routing: str | Routing | None,
    eviction: str,
    n_threads: int | None,
    flash_mbps: float | None,
) -> str:
    """What has been measured on this machine, for the end of the line."""
    text, whole = "", capacity >= layout.n_expert
    loaded = whole and io in (stores.AUTO, stores.LOAD)
    found = None if loaded else drive.known(layout, flash_mbps, io)
    if found:
        text += f", {found.io} reads at {_amount(found.bytes_per_s / 1e9)} GB/s"
    own = speed.known(n_threads or big_cores())
    if own is None or own.lacks(work.types(whole=loaded)) != Types() or (found is None and not loaded):
        return text
    parsed = strategies.parse(routing or "original") if not isinstance(routing, Routing) else routing
    if not (parsed.policy or parsed.speculates):
        text += f"; about {_amount(_tokens_per_s(work, own, found, capacity, parsed, eviction, layout))} tok/s"
    tuned = None if whole or parsed.lossy else candidates.tuned_for(layout.paths[0], capacity)
    if tuned and (tuned.loss is not None or tuned.kl is not None):
        price = f"at {tuned.loss:g}% loss" if tuned.kl is None else f"at a KL of {1000 * tuned.kl[0]:.1f} millinats"
        faster = _tokens_per_s(work, own, found, capacity, tuned.routing, tuned.eviction, layout)
        text += f"; {_amount(faster)} {price} with --routing tuned"
    return text


def held(layout: ExpertLayout, capacity: int) -> str:
    """As in "3.6 of 14.5 GiB": what a budget of `capacity` experts of each layer takes, in whole pages as budgets
    are counted; as "all 14.5 GiB", as the file has them, for all."""
    whole = capacity >= layout.n_expert
    every = layout.all_expert_bytes if whole else layout.n_expert * layout.resident_bytes
    unit, name = (GIB, "GiB") if every >= GIB else (MIB, "MiB")
    text = f"{every / unit:.1f} {name}"
    return f"all {text}" if whole else f"{capacity * layout.resident_bytes / unit:.1f} of {text}"


def _tokens_per_s(
    work: Workload,
    own: ComputeSpeed,
    found: Drive | None,
    capacity: int,
    routing: Routing,
    eviction: str,
    layout: ExpertLayout,
) -> float:
    rate, _ = misses.typical(work.n_expert, work.n_used, capacity, routing, eviction, layout.paths[0])
    return 1 / timing.decoding(work, own, found, rate, timing.DEPTH, cores() - own.n_threads).seconds


def _amount(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= _WHOLE_NUMBERS_FROM else f"{value:.2g}"
