"""Made-up traces: random scores with the locality and the masks that real ones have."""

from __future__ import annotations

import functools

import numpy as np

from cacheroute.trace import trace_file
from cacheroute.trace.trace_file import BATCH, DECODE, SOFTMAX_MASS, Header, Records, Trace


def header(n_layers: int, n_expert: int, n_used: int, capacity: int = 0) -> Header:
    layers = tuple(range(n_layers))
    return Header("made up", "none", n_expert, n_used, layers, (1 << 20,) * n_layers, "original", "lru", capacity or n_used)


def made_up(n_layers: int, n_expert: int, n_used: int, n_tokens: int, seed: int, *, mass: bool, n_prompt: int = 5) -> Trace:
    """A trace whose neighbouring tokens share experts; two sequences; now and then a masked group; every token a batch."""
    rng = np.random.default_rng(seed)
    records: Records = np.zeros(n_tokens * n_layers, trace_file.record_dtype(n_expert, n_used, mass=mass))
    habit = rng.normal(0, 2, (n_layers, n_expert))
    for t in range(n_tokens):
        habit = 0.9 * habit + rng.normal(0, 0.8, habit.shape)
        for layer in range(n_layers):
            z = habit[layer] + rng.normal(0, 0.5, n_expert)
            if rng.random() < 0.1:
                z[: n_expert // 4] = -np.inf
            record = records[t * n_layers + layer]
            record["sequence"], record["token"] = divmod(t, -(-n_tokens // 2))
            record["layer"] = layer
            record["flags"] = BATCH + DECODE * (record["token"] >= n_prompt) + SOFTMAX_MASS * (not mass)
            record["z"] = z - z.max()
            record["ids"] = np.argsort(-record["z"].astype(float), kind="stable")[:n_used]
            record["n_run"] = n_used
            if mass:
                record["mass"] = rng.random(n_expert) * np.isfinite(z)
    return Trace(header(n_layers, n_expert, n_used), records, complete=True)


@functools.cache
def fed(mass: bool) -> Trace:
    return made_up(2, 24, 4, 160, 11, mass=mass)
