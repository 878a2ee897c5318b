"""Scores that are forced on a model: those that a trace recorded, or random ones of a given locality.

A model of random weights and real shape shows how fast a real one would be only if its layers choose experts as a real one's
do. So its layers rank, token by token, given scores; the router, the cache and the reads are those of any run, and every
routing and eviction acts on these scores. Expert e of a layer is expert e of the recorded layer, so E and K must be the same; the
layers of the model are spread evenly over the recorded ones (layer i of n takes recorded layer i * m // n of m). The first
sequence that is long enough is taken, its first tokens as the prompt, however they were recorded.

`synthetic:rho=0.3:skew=0.35:prediction=0.87:seed=0` needs no trace. Each expert's score is its popularity plus a first-order
autoregression,

    z[t, e] = skew * b[e] + x[t, e],    x[t, e] = rho * x[t-1, e] + sqrt(1 - rho^2) * noise,    b, x, noise ~ N(0, 1)

so `rho` is the correlation of a score from one token to the next, and `skew` how much some experts are preferred to others,
in standard deviations of x. Layers are independent. The defaults are those of the demo model on held-out text (means over its
layers: 0.29 and 0.36), and with its E and K they miss as it does: at 25/50/75% of the experts lru misses .58/.35/.15 of those
chosen, and .57/.32/.13 on its trace.

Where experts are prefetched or speculated, the next layer's router cannot predict such scores; scores that correlate with them
by `prediction` stand for it. On the demo model that correlation is 0.87, the mean over its layers. A trace has none.

engine.Llama.force() takes the scores; no model is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cacheroute.errors import UsageError
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Parameter
from cacheroute.trace import trace_file

SYNTHETIC = "synthetic"
PARAMETERS = (
    Parameter("rho", "correlation of an expert's score from one token to the next", 0, 1, required=False),
    Parameter("skew", "spread of the experts' popularity, in standard deviations of their scores", 0, None, required=False),
    Parameter("prediction", "correlation of the predictions by which experts are prefetched or speculated", 0, 1, required=False),
    Parameter("seed", "of the random numbers", 0, None, integer=True, required=False),
)
DEFAULTS = {"rho": 0.3, "skew": 0.35, "prediction": 0.87, "seed": 0}
FORM = f"TRACE|{strategies.form(SYNTHETIC, PARAMETERS)}"
HELP = "; ".join(f"{p.name}: {p.meaning} ({DEFAULTS[p.name]:g})" for p in PARAMETERS) + "."

Floats = npt.NDArray[np.float64]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Source:
    """Where a routing comes from, not yet bound to a model: a trace, or `parameters` of a synthetic one."""

    trace: Path | None = None
    parameters: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.trace or ":".join([SYNTHETIC, *(f"{k}={v:g}" for k, v in self.parameters.items())]))


@dataclass(frozen=True)
class ForcedScores:
    """`z`: one array [n_tokens, E] for each MoE layer of a model, as a trace keeps them; a row that starts with NaN is not known.

    `mass` likewise, empty where it is softmax(z). `predicted`: what stands for a prediction of z, by which experts are
    prefetched; empty: none are. `name` is their source.
    """

    name: str
    z: tuple[Halves, ...]
    mass: tuple[Halves, ...] = ()
    predicted: tuple[Halves, ...] = ()


def parse(text: str) -> Source:
    """A trace, or `synthetic` with its parameters. Raises UsageError for wrong parameters."""
    name, *pairs = text.strip().split(":")
    if not text.strip():
        raise UsageError("There is nothing to replay; name a trace, or `synthetic`.")
    if name != SYNTHETIC:
        return Source(Path(text))
    return Source(parameters=DEFAULTS | strategies.parse_parameters(name, PARAMETERS, pairs))


def bind(source: Source, layout: ExpertLayout, n_prompt: int, n_gen: int) -> ForcedScores:
    """The scores of a prompt and the tokens after it, for every layer of a model.

    Raises UsageError for a file that is no trace, one of a model with another E or K, and one that lacks some of these tokens.
    """
    if source.trace:
        return _recorded(source.trace, layout, n_prompt, n_gen)
    seed = int(source.parameters["seed"])
    layers = _layers(len(layout.layers), n_prompt + n_gen, layout.n_expert, source.parameters)
    correlation = source.parameters["prediction"]
    predicted = [_predicted(np.random.default_rng([seed, i, 1]), z, correlation) for i, z in enumerate(layers)]
    return ForcedScores(str(source), tuple(map(_halves, layers)), predicted=tuple(map(_halves, predicted)))


def synthetic(n_layers: int, n_tokens: int, n_expert: int, parameters: dict[str, float]) -> tuple[Halves, ...]:
    """The scores of so many layers, [n_tokens, E] each; `parameters`: those of PARAMETERS that differ from DEFAULTS."""
    return tuple(map(_halves, _layers(n_layers, n_tokens, n_expert, DEFAULTS | parameters)))


def _layers(n_layers: int, n_tokens: int, n_expert: int, parameters: dict[str, float]) -> list[Floats]:
    seed = int(parameters["seed"])
    return [_autoregression(np.random.default_rng([seed, i]), n_tokens, n_expert, parameters) for i in range(n_layers)]


def _autoregression(rng: np.random.Generator, n_tokens: int, n_expert: int, parameters: dict[str, float]) -> Floats:
    rho = parameters["rho"]
    popularity = parameters["skew"] * rng.standard_normal(n_expert)
    x = rng.standard_normal(n_expert)
    z = np.empty((n_tokens, n_expert))
    for t in range(n_tokens):
        z[t] = popularity + x
        x = rho * x + np.sqrt(1 - rho * rho) * rng.standard_normal(n_expert)
    return z


def _predicted(rng: np.random.Generator, z: Floats, prediction: float) -> Floats:
    noise = z.std() * rng.standard_normal(z.shape)
    predicted: Floats = prediction * (z - z.mean()) + np.sqrt(1 - prediction * prediction) * noise
    return predicted


def _halves(z: Floats) -> Halves:
    halves: Halves = (z - z.max(axis=1, keepdims=True)).astype(np.float16)
    return halves


def _recorded(path: Path, layout: ExpertLayout, n_prompt: int, n_gen: int) -> ForcedScores:
    trace = trace_file.read(path)
    h, n_tokens, n_layers = trace.header, n_prompt + n_gen, len(layout.layers)
    if (h.n_expert, h.n_used) != (layout.n_expert, layout.n_used):
        raise UsageError(
            f"{path} is of a model that uses {h.n_used} of {h.n_expert} experts, and this one uses {layout.n_used} of "
            f"{layout.n_expert}; replay a trace of such a model, or {SYNTHETIC}."
        )
    own = _long_enough(path, trace, n_tokens)
    if (own["flags"] & trace_file.PRESCRIBED).any():
        raise UsageError(f"{path} has layers with prescribed experts; those have no scores to replay.")
    wanted = [i * len(h.layers) // n_layers for i in range(n_layers)]
    with_mass = "mass" in (own.dtype.names or ())
    z, mass = (_table(own, name, wanted, n_tokens, h.n_expert) for name in ("z", "mass" if with_mass else "z"))
    for i, table in enumerate(z):
        # of a prompt llama.cpp takes only the last token through the last layer
        first = max(n_prompt - 1, 0) if i == n_layers - 1 else 0
        if np.isnan(table[first:, 0]).any():
            raise UsageError(f"{path} lacks prompt tokens of its last layer; trace the text token by token, without --n-prompt.")
    return ForcedScores(str(path), z, mass if with_mass else ())


def _long_enough(path: Path, trace: trace_file.Trace, n_tokens: int) -> trace_file.Records:
    """The first `n_tokens` of the first sequence that has them in all layers."""
    longest = 0
    for sequence in np.unique(trace.records["sequence"]):
        own: trace_file.Records = trace.records[trace.records["sequence"] == sequence]
        tokens = own["token"].astype(np.int64)
        ends = [tokens[own["layer"] == i].max(initial=-1) + 1 for i in range(len(trace.header.layers))]
        if min(ends) >= n_tokens:
            first: trace_file.Records = own[own["token"] < n_tokens]
            return first
        longest = max(longest, min(ends))
    raise UsageError(
        f"{path} has {longest} tokens in its longest sequence, and {n_tokens} are needed; trace again with -c {n_tokens} and a "
        "text of as many tokens, or give a smaller -p or -n."
    )


def _table(own: trace_file.Records, name: str, wanted: Sequence[int], n_tokens: int, n_expert: int) -> tuple[Halves, ...]:
    """[n_tokens, E] of one field for each wanted layer; NaN where there is no record."""
    tables = {}
    for layer in set(wanted):
        table = tables[layer] = np.full((n_tokens, n_expert), np.nan, np.float16)
        records = own[own["layer"] == layer]
        table[records["token"]] = records[name]
    return tuple(tables[layer] for layer in wanted)
