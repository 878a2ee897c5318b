"""`cacheroute setup`: builds and installs the patched engine, then makes the demo model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheroute.cli.progress import time_left
from cacheroute.cli.terminal import say
from cacheroute.errors import UsageError
from cacheroute.install import engine_build, engine_source, engine_wheel
from cacheroute.install.tools import PlainProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class TerminalProgress:
    """A spinner with the current step, and a bar with the time left where the step can be counted."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("starting", total=None)

    def step(self, text: str) -> None:
        self._bar.reset(self._task, total=None, description=text, at=None)

    def fraction(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, at=time.monotonic())


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress on stderr: a moving line on a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), time_left())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield TerminalProgress(bar)


def setup(
    sdist: Annotated[
        Path | None,
        typer.Option(help="Use this llama-cpp-python sdist instead of downloading it.", exists=True, dir_okay=False),
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Build for several kinds of processors, for use on other machines.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="Only check whether the patches apply to VERSION of llama-cpp-python."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo/--no-demo", help="Also make the demo model.")] = True,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of compilers that run in parallel. [default: one per core, fewer in little memory]"),
    ] = None,
    wheel: Annotated[
        str | None,
        typer.Option(metavar="PATH|URL", help="Install this prebuilt engine (of scripts/build_wheels) instead of compiling one."),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(
            metavar="HEX",
            help="The sha256 that --wheel has to have. [default: as the file WHEEL.sha256 beside it says]",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another llama-cpp-python that is installed in this environment.")
    ] = False,
) -> None:
    """Build and install the engine, and make the demo model.

    It takes some minutes the first time, and comes from the cache after that. It is installed into the environment that runs
    this command, which may be one of pip, uv or pipx. A build that was interrupted goes on where it stopped.

    A wheel is compared with its sha256, and with this machine and this cacheroute, before anything is changed. One from a URL
    needs a checksum; of one on this disk without, the sha256 is shown.
    """
    if sha256 is not None and wheel is None:
        raise UsageError("--sha256 is the checksum of --wheel; give that, too.")
    if wheel is not None and (sdist or portable or check is not None or jobs):
        raise UsageError("--wheel compiles nothing; leave out --sdist, --portable, --check and --jobs.")
    if check is not None:
        with shown_progress() as progress:
            results = engine_source.check(check, sdist, progress)
        for result in results:
            print(result)
        raise typer.Exit(0 if all(result.applies for result in results) else 1)
    if wheel is not None:
        with shown_progress() as progress:
            state, compared = engine_wheel.ensure(wheel, sha256_hex=sha256, replace=replace, progress=progress)
        say(f"engine {state.version} is installed, from a wheel: {compared}")
    else:
        chosen = engine_build.BuildOptions(sdist, portable, jobs, replace)
        if what := engine_build.to_compile(chosen):
            say(what)
        with shown_progress() as progress:
            state = engine_build.ensure(chosen, progress)
        say(f"engine {state.version} is installed")
    if engine_build.uses_openmp() is False:
        say("it was built without OpenMP: threads that wait for each other then spin, which costs speed beside other work.")
    if demo:
        # Late: --no-demo needs neither numpy nor gguf.
        from cacheroute.model import demo_model

        with shown_progress() as progress:
            path = demo_model.ensure(progress=progress.step)
        say(f"demo model: {path}")
