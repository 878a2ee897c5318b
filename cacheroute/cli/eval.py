"""`cacheroute eval`: what a routing costs, in perplexity and in tasks."""

from __future__ import annotations

import itertools
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from cacheroute import routing as routings
from cacheroute.cli import options, progress, table
from cacheroute.errors import UsageError
from cacheroute.evals import paired

if TYPE_CHECKING:
    from cacheroute.evals.perplexity import ChunkScore

TextOption = Annotated[
    Path | None,
    typer.Option("-f", "--file", help="Text; .jsonl and .parquet by --column. [default: the held-out text of the package]"),
]
ColumnOption = Annotated[str, typer.Option("--column", help="Column of a dataset that holds the text.")]
ChunkOption = Annotated[int, typer.Option("--chunk", min=4, help="Tokens of a sequence; its second half is scored.")]
StrideOption = Annotated[
    int | None, typer.Option("--stride", min=1, help="Tokens from one chunk's beginning to the next one's. [default: --chunk]")
]
IoOption = Annotated[
    str | None, typer.Option("--io", help="How misses are read; none: only counted. [default: none if the model fits memory]")
]


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


def perplexity(
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: Annotated[str, typer.Option("--budget", help="Budgets, separated by commas.")] = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; `original` is always scored, too.")
    ] = "cache-prior:lambda=0.1",
    eviction: Annotated[str, typer.Option("--eviction", help="Evictions, separated by commas.")] = "lru",
    chunk: ChunkOption = 1024,
    stride: StrideOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Score about this many tokens. [default: all]")] = None,
    carry: Annotated[bool, typer.Option("--carry", help="Keep the cache and the running ranges from chunk to chunk.")] = False,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Seed of the bootstrap.")] = 0,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    output: Annotated[str, typer.Option("-o", "--output", help="md, json or jsonl.")] = "md",
) -> None:
    """Perplexity of a text, stepped: one token per decode, as a policy acts on decoded tokens only.

    Chunks are cut and scored as llama-perplexity does: the second half of each. All routings score the same tokens, and
    differences to `original` are paired, with a 95% interval from resampled chunks. There is no batched mode: a prompt is
    routed by `original`, so a batched figure is `original`'s.
    """
    table.check(output)
    from cacheroute import models
    from cacheroute.cli.models import available_memory
    from cacheroute.evals import loading
    from cacheroute.evals.perplexity import score

    path = models.resolve(model)
    source = loading.Source(file, column, chunk, stride, limit)
    with closing(loading.load(path, chunk, options.threads(threads))) as llm:
        io = io or loading.default_io(llm.layout, available_memory())
        arms = [(b, r, e) for b, e in itertools.product(_list(budget), _list(eviction)) for r in _routings(routing)]
        if not arms:
            raise UsageError("There is nothing to score; give at least one budget and eviction.")
        for b, r, e in arms:  # all settings are checked before the first run
            llm.configure(budget=b, routing=r, eviction=e, io=io)
        chunks = loading.chunks(llm, source)
        if len(chunks) < paired.FEW_BLOCKS:
            print(f"{len(chunks)} chunks are few for an interval; take it as rough", file=sys.stderr)
        rows: list[PerplexityRow] = []
        base: list[ChunkScore] = []
        with progress.bar("scoring", len(arms) * sum(c.n_scored for c in chunks)) as advance:
            for b, r, e in arms:
                llm.configure(budget=b, routing=r, eviction=e, io=io)
                scores = []
                for s in score(llm, chunks, carry=carry):
                    scores.append(s)
                    advance(len(s.nll), f"{r} {b}")
                base = scores if r == "original" else base
                labels = (llm.metadata.get("general.name", path.name), source.name, r, e, b)
                rows.append(_row(labels, llm.budget.capacity, chunk, stride or chunk, carry, seed, base, scores))
    table.write(rows, output, _markdown(rows))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _routings(text: str) -> list[str]:
    """`original` first: the others are compared with it."""
    return ["original", *(str(r) for r in routings.parse_list(text) if r.lossy)]


def _row(
    labels: tuple[str, str, str, str, str],
    capacity: int,
    chunk: int,
    stride: int,
    carry: bool,
    seed: int,
    base: list[ChunkScore],
    scores: list[ChunkScore],
) -> PerplexityRow:
    from cacheroute.evals.perplexity import summary

    s = summary(scores)
    d = paired.compare(
        [float(x.nll.sum()) for x in base], [float(x.nll.sum()) for x in scores], [len(x.nll) for x in scores], seed=seed
    )
    model, text, routing, eviction, budget = labels
    return PerplexityRow(
        model=model,
        text=text,
        routing=routing,
        eviction=eviction,
        budget=budget,
        budget_experts=capacity,
        chunk=chunk,
        stride=stride,
        carry=carry,
        n_chunks=len(scores),
        n_tokens=s.n_tokens,
        ppl=s.ppl,
        ppl_se=s.ppl_se,
        nll=s.nll,
        delta_nll=d.delta_nll,
        delta_nll_low=d.low,
        delta_nll_high=d.high,
        ppl_increase=d.ppl_increase,
        ppl_increase_low=d.ppl_increase_low,
        ppl_increase_high=d.ppl_increase_high,
        miss_rate=s.miss_rate,
        swap_rate=s.swap_rate,
        drop_rate=s.drop_rate,
        read_mib_per_token=s.read_mib_per_token,
        seconds=s.seconds,
    )


def _markdown(rows: list[PerplexityRow]) -> list[list[str]]:
    head = [
        "budget",
        "routing",
        "eviction",
        "ppl",
        "delta nll [95%]",
        "ppl change % [95%]",
        "miss",
        "swapped",
        "MiB/tok",
        "tokens",
    ]
    cells = [head]
    for r in rows:
        change = "baseline" if r.routing == "original" else _interval(r.ppl_increase, r.ppl_increase_low, r.ppl_increase_high, 2)
        cells.append(
            [
                f"{r.budget} ({r.budget_experts})",
                r.routing,
                r.eviction,
                f"{r.ppl:.3f} ± {r.ppl_se:.3f}",
                "" if r.routing == "original" else _interval(r.delta_nll, r.delta_nll_low, r.delta_nll_high, 4),
                change,
                f"{100 * r.miss_rate:.1f}%",
                f"{100 * r.swap_rate:.1f}%",
                f"{r.read_mib_per_token:.2f}",
                str(r.n_tokens),
            ]
        )
    return cells


def _interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    return f"{value:+.{digits}f} [{table.signed(low, digits)}, {table.signed(high, digits)}]"


class AnyTask(typer.core.TyperGroup):
    """`eval NAME` for every NAME that is no command is `eval task NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["task", *args]
        return super().resolve_command(ctx, args)


HELP = "What a routing costs: `eval perplexity`, or `eval TASK` for any task of lm-evaluation-harness."
COMMANDS = (perplexity,)
