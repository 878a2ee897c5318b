"""`cacheroute eval`: measures the quality of a routing; `eval perplexity` is here, the others in eval_*.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from cacheroute.cli import groups, habits, interval, options, progress, table
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.evals import paired
from cacheroute.evals import rows as rows_of
from cacheroute.evals.rows import Arm, PerplexityRow, perplexity_row
from cacheroute.routing import tuned
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.evals.runner import Cell
    from cacheroute.evals.scorer import Scorer

_TOGETHER = 8  # chunks that all arms score before the next ones

TextOption = Annotated[
    Path | None,
    typer.Option(
        "-f", "--file", help="The text; of .jsonl and .parquet, the --column. [default: the held-out text of the package]"
    ),
]
ColumnOption = Annotated[str, typer.Option("--column", help="Column of a .jsonl or .parquet file that holds the text.")]
ChunkOption = Annotated[int, typer.Option("--chunk", min=4, help="Tokens per chunk; the second half of each chunk is scored.")]
StrideOption = Annotated[
    int | None,
    typer.Option("--stride", min=1, help="Tokens from the start of one chunk to the start of the next. [default: --chunk]"),
]
IoOption = Annotated[
    str | None,
    typer.Option(
        "--io",
        help="How misses are read: auto, direct, buffered; none only counts them. [default: none if the model fits into memory]",
    ),
]


def perplexity(
    ctx: typer.Context,
    model: options.ModelOption = None,
    file: TextOption = None,
    column: ColumnOption = "text",
    budget: options.BudgetsOption = "50%",
    routing: Annotated[
        str, typer.Option("--routing", help="Routings, separated by commas; `original` is always scored as well.")
    ] = "cache-prior:lambda=0.1",
    eviction: options.EvictionsOption = DEFAULT,
    chunk: ChunkOption = 1024,
    stride: StrideOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score at least that many tokens, in whole chunks. [default: all]")
    ] = None,
    n_chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Score so many chunks. [default: all]")] = None,
    carry: Annotated[
        bool,
        typer.Option(
            "--carry", help="Keep the expert cache and the running ranges from chunk to chunk. These scores are not stored."
        ),
    ] = False,
    seed: Annotated[int, typer.Option("-s", "--seed", min=0, help="Seed of the resampling.")] = 0,
    workers: options.WorkersOption = 1,
    threads: options.ThreadsOption = None,
    io: IoOption = None,
    wide: options.WideOption = False,
    output: options.OutputOption = "text",
) -> None:
    """Measure the perplexity of a text, decoding one token at a time, because a routing acts on decoded tokens only.

    Chunks are cut and scored as llama-perplexity does: the second half of each. All routings score the same tokens;
    differences from `original` are paired, with a 95% interval from resampled chunks. There is no batched mode: prompts are
    routed by `original`, so a batched perplexity would be that of `original`.

    Mean KLD, 99.0% KLD and Same top p are llama-perplexity's, between `original` and each routing, token by token: the KL of
    their distributions in millinats (nats in -o json), and the share of tokens for which both have the same likeliest one. They
    need far fewer tokens for the same certainty than the perplexity does.

    Scores are stored in the cache folder and shared with `tune` and `frontier`, so nothing is computed twice.
    """
    table.check(output, wide=wide)
    if carry and workers > 1:
        options.refuse_unused(ctx, "workers", "cannot share out the chunks of --carry, which follow one another; leave it out.")
        workers = 1
    from cacheroute.evals import loading, scorer, text
    from cacheroute.model import catalogue, experts, gguf_file

    path = catalogue.resolve(model)
    layout = experts.layout(gguf_file.read(path))
    if n_chunks is not None:
        if limit is not None:
            raise UsageError("--chunks and --limit both say how much is scored; give one of them.")
        limit = n_chunks * text.n_scored(chunk, stride)
    source = loading.Source(file, column, chunk, stride, limit)
    evictions = options.names(eviction)
    arms = rows_of.arms(path, layout, options.names(budget), evictions, options.names(routing))
    with scorer.session(path, source, threads=threads, n_workers=workers, io=io, evictions=evictions) as session:
        say_few(len(session.chunks))
        cells = _carried(session, arms) if carry else _scored(session, arms)
    rows: list[PerplexityRow] = []
    base: list[float] = []
    for own, scores in zip(arms, cells, strict=True):
        base = [c.nll_sum for c in scores] if own.routing == "original" else base
        rows.append(perplexity_row(layout.model or path.name, source, own, base, scores, carry=carry, seed=seed))
    table.write(rows, output, perplexity_view(rows), wide=wide, name="perplexity")


def say_few(n_chunks: int) -> None:
    """One line on stderr where chunks are too few for an interval, or for more than a rough one."""
    more = "a smaller --chunk or a larger --limit gives more"
    if n_chunks < 2:
        say(f"one chunk alone gives no interval; {more}")
    elif n_chunks < paired.FEW_BLOCKS:
        say(f"few chunks ({n_chunks}): the intervals are rough; {more}")


def _scored(session: Scorer, arms: Sequence[Arm]) -> list[list[Cell]]:
    """All arms on some chunks, then on the next: what an interrupted run leaves behind is paired. `original` comes first among
    the arms, and several chunks of it before the others: these are compared with what it leaves behind."""
    n, kl = len(session.chunks), _any_lossy(arms)
    requests = [arm.requests(n, kl=kl) for arm in arms]
    groups = [own[i : i + _TOGETHER] for i in range(0, n, _TOGETHER) for own in requests]
    with progress.scoring(session, [request for group in groups for request in group]):
        cells = list(session.groups(groups))
    return [[cell for part in cells[i :: len(arms)] for cell in part] for i in range(len(arms))]


def _carried(session: Scorer, arms: Sequence[Arm]) -> list[list[Cell]]:
    with progress.bar("scoring", len(arms) * len(session.chunks)) as advance:
        session.after = lambda cell: advance(1, progress.doing(cell))
        return [session.carried(*arm.requests(1)[0][:3], kl=_any_lossy(arms)) for arm in arms]


def _any_lossy(arms: Sequence[Arm]) -> bool:
    return any(arm.routing != "original" for arm in arms)


def perplexity_view(rows: Sequence[PerplexityRow]) -> table.View:
    """What people see of rows of `eval perplexity` or `frontier`, each group after its `original`."""
    first = rows[0]
    one_budget, names, settings = rows_of.in_common(rows)
    head = [*([] if one_budget else ["budget"]), "routing", "ppl", "change % [95%]", "Mean KLD [95%]"]
    cells = [[*head, *(["miss %"] if one_budget else []), "MiB"]]  # at several budgets the misses would not fit a line
    for r, name in zip(rows, names, strict=True):
        change, kl = "baseline", ""
        if r.routing != "original":
            change, kl = interval.ppl_change(r, tight=True), interval.mean_kl(r, tight=True)
        missed = [*([f"{100 * r.miss_rate:.1f}"] if one_budget else []), f"{r.missed_mib_per_token:.2f}"]
        cells.append([*([] if one_budget else [r.budget]), name, f"{r.ppl:.2f}", change, kl, *missed])
    units = "KLD in millinats, MiB missed per token"
    above = f"{first.model}, {first.text}: {first.n_tokens} scored tokens{settings}; {units}"
    return table.View(cells, perplexity_cells(rows), above=[above], below=list(_conclusions(rows)))


def same_top(top1: float | None, error: float | None) -> str:
    """llama-perplexity's Same top p with its standard error, in %."""
    return f"{table.number(top1, 100, digits=2)} ± {table.number(error, 100, digits=2)}"


def _clear(r: PerplexityRow) -> str:
    """What there is to add where the interval of a change includes none, or there is no interval."""
    low, high = r.ppl_increase_low, r.ppl_increase_high
    if low is None or high is None:
        return ", which one chunk cannot tell from 0"
    return ", which is not clear of 0" if low <= 0 <= high else ""


def _conclusions(rows: Sequence[PerplexityRow]) -> Iterator[str]:
    """At each budget the routing that missed least, and its price."""
    for budget in dict.fromkeys(r.budget for r in rows):
        own = [r for r in rows if r.budget == budget]
        lossy = [r for r in own if r.routing != "original"]
        if not lossy:
            continue
        best = min(lossy, key=lambda r: r.missed_mib_per_token)
        base = min((r for r in own if r.routing == "original"), key=lambda r: r.eviction != best.eviction)
        if best.missed_mib_per_token >= base.missed_mib_per_token:
            yield f"Nothing missed less than original at {budget}"
            continue
        missed = f"misses {best.missed_mib_per_token:.2f} of {base.missed_mib_per_token:.2f} MiB a token"
        price = f"for {interval.ppl_change(best, tight=True)} % of perplexity{_clear(best)}"
        yield f"Fewest misses at {budget}: {tuned.short(best.routing)} (lossy), {missed}, {price}"
        kl, p99 = interval.mean_kl(best, tight=True), table.number(best.kl_p99, 1000, digits=0)
        yield f"  Mean KLD {kl} and 99.0% KLD {p99} millinats, Same top p {same_top(best.top1, best.top1_se)} %"


def perplexity_cells(rows: Sequence[PerplexityRow]) -> list[list[str]]:
    """The rows as cells of a table, the head first."""
    head = [
        "budget",
        "routing",
        "eviction",
        "ppl",
        "delta nll [95%]",
        "ppl change % [95%]",
        "Mean KLD millinats [95%]",
        "99.0% KLD",
        "Same top p %",
        "miss",
        "swapped",
        "missed MiB/token",
        "tokens",
    ]
    cells = [head]
    for r in rows:
        change = "baseline" if r.routing == "original" else interval.ppl_change(r)
        kl, top = interval.mean_kl(r), same_top(r.top1, r.top1_se)
        cells.append(
            [
                f"{r.budget} ({r.budget_experts})",
                tuned.short(r.routing),
                r.eviction,
                f"{r.ppl:.3f} ± {r.ppl_se:.3f}",
                "" if r.routing == "original" else interval.figure(r.delta_nll, r.delta_nll_low, r.delta_nll_high, digits=4),
                change,
                *(("", "", "") if r.routing == "original" else (kl, table.number(r.kl_p99, 1000, digits=1), top)),
                f"{100 * r.miss_rate:.1f}%",
                f"{100 * r.swap_rate:.1f}%",
                f"{r.missed_mib_per_token:.2f}",
                str(r.n_tokens),
            ]
        )
    return cells


class AnyTask(typer.core.TyperGroup):
    """Makes `eval NAME` mean `eval task NAME` if NAME is no command and not the beginning of one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            whole = "" if ctx.resilient_parsing else habits.beginning(args[0], list(self.commands))
            args = [whole, *args[1:]] if whole else ["task", *args]
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups.below(formatter)
        super().format_options(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, groups.summary(command)) for name, command in self.commands.items()])


HELP = "Measure the quality of a routing.\n\n`eval perplexity`, or `eval TASK` for any task of lm-evaluation-harness."
