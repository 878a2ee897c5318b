"""One routing scored on a text, as `eval perplexity` and `frontier` report it and `plot` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cacheroute.evals import paired
from cacheroute.evals.loading import Source

if TYPE_CHECKING:
    from cacheroute.evals.perplexity import ChunkScore


@dataclass(frozen=True)
class Arm:
    """One combination of settings, as typed, and the experts per layer that the budget comes to."""

    routing: str
    eviction: str
    budget: str
    budget_experts: int


@dataclass(frozen=True)
class PerplexityRow:
    """One routing on all chunks. `delta_nll` in nats per token against `original` on the same tokens, with its 95% interval;
    `ppl_increase` the same in % of the perplexity; null where there is nothing to compare, or one chunk only."""

    model: str
    text: str
    routing: str
    eviction: str
    budget: str
    budget_experts: int
    chunk: int
    stride: int
    carry: bool
    n_chunks: int
    n_tokens: int
    ppl: float
    ppl_se: float
    nll: float
    delta_nll: float
    delta_nll_low: float | None
    delta_nll_high: float | None
    ppl_increase: float
    ppl_increase_low: float | None
    ppl_increase_high: float | None
    miss_rate: float
    swap_rate: float
    drop_rate: float
    read_mib_per_token: float
    seconds: float


def differences(d: paired.Difference) -> dict[str, Any]:
    """The fields of a PerplexityRow that compare it."""
    return {
        "delta_nll": d.delta_nll,
        "delta_nll_low": d.low,
        "delta_nll_high": d.high,
        "ppl_increase": d.ppl_increase,
        "ppl_increase_low": d.ppl_increase_low,
        "ppl_increase_high": d.ppl_increase_high,
    }


def perplexity_row(
    model: str,
    source: Source,
    arm: Arm,
    base: Sequence[ChunkScore],
    scores: Sequence[ChunkScore],
    *,
    carry: bool = False,
    seed: int = 0,
) -> PerplexityRow:
    """`base`: `original` on the same chunks. Raises UsageError when nothing was scored."""
    from cacheroute.evals.perplexity import summary

    sums = ([float(x.nll.sum()) for x in part] for part in (base, scores))
    d = paired.compare(next(sums), next(sums), [len(x.nll) for x in scores], seed=seed)
    return PerplexityRow(
        model=model,
        text=source.name,
        chunk=source.chunk,
        stride=source.stride or source.chunk,
        carry=carry,
        n_chunks=len(scores),
        **differences(d),
        **asdict(arm),
        **asdict(summary(scores)),
    )
