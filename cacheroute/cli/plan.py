"""`cacheroute plan`: what a model would be like on this machine, before it is loaded; without one, which models would fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute import files
from cacheroute.cli import options, table
from cacheroute.cli.models import free_disk
from cacheroute.cli.terminal import columns, folded, say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import GIB, MIB, as_json, printable, size

if TYPE_CHECKING:
    from cacheroute.forecast.candidates import Candidate
    from cacheroute.forecast.drive import Drive
    from cacheroute.forecast.forecast import Forecast, RoutingForecast

_WIDTH = 80
_NO_ROOM = "no room"
_USABLE = 5.0  # tokens a second: about as fast as one reads
_BLOCK = 2 * MIB  # as large as the experts of most models, to measure a filesystem without one


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="PATH|NAME", help="A GGUF file or a model's name. [default: all known models and those here]"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="With -m: plan for these experts in memory: 50%, 30 (per layer), 2GiB (all layers) or all. [default: what fits]",
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option("--ram", metavar="SIZE", help="Plan for so much free memory, as 8GiB or 8GB. [default: what is free now]"),
    ] = None,
    flash_mbps: Annotated[
        float | None,
        typer.Option(
            "--flash-mbps",
            min=0.001,
            help="Plan for a drive of that many MB/s, a faster one, too. [default: measured where the model is]",
        ),
    ] = None,
    ctx_size: options.CtxOption = 4096,
    threads: options.ThreadsOption = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="text or json (sizes in bytes or MiB, as the names say).")
    ] = "text",
) -> None:
    """Forecast a model on this machine: memory, budget, tokens per second, time to the first token. Loads no model.

    The first time the engine's kernels and the drive are measured, for some seconds; that is kept. Without -m: all known models
    and those on this disk, best first.
    """
    if output not in ("text", "json"):
        raise UsageError(f"There is no output {output!r}; there are text and json.")
    free = None if ram is None else files.parse_size(ram)
    n_threads = options.threads(threads)
    reason = "as given" if threads else "one for each fast core"
    if model is None:
        if budget is not None:
            raise UsageError("A budget is planned for one model: name it with -m.")
        _all(free, flash_mbps, ctx_size, n_threads, reason, output)
    else:
        _one(model, budget, free, flash_mbps, ctx_size, n_threads, reason, output)


def _one(
    model: str,
    budget: str | None,
    free: int | None,
    flash_mbps: float | None,
    n_ctx: int,
    n_threads: int,
    reason: str,
    output: str,
) -> None:
    from cacheroute.forecast import candidates
    from cacheroute.model import catalogue
    from cacheroute.routing import budget as budgets

    entry = catalogue.load_catalogue().get(model.lower())
    if entry and not catalogue.entry_path(entry):
        candidate = candidates.of_entry(entry, n_ctx=n_ctx, free=free)
        how = f"`{catalogue.how_to_get(entry)}` gets it"
        disk = free_disk(catalogue.hub_cache())
        if entry.name != catalogue.DEMO and not _has_room(candidate, disk):
            how = (
                f"it needs {size(candidate.nbytes)} of disk and {size(disk or 0)} are free, so that `cacheroute pull` refuses it"
            )
        say(f"{model} is not here: this is by the catalogue's numbers; {how}")
    else:
        candidate = candidates.of_file(catalogue.resolve(model), name=model, n_ctx=n_ctx, free=free)
    if budget is not None and not budgets.is_auto(budget):
        own = budgets.parse(budget, candidate.plan).capacity
        candidate = replace(candidate, plan=replace(candidate.plan, given=own))
    found = _forecasts([candidate], flash_mbps, n_threads, reason, given=free is not None)[0]
    if output == "json":
        print(as_json(asdict(found)))
    if not found.fits:
        if output == "json":
            raise typer.Exit(2)
        other = "" if candidate.plan.most else _instead(free, n_ctx)
        raise UsageError(f"{found.refusal} {other}".strip())
    if output == "text":
        print("\n".join(_text(found, model)))


def _instead(free: int | None, n_ctx: int) -> str:
    """Which models would fit, largest first."""
    from cacheroute.forecast import candidates
    from cacheroute.model import catalogue

    disk = free_disk(catalogue.hub_cache())
    every = candidates.everything(n_ctx=n_ctx, free=free, say=lambda _: None)
    fitting = [c for c in every if c.plan.capacity is not None and _has_room(c, disk)]
    names = [c.name for c in sorted(fitting, key=lambda c: -c.nbytes) if c.name != "demo"]
    return f"There would fit: {', '.join(names[:4])}." if names else ""


def _all(free: int | None, flash_mbps: float | None, n_ctx: int, n_threads: int, reason: str, output: str) -> None:
    from cacheroute.forecast import candidates
    from cacheroute.model import catalogue

    disk = free_disk(catalogue.hub_cache())
    every = list(candidates.everything(n_ctx=n_ctx, free=free, say=lambda text: say(f"cacheroute: {text}")))
    found = list(zip(every, _forecasts(every, flash_mbps, n_threads, reason, given=free is not None), strict=True))
    found.sort(key=lambda pair: _rank(pair[0], pair[1], disk), reverse=True)
    if output == "json":
        own = [
            {"name": c.name, "nbytes": c.nbytes, "here": c.path is not None, "fits_disk": _has_room(c, disk)} for c, _ in found
        ]
        print(as_json([known | asdict(f) for known, (_, f) in zip(own, found, strict=True)]))
        return
    print("\n".join(_table(found, disk)))
    known = next((f.memory.free for _, f in found if f.memory.free is not None), None)
    memory = "free memory is not known" if known is None else f"{size(known)} of memory"
    context = f"a context of {n_ctx} tokens" if n_ctx else "the whole context"
    say(
        f"for {memory}, {context}, -t {n_threads}; best first: the largest that give {_USABLE:g} tok/s, then the fastest; "
        "LOSSY: with a routing that loses quality; 512 TOKENS: until the answer to such a prompt begins; "
        "`cacheroute plan -m NAME` has the rest"
    )
    if not all(_has_room(c, disk) for c in every):
        say(
            f"{_NO_ROOM}: not on this disk, and larger than the {size(disk or 0)} that are free; such models come after those "
            "that are here or have room"
        )
    if any(f.crowded for _, f in found):
        say(f"{table.MARK} behind tok/s: measured while other programs computed, and too slow")


def _forecasts(
    candidates: Sequence[Candidate], flash_mbps: float | None, n_threads: int, reason: str, *, given: bool
) -> list[Forecast]:
    """Measures what is not known of this machine: the kernels for all types that these models have, and their drives."""
    from cacheroute.forecast import forecast, speed
    from cacheroute.forecast.candidates import tuned_for
    from cacheroute.install.machine import cores

    types = speed.Types()
    for c in candidates:
        types |= c.work.types(whole=True)
    known = speed.known(n_threads)
    if known is None or known.lacks(types) != speed.Types():
        say("measuring how fast this machine computes, some seconds")
    own = speed.measure(types, n_threads)
    if own.crowded:
        say("other programs compute, too: what was measured is too slow, and is measured again next time")
    spare = _drive_without_model(candidates, flash_mbps)
    found = []
    for c in candidates:
        drive = _drive(c, flash_mbps) or spare
        capacity = c.plan.capacity
        tuned = tuned_for(c.path, capacity) if c.path and capacity is not None and capacity < c.plan.n_expert else None
        machine = forecast.Machine(own, drive, cores())
        found.append(
            forecast.of(c.work, c.plan, machine, n_ctx=c.n_ctx, path=c.path, tuned=tuned, cores_reason=reason, given_memory=given)
        )
    return found


def _drive(c: Candidate, flash_mbps: float | None) -> Drive | None:
    """Of the filesystem where the model is; None where it is not here or cannot be read."""
    from cacheroute.forecast import drive

    if c.layout is None:
        return None
    try:
        return drive.measure(c.layout, flash_mbps)
    except (CacherouteError, OSError) as e:
        say(f"cacheroute: the drive of {c.name} was not measured: {e}")
        return None


def _drive_without_model(candidates: Sequence[Candidate], flash_mbps: float | None) -> Drive | None:
    """For models that are not here: of the filesystem of the largest that is, or of the demo model, in large blocks."""
    from cacheroute.forecast import drive
    from cacheroute.forecast.drive import GIVEN, Drive
    from cacheroute.model import catalogue

    if all(c.path for c in candidates):
        return None
    if flash_mbps:
        return Drive("direct", flash_mbps * 1e6, GIVEN)
    here = [max((c for c in candidates if c.path), key=lambda c: c.nbytes, default=None)]
    paths = [c.path for c in here if c and c.path] or [p for p in [catalogue.demo_path()] if p.is_file()]
    for path in paths:
        if path.stat().st_size >= 32 * _BLOCK:
            try:
                return drive.measure(drive.blocks(path, _BLOCK))
            except (CacherouteError, OSError):
                continue
    return None


def _has_room(c: Candidate, disk: int | None) -> bool:
    """Whether a model is here, or would fit `disk` bytes; None: nobody knows how many are free."""
    return c.path is not None or disk is None or c.nbytes <= disk


def _rank(c: Candidate, f: Forecast, disk: int | None) -> tuple[int, float]:
    """Larger is better: what fits and is usable by its size, what fits by its speed, what the disk has no room for, what does not
    fit by how little it lacks."""
    if not f.fits:
        return 0, -float(c.plan.needed(c.plan.n_used))
    if not _has_room(c, disk):
        return 1, -float(c.nbytes)
    speed = f.routings[0].tokens_per_s
    if speed is not None and speed >= _USABLE:
        return 3, float(c.nbytes)
    return 2, speed or 0.0


def _table(found: Sequence[tuple[Candidate, Forecast]], disk: int | None) -> list[str]:
    head = ("MODEL", "GiB", "HERE", "BUDGET", "TOK/S", "LOSSY", "512 TOKENS")
    cells: list[tuple[str, ...]] = [head]
    for c, f in found:
        gib = f"{c.nbytes / GIB:.1f}"
        here = "yes" if c.path else "no" if _has_room(c, disk) else _NO_ROOM
        if not f.fits:
            cells.append((c.name, gib, here, f"needs {size(c.plan.least)}", "", "", ""))
            continue
        capacity = f.capacity or 0
        budget = "all" if capacity == f.n_expert else f"{capacity} of {f.n_expert}"
        lossy = max((r for r in f.routings if r.lossy), key=lambda r: r.tokens_per_s or 0, default=None)
        first = f.prompts[0].seconds if f.prompts else None
        speeds = [_speed(_range(r), f) if r else "" for r in (f.routings[0], lossy)]
        cells.append((c.name, gib, here, budget, *speeds, _seconds(first)))
    if _width() < _WIDTH:
        return table.fitted(cells, _width())
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    room = _WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)
    widths[0] = min(widths[0], room)
    lines = []
    for row in cells:
        name = printable(row[0])
        short = name if len(name) <= widths[0] else name[: widths[0] - 1] + "…"
        rest = [
            cell.rjust(w) if i in (0, 3, 4, 5) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row[1:], widths[1:], strict=True))
        ]
        lines.append("  ".join([short.ljust(widths[0]), *rest]).rstrip())
    return lines


def _text(f: Forecast, model: str) -> list[str]:
    """Lines of at most 80 columns, or of those of a narrower terminal."""
    from cacheroute.model import catalogue

    m, width = f.memory, _width()
    free = "free memory is not known" if m.free is None else f"{size(m.free)} free, {size(m.reserve)} of it left to others"
    parts = (
        f"{size(m.dense)} dense weights, {size(m.experts)} experts, {size(m.context)} context of {f.n_ctx} tokens, "
        f"{size(m.compute)} to compute, {size(m.prompt_reserve)} more experts while a prompt is computed"
    )
    lines = _wrapped("model", f.model)
    lines += _wrapped("file", f.path or "not here")
    lines += _wrapped("memory", f"{free}: {parts}")
    for d in f.decisions:
        lines += _wrapped(d.setting, f"{d.value}: {d.reason}")
    budgets = [["budget", "experts", "GiB", "in all", "MiB/token", "tok/s", ""]]
    for b in f.budgets:
        sizes = [f"{b.expert_bytes / GIB:.2f}", f"{b.needed / GIB:.2f}", f"{b.mib_per_token:.1f}"]
        speed = "?" if b.tokens_per_s is None else _amount(b.tokens_per_s)
        budgets.append([b.name, f"{b.experts} of {f.n_expert}", *sizes, _speed(speed, f), "" if b.fits else "does not fit"])
    routings = [["routing", "miss", "MiB/token", "tok/s", "misses"]]
    for r in f.routings:
        note = (
            ("none" if f.capacity == f.n_expert else r.miss_from)
            + (", lossy" if r.lossy else "")
            + (f": {r.loss:g}%" if r.loss is not None and r.kl is None else "")
        )
        routings.append([r.routing, f"{100 * r.miss_rate:.1f}%", f"{r.mib_per_token:.1f}", _speed(_range(r), f), note])
    prompts = [["prompt", "first token", "MiB read", "passes"]]
    for p in f.prompts:
        prompts.append([f"{p.tokens} tokens", _seconds(p.seconds), f"{p.read_mib:.0f}", str(p.passes)])
    for cells in (budgets, routings, prompts):
        lines += ["", *table.fitted(cells, width)] if len(cells) > 1 else []
        if cells is routings:
            lines += [f"{r.routing}: {r.price}, as `tune` measured" for r in f.routings if r.kl is not None]
    lines.append("")
    for i in f.inputs:
        lines += _wrapped(i.how, f"{i.name}: {i.detail}")
    entry = None if f.path else catalogue.load_catalogue().get(model.lower())
    lines += ["", *([catalogue.how_to_get(entry)] if entry else []), *_command(f, model)]
    return lines


def _command(f: Forecast, model: str) -> list[str]:
    """What to type, on lines that a shell joins."""
    settings = {"--budget": f.value("budget"), "--io": f.value("io"), "-t": f.value("threads")}
    words = [
        "cacheroute generate",
        f"-m {_quoted(model)}",
        *(f"{k} {v}" for k, v in settings.items()),
        f"-c {f.n_ctx}",
        '-p "..."',
    ]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > _width() - 2:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return lines


def _quoted(model: str) -> str:
    import shlex

    return shlex.quote(str(Path(model)) if not model.startswith(("hf:", "ollama:", "lmstudio:")) else model)


def _wrapped(name: str, text: str) -> list[str]:
    return folded(f"{name:9} {printable(text)}", _width(), 10)


def _width() -> int:
    return min(_WIDTH, columns(sys.stdout) or _WIDTH)


def _range(r: RoutingForecast) -> str:
    if r.low is None or r.high is None:
        return "?"
    low, high = _amount(r.low), _amount(r.high)
    return low if low == high else f"{low}-{high}"


def _speed(text: str, f: Forecast) -> str:
    """A cell of tok/s, marked where it is of a machine that others used."""
    return f"{text} {table.MARK}" if f.crowded and text != "?" else text


def _amount(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{_amount(value)} s"
