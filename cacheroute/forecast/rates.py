"""Tokens per second of a model whose misses have been measured: the forecast for one number, of any file, without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cacheroute.forecast import drive, speed, timing, workload
from cacheroute.forecast.drive import Drive
from cacheroute.forecast.speed import ComputeSpeed
from cacheroute.install.machine import cores
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile


@dataclass(frozen=True)
class Machine:
    """Compute and drive of this machine. `crowded`: other programs computed while it was measured, so it is too slow."""

    compute: ComputeSpeed
    drive: Drive

    @property
    def crowded(self) -> bool:
        return self.compute.crowded


def measure(models: Sequence[tuple[GgufFile, ExpertLayout]], n_threads: int, flash_mbps: float | None = None) -> Machine:
    """This machine, for those files: what is not known of it is measured, for some seconds, and kept.

    Raises CacherouteError without the engine, or for a file that cannot be read.
    """
    types = speed.Types()
    for header, layout in models:
        types |= workload.of_header(header, layout).types(whole=True)
    return Machine(speed.measure(types, n_threads), drive.measure(models[0][1], flash_mbps))


def tokens_per_s(header: GgufFile, layout: ExpertLayout, machine: Machine, missed_bytes: float, *, whole: bool) -> float:
    """With `missed_bytes` of a token, misses x bytes of an expert; `whole`: the model is loaded with all its experts."""
    work = workload.of_header(header, layout)
    rate = 0.0 if whole else min(missed_bytes / (layout.n_used * layout.expert_bytes), 1.0)
    spare = cores() - machine.compute.n_threads
    return 1 / timing.decoding(work, machine.compute, None if whole else machine.drive, rate, timing.DEPTH, spare).seconds
