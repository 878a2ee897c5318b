"""The command line: one file per command; this file joins them and handles failures."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from cacheroute.cli import eval as evaluation
from cacheroute.cli.bench import bench
from cacheroute.cli.frontier import frontier
from cacheroute.cli.generate import generate
from cacheroute.cli.inspect import inspect
from cacheroute.cli.models import models
from cacheroute.cli.plot import plot
from cacheroute.cli.pull import pull
from cacheroute.cli.routing import routing
from cacheroute.cli.setup import setup
from cacheroute.cli.simulate import simulate
from cacheroute.cli.trace import trace
from cacheroute.cli.tune import tune
from cacheroute.errors import CacherouteError
from cacheroute.files import VERSION

app = typer.Typer(
    name="cacheroute",
    help="Run mixture-of-experts models that are larger than your RAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup removes text in brackets, such as [default: all]
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Prints a CacherouteError as one sentence and sets the exit code; a closed pipe ends the command without a message."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except CacherouteError as e:
            print(f"cacheroute: {e}", file=sys.stderr)
            raise typer.Exit(e.exit_code) from None
        except BrokenPipeError:
            # the interpreter flushes stdout once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


for _command in (generate, bench, tune, frontier, trace, simulate, plot, models, pull, inspect, routing, setup):
    app.command()(_reporting(_command))

_eval = typer.Typer(cls=evaluation.AnyTask, no_args_is_help=True, help=evaluation.HELP)
for _command in evaluation.COMMANDS:
    _eval.command()(_reporting(_command))
app.add_typer(_eval, name="eval")


def _version(asked: bool) -> None:
    if asked:
        print(f"cacheroute {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    pass


def main() -> None:
    """The `cacheroute` program."""
    app()
