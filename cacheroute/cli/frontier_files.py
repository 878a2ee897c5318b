"""`cacheroute frontier --files`: several quantisations of one model at equal bytes of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import interval, options, progress, table
from cacheroute.cli.defaults import is_typed
from cacheroute.cli.eval import same_top, say_few
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import MIB
from cacheroute.routing import tuned

if TYPE_CHECKING:
    from cacheroute.evals.across import FilesRow
    from cacheroute.evals.loading import Source
    from cacheroute.evals.rows import Arm
    from cacheroute.evals.scorer import Scorer
    from cacheroute.forecast.rates import Machine
    from cacheroute.model.copies import Copy

FilesOption = Annotated[
    str | None,
    typer.Option(
        "--files",
        metavar="PATH,PATH",
        help="Several quantisations of one model instead of -m, compared at equal bytes of memory. Budgets without bytes are "
        "those of the first.",
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="PATH", help="With --files: the file whose `original` all is compared with. [default: the largest]"
    ),
]


@dataclass(frozen=True)
class Chosen:
    """The files to compare, in the order given, and the one that they are compared with, which may be another."""

    copies: tuple[Copy, ...]
    reference: Copy


@dataclass(frozen=True)
class Settings:
    """What a session of each file is opened with."""

    threads: int | None
    workers: int
    scheduler: str | None
    io: str | None
    flash_mbps: float | None
    evictions: Sequence[str]

    @contextmanager
    def session(self, copy: Copy, reference: Copy, source: Source, *, timed: bool = False) -> Iterator[Scorer]:
        """A scorer of a file, compared with the reference."""
        from cacheroute.evals import scorer

        with scorer.session(
            copy.path,
            source,
            threads=self.threads,
            n_workers=self.workers,
            scheduler=self.scheduler,
            io=self.io,
            flash_mbps=self.flash_mbps,
            timed=timed,
            evictions=self.evictions,
            reference_model=None if copy is reference else reference.path,
        ) as session:
            yield session


def check_options(ctx: typer.Context, files: str | None, reference: str | None) -> None:
    """Raises UsageError for --files beside -m, and for --reference without --files."""
    if files is not None and is_typed(ctx, "model"):
        raise UsageError("--files takes the place of -m; leave -m out.")
    if reference is not None and files is None:
        raise UsageError("--reference is for --files, which names the files that are compared with it.")


def choose(files: str, reference: str | None) -> Chosen:
    """Raises UsageError for files that are not of one model, or too few."""
    from cacheroute.model import catalogue, copies

    paths = [catalogue.resolve(name) for name in options.names(files)]
    named = catalogue.resolve(reference) if reference else None
    known = [path.resolve() for path in paths]
    every = paths if named is None or named.resolve() in known else [*paths, named]
    if not paths or len(every) < 2:
        raise UsageError("--files names two or more files, separated by commas; or one, with another as --reference.")
    found = copies.read(every)
    titles = dict.fromkeys(c.layout.model for c in found if c.layout.model)
    if len(titles) > 1:
        say(f"these files name different models: {', '.join(titles)}; the KL will tell whether they are one")
    if named is None:
        best = max(found, key=lambda c: c.header.nbytes)
    else:
        best = next(c for c in found if c.path.resolve() == named.resolve())
    return Chosen(found[: len(paths)], best)


def machine(chosen: Chosen, threads: int | None, flash_mbps: float | None) -> Machine | None:
    """What speeds are forecast by; None where it cannot be measured, which is said."""
    from cacheroute.forecast import rates

    try:
        found = rates.measure([(c.header, c.layout) for c in chosen.copies], options.threads(threads), flash_mbps)
    except (CacherouteError, OSError) as e:
        say(f"no speed is forecast: {e}")
        return None
    if found.crowded:
        say("other programs compute, too: the speeds that are forecast are too slow")
    return found


def run(
    results: Path,
    chosen: Chosen,
    source: Source,
    routing: Sequence[str],
    eviction: Sequence[str],
    memory: Sequence[str],
    settings: Settings,
    output: str,
    *,
    timed_with: str,
    wide: bool,
) -> None:
    """Scores what is missing in the file of results, and prints all."""
    from cacheroute.evals import across
    from cacheroute.evals.results import ResultsFile

    wanted, left = across.arms(chosen.copies, routing, eviction, memory)
    for sentence in left:
        say(sentence)
    if not wanted:
        raise UsageError("There is nothing to score; give at least one budget that a file fits, and an eviction.")
    kept = ResultsFile(results, across.header(chosen.reference.path, source))
    rows = across.finished(kept.lines, timed_with)
    missing = [a for a in wanted if a.place not in rows]
    if kept.lines:
        say(f"{results} has {len(wanted) - len(missing)} of {len(wanted)} rows already")
    own = machine(chosen, settings.threads, settings.flash_mbps)
    by_print = {c.fingerprint: c for c in chosen.copies}

    def predicted(row: FilesRow) -> FilesRow:
        """The names and the pace of this run, and what the forecast makes of it."""
        copy = by_print[row.fingerprint]
        ts = speed(copy, own, row.missed_mib_per_token, whole=row.whole) if own else None
        return replace(row, file=copy.name, reference=chosen.reference.name, predicted_ts=ts, flash_mbps=settings.flash_mbps)

    def keep(row: FilesRow) -> None:
        rows[row.place] = predicted(row)
        kept.append(asdict(rows[row.place]))

    @contextmanager
    def begin(session: Scorer, copy: Copy, arms: Sequence[Arm]) -> Iterator[None]:
        n = len(session.chunks)
        say(f"{copy.name}: {len(arms)} setting{'s' * (len(arms) > 1)}, {n} chunk{'s' * (n > 1)} each")
        with progress.scoring(session, [r for arm in arms for r in arm.requests(len(session.chunks))]):
            yield

    if missing:
        across.run(
            chosen.copies,
            chosen.reference,
            lambda copy: settings.session(copy, chosen.reference, source, timed=bool(timed_with)),
            source,
            missing,
            keep,
            begin,
            timed_with,
        )
    found = [replace(predicted(rows[a.place]), routing=a.arm.routing) for a in wanted]  # by the names of this run
    say_few(found[0].n_chunks)
    table.write(found, output, view(found), wide=wide, name="frontier_files")


def speed(copy: Copy, own: Machine, missed_mib: float, *, whole: bool) -> float:
    """Tokens per second by the forecast."""
    from cacheroute.forecast import rates

    return rates.tokens_per_s(copy.header, copy.layout, own, missed_mib * MIB, whole=whole)


def view(rows: Sequence[FilesRow]) -> table.View:
    """What people see, the least memory first."""
    from cacheroute.evals import across

    first = rows[0]
    several = len({r.eviction for r in rows if not r.whole}) > 1
    brief = [["memory", "file and routing", "Mean KLD [95%]", "MiB", "tok/s"]]
    head = ["memory", "MiB", "file", "routing", "eviction", "experts", "Mean KLD millinats [95%]", "99.0% KLD", "Same top p %"]
    whole = [[*head, "ppl", "ppl change % [95%]", "miss", "missed MiB/token", "tok/s forecast", "tok/s measured", "front"]]
    below = []
    for budget, group in across.by_memory(rows):
        best = across.front(group)
        for r in sorted(group, key=lambda r: r.kl or 0.0):
            name = r.label if r.whole or not several else f"{r.label}, {r.eviction}"
            kl = interval.mean_kl(r, tight=True)
            brief.append([r.budget, name + " *" * (r in best), kl, f"{r.missed_mib_per_token:.2f}", _ts(r.predicted_ts)])
            change = interval.ppl_change(r)
            whole.append(
                [
                    *(r.budget, f"{r.memory_mib:.1f}", r.file, "all in memory" if r.whole else tuned.short(r.routing)),
                    *("" if r.whole else r.eviction, str(r.budget_experts), interval.mean_kl(r)),
                    *(table.number(r.kl_p99, 1000, digits=1), same_top(r.top1, r.top1_se), f"{r.ppl:.3f}", change),
                    *(f"{100 * r.miss_rate:.1f}%", f"{r.missed_mib_per_token:.2f}", _ts(r.predicted_ts), _ts(r.ts)),
                    "*" * (r in best),
                ]
            )
        below += list(_plain(budget, group))
    pace = f" behind {first.flash_mbps:g} MB/s" if first.flash_mbps else ""
    above = [
        f"{first.model}, {first.text}: {first.n_tokens} scored tokens against original of {first.reference}",
        f"KLD in millinats, MiB missed a token, tok/s forecast{pace}",
        "*: nothing as fast has less KL in the same memory",
    ]
    return table.View(brief, whole, above=above, below=below)


def _plain(budget: str, group: Sequence[FilesRow]) -> Iterator[str]:
    """Whether the smaller file as it is does better than a larger one that is routed, in the same memory."""
    plain = [r for r in group if r.whole]
    if not plain:
        lossless = [r for r in group if r.routing == "original"]
        plain = [min(lossless, key=lambda r: (r.experts_mib, r.missed_mib_per_token))] if lossless else []
    for p in plain:
        faster = [r for r in group if r is not p and _no_slower(r, p) and (r.kl or 0.0) < (p.kl or 0.0)]
        said = f"{budget}: {p.label} has a KL of {interval.mean_kl(p, tight=True)} at {_speed(p)}"
        if not faster:
            yield f"{said}; nothing as fast has less"
            continue
        best = min(faster, key=lambda r: r.kl or 0.0)
        sure = best.kl_high is not None and p.kl_low is not None and best.kl_high < p.kl_low
        yield f"{said}; {'better' if sure else 'perhaps better'}:"
        yield f"  {best.label}, {interval.mean_kl(best, tight=True)} at {_speed(best)}"


def _no_slower(r: FilesRow, p: FilesRow) -> bool:
    if r.predicted_ts is not None and p.predicted_ts is not None:
        return r.predicted_ts >= p.predicted_ts
    return r.missed_mib_per_token <= p.missed_mib_per_token


def _speed(r: FilesRow) -> str:
    return f"{r.missed_mib_per_token:.2f} MiB/token" if r.predicted_ts is None else f"{_ts(r.predicted_ts)} tok/s"


def _ts(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"
