"""How fast this machine computes, measured once for each processor, engine build and number of threads, and kept.

What was measured while other programs took the processors is used once, and not kept.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cacheroute.files import cache_dir, recalled, remember
from cacheroute.forecast import kernels
from cacheroute.forecast.crowd import Look
from cacheroute.forecast.kernels import TypeSpeed
from cacheroute.install import engine_build

FORMAT, VERSION = "cacheroute-compute-speed", 1
_STAND_IN = "q4_0"  # of a type that kernels.TYPES does not name


@dataclass(frozen=True)
class Types:
    """Types of weights by how they lie in memory: `dense` as llama.cpp repacks them, `experts` as in the file, `repacked` experts
    of a model that is loaded whole."""

    dense: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    repacked: frozenset[str] = frozenset()

    def __or__(self, other: Types) -> Types:
        return Types(self.dense | other.dense, self.experts | other.experts, self.repacked | other.repacked)


@dataclass(frozen=True)
class ComputeSpeed:
    """Of one number of threads. `dense`, `experts` and `repacked` as Types, by type of weights.

    node_seconds: of a small operation between two multiplications; attention_seconds: of one pair of tokens in one
    head of a prompt, for each number of the head.
    crowded: other programs took the processors meanwhile.
    """

    n_threads: int
    node_seconds: float
    attention_seconds: float
    dense: Mapping[str, TypeSpeed] = field(default_factory=dict)
    experts: Mapping[str, TypeSpeed] = field(default_factory=dict)
    repacked: Mapping[str, TypeSpeed] = field(default_factory=dict)
    crowded: bool = False

    def of_dense(self, kind: str) -> TypeSpeed:
        return self.dense[measured_as(kind)]

    def of_experts(self, kind: str) -> TypeSpeed:
        return self.experts[measured_as(kind)]

    def of_repacked(self, kind: str) -> TypeSpeed:
        return self.repacked[measured_as(kind)]

    def lacks(self, types: Types) -> Types:
        """Those that have not been measured."""
        return Types(
            *(
                frozenset(map(measured_as, wanted)) - set(found)
                for wanted, found in ((types.dense, self.dense), (types.experts, self.experts), (types.repacked, self.repacked))
            )
        )


def measured_as(kind: str) -> str:
    """The type that is measured for one that a header names."""
    kind = kind.lower()
    return kind if kind in kernels.TYPES else _STAND_IN


def known(n_threads: int) -> ComputeSpeed | None:
    """What has been measured on this machine with so many threads; None: nothing, or it cannot be read."""
    return _of(_kept().get(_key(n_threads)), n_threads)


def measure(types: Types, n_threads: int) -> ComputeSpeed:
    """Measures what is not known yet of these types, a fifth of a second for each, and keeps it unless others compute, too.

    Raises CacherouteError without the engine.
    """
    found = known(n_threads)
    if found and found.lacks(types) == Types():
        return found
    look = Look()
    with kernels.Kernels(n_threads) as own:
        if not found:
            found = ComputeSpeed(n_threads, own.node_seconds(), own.attention_seconds())
        new = found.lacks(types)
        found = replace(
            found,
            dense={**found.dense, **{t: own.dense(t) for t in sorted(new.dense)}},
            experts={**found.experts, **{t: own.experts(t) for t in sorted(new.experts)}},
            repacked={**found.repacked, **{t: own.experts(t, repacked=True) for t in sorted(new.repacked)}},
        )
    if look.crowded:
        return replace(found, crowded=True)
    _keep(found)
    return found


def _file() -> Path:
    return cache_dir() / "compute.json"


def _key(n_threads: int) -> str:
    return f"{_processor()}, engine {engine_build.installed_key() or '?'}, {n_threads} threads"


def _processor(root: Path = Path("/")) -> str:
    """What /proc/cpuinfo tells of the first processor that it lists, of x86 or ARM; elsewhere the architecture."""
    wanted = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    try:
        first = (root / "proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return " ".join(facts[name] for name in wanted if name in facts) or platform.machine()


def _kept() -> dict[str, Any]:
    content = recalled(_file())
    machines = content.get("machines") if (content.get("format"), content.get("version")) == (FORMAT, VERSION) else {}
    return machines if isinstance(machines, dict) else {}


def _of(kept: Any, n_threads: int) -> ComputeSpeed | None:
    try:
        dense, experts, repacked = (
            {str(t): _type_speed(s) for t, s in kept[name].items()} for name in ("dense", "experts", "repacked")
        )
        return ComputeSpeed(n_threads, float(kept["node_seconds"]), float(kept["attention_seconds"]), dense, experts, repacked)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _type_speed(kept: Any) -> TypeSpeed:
    found = TypeSpeed(float(kept["bytes_per_s"]), float(kept["batch_per_s"]))
    if found.bytes_per_s <= 0 or found.batch_per_s <= 0:
        raise ValueError("no speed")
    return found


def _keep(found: ComputeSpeed) -> None:
    """Where the cache folder can be written; if not, the next run measures again."""
    kept = {name: value for name, value in asdict(found).items() if name not in ("n_threads", "crowded")}
    machines = _kept() | {_key(found.n_threads): kept}
    remember(_file(), {"format": FORMAT, "version": VERSION, "machines": machines})
