"""A task's experts: how often a trace used each, so that the cache can be filled before the first token.

The file is JSON: {"format": "cacheroute-task-profile", "version": 1, "model", "architecture", "n_expert", "layers": [llama.cpp's
numbers], "tokens": tokens counted, "uses": [layer][expert]}. `cacheroute trace --save-profile` writes it, `--warm-start` of
generate and bench reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacheroute.errors import UsageError
from cacheroute.files import is_count, read_json, write_json
from cacheroute.model.experts import ExpertLayout
from cacheroute.trace.trace_file import Trace

FORMAT, VERSION = "cacheroute-task-profile", 1


@dataclass(frozen=True)
class TaskProfile:
    """`uses[i][e]`: how many of `tokens` ran expert e of the MoE layer `layers[i]`."""

    model: str
    architecture: str
    n_expert: int
    layers: tuple[int, ...]
    tokens: int
    uses: tuple[tuple[int, ...], ...]

    def best(self, layer: int, n: int) -> list[int]:
        """At most `n` experts of a layer that were used, the most used last (most recent in the cache)."""
        uses = np.asarray(self.uses[layer])
        ranked = np.argsort(-uses, kind="stable")[:n]
        return [int(e) for e in ranked[::-1] if uses[e] > 0]

    def check(self, layout: ExpertLayout) -> None:
        """Raises UsageError when it is of another model."""
        if (self.n_expert, self.layers) != (layout.n_expert, layout.indices) or (layout.model and layout.model != self.model):
            raise UsageError(
                f"The task profile is of {self.model!r} ({len(self.layers)} layers of {self.n_expert} experts), and this "
                f"model is {layout.model!r} ({len(layout.layers)} of {layout.n_expert})."
            )


def summarise(trace: Trace) -> TaskProfile:
    """Counts the experts that ran, prompt and decoded tokens alike."""
    h, records = trace.header, trace.records
    ran = np.arange(h.n_used) < records["n_run"][:, None]
    cell = (records["layer"][:, None].astype(np.int64) * h.n_expert + records["ids"])[ran]
    uses = np.bincount(cell, minlength=len(h.layers) * h.n_expert).reshape(len(h.layers), h.n_expert)
    return TaskProfile(
        model=h.model,
        architecture=h.architecture,
        n_expert=h.n_expert,
        layers=h.layers,
        tokens=int((records["layer"] == 0).sum()),
        uses=tuple(tuple(int(n) for n in row) for row in uses),
    )


def save(profile: TaskProfile, path: Path, *, force: bool = False) -> None:
    """Raises UsageError when the file exists and `force` is not given."""
    write_json(path, {"format": FORMAT, "version": VERSION, **asdict(profile)}, force=force)


def _count(value: Any) -> int:
    if not is_count(value) or value >= 2**63:
        raise ValueError(f"{value!r} is no number of uses")
    return int(value)


def load(path: Path) -> TaskProfile:
    """Raises UsageError for what is no task profile."""
    content = read_json(path, FORMAT, VERSION)
    try:
        profile = TaskProfile(
            model=str(content["model"]),
            architecture=str(content["architecture"]),
            n_expert=int(content["n_expert"]),
            layers=tuple(int(i) for i in content["layers"]),
            tokens=int(content["tokens"]),
            uses=tuple(tuple(_count(n) for n in row) for row in content["uses"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise UsageError(f"{path} is a damaged task profile ({e}); make it again.") from None
    if len(profile.uses) != len(profile.layers) or any(len(row) != profile.n_expert for row in profile.uses):
        raise UsageError(f"{path} is a damaged task profile; make it again.")
    return profile
