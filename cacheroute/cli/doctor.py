"""`cacheroute doctor`: what this machine and this installation can do, and what to do about the rest."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli import defaults, options, table
from cacheroute.cli.terminal import folded
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import as_json, printable, size
from cacheroute.install import android, checkup
from cacheroute.install.check import Check

if TYPE_CHECKING:
    from cacheroute.engine.storage import Reading
    from cacheroute.model.experts import ExpertLayout

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    ctx: typer.Context,
    model: options.ModelOption = None,
    output: Annotated[str, typer.Option("-o", "--output", help="text or json.")] = "text",
    report: Annotated[
        bool, typer.Option("--report", help="What to send with a question: no paths, no settings, 45 columns, and a short bench.")
    ] = False,
) -> None:
    """Look at this machine, the engine and the storage of a model: ok, warn or fail, and what to do. For bug reports, too.

    Reads some experts of the model; loads nothing else. Exit code 1 when something fails.
    """
    if output not in ("text", "json"):
        raise UsageError(f"There is no output {output!r}; there are text and json.")
    if report and output != "text":
        raise UsageError("--report is a text for people; -o json has the same findings without it.")
    found = []
    for check in itertools.chain(checkup.checks(), _settings(ctx), _storage(model)):
        found.append(check)
        if report:
            _print_shared(check, model)
        elif output == "text":
            _print(check)
    if output == "json":
        print(as_json([asdict(check) for check in found], indent=2))
    if report:
        _print_bench(model)
    if any(check.state == "fail" for check in found):
        raise typer.Exit(1)


def _settings(ctx: typer.Context) -> Iterator[Check]:
    """Defaults of options that are set outside the command line, here and for other commands."""
    known = defaults.options_of_all(ctx.find_root().command)
    try:
        file = defaults.read(known)
    except CacherouteError as e:
        yield Check("settings", "fail", str(e).rstrip("."), "correct it there")
        return
    where = f"{file.path}" if file.path else f"no file {defaults.default_path() or ''}".strip()
    yield Check("settings", "ok", "; ".join([where, *defaults.in_effect(file, known)]))
    strange = defaults.strange_variables(known)
    if strange:
        yield Check("variables", "warn", f"{', '.join(strange)} set nothing", "see the end of `cacheroute --help` for their form")


def _storage(model: str | None) -> Iterator[Check]:
    """Of the model's experts, where its file lies."""
    from cacheroute.model import catalogue, experts, gguf_file

    try:
        path = catalogue.resolve(model)
        layout = experts.layout(gguf_file.read(path))
    except CacherouteError as e:
        if model is not None:
            raise
        yield Check("model", "warn", str(e).rstrip("."), "run `cacheroute setup`, or name a model with -m")
        return
    yield _memory(path, layout)
    place = android.storage(path)
    if place:
        yield place
    try:
        from cacheroute.engine import storage, stores

        readings = storage.measure(layout)
    except (CacherouteError, OSError) as e:
        yield Check("storage", "fail", str(e).rstrip("."), "")
        return
    if not stores.drops_cached():
        yield Check("eviction", "warn", stores.NOT_DROPPED, "--io direct reads past it; speeds of buffered reads are the cache's")
    for reading in readings:
        yield _reading(reading, layout)
    known = stores.remembered(layout)
    if known:
        yield _remembered(known, {r.io: r.ms for r in readings if not r.refused})


def _remembered(known: str, ms: dict[str, float]) -> Check:
    """What --io auto reads by, and whether it would be decided so now. `ms`: of an expert, by io."""
    from cacheroute.engine import stores

    found = f"{known}, decided when this filesystem was first read"
    now = stores.faster(ms) if {stores.DIRECT, stores.BUFFERED} <= set(ms) else known
    if now == known:
        return Check("--io auto", "ok", found)
    return Check("--io auto", "warn", f"{found}; {now} is faster now", f"remove {stores.choices_file()} to decide anew")


def _memory(path: Path, layout: ExpertLayout) -> Check:
    from cacheroute.install.machine import available_memory

    least, most = layout.dense_bytes + layout.n_used * layout.resident_bytes, layout.dense_bytes + layout.all_expert_bytes
    found = f"{path.name}: {size(layout.dense_bytes)} always in memory, {size(layout.all_expert_bytes)} of experts"
    free = available_memory()
    if free is not None and free < least:
        return Check("model", "fail", found, f"{size(least)} are the least and {size(free)} are free: free some")
    fits = free is None or free > most
    return Check(
        "model", "ok", found + (", and all of it fits" if fits else ""), "" if fits else "give --budget what fits beside it"
    )


def _reading(reading: Reading, layout: ExpertLayout) -> Check:
    name = f"{reading.io} reads"
    if reading.refused:
        return Check(name, "warn", reading.refused, "--io auto reads buffered instead" if reading.io == "direct" else "")
    found = f"{reading.mb_per_s:.0f} MB/s, an expert of {size(layout.layers[0].expert_bytes)} in {reading.ms:.2f} ms"
    if reading.left_bytes:
        kept = f"{found}; {size(reading.left_bytes)} stay in the page cache"
        return Check(name, "warn", kept, "another process may have the file open: misses look faster than they are")
    return Check(name, "ok", found)


def _print_shared(check: Check, model: str | None) -> None:
    from cacheroute.cli import report

    said = report.shared(check, Path(model) if model else None)
    if said:
        print("\n".join(report.lines(said.state, printable(_line(said)))), flush=True)


def _print_bench(model: str | None) -> None:
    from cacheroute.cli import report

    try:
        for line in report.bench(model):
            print(printable(line), flush=True)
    except (CacherouteError, OSError) as e:
        no_path = report.shared(Check("bench", "fail", f"not run: {e}".rstrip(".")), Path(model) if model else None)
        assert no_path
        print("\n".join(report.lines("fail", printable(_line(no_path)))))


def _line(check: Check) -> str:
    return f"{check.name}: {check.found}" + (f" -> {check.advice}" if check.advice else "")


def _print(check: Check) -> None:
    state = f"{check.state:4}"
    if sys.stdout.isatty():
        state = typer.style(state, fg=_COLOURS[check.state])
    first, *rest = folded(printable(_line(check)), table.columns() - 6, 2)
    print("\n".join([f"{state}  {first}", *(f"      {more}" for more in rest)]), flush=True)
