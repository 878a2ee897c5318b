"""The command line: one file per command; this file joins them and handles failures."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Any

import typer
import typer.core

from cacheroute import files, interrupts
from cacheroute.cli import completion, defaults, eval_long, eval_prompt, eval_task, groups, habits, options, progress
from cacheroute.cli import eval as evaluation
from cacheroute.cli.bench import bench
from cacheroute.cli.chat import chat
from cacheroute.cli.doctor import doctor
from cacheroute.cli.frontier import frontier
from cacheroute.cli.generate import generate
from cacheroute.cli.inspect import inspect
from cacheroute.cli.models import models
from cacheroute.cli.plan import plan
from cacheroute.cli.plot import plot
from cacheroute.cli.pull import pull
from cacheroute.cli.routing import routing
from cacheroute.cli.serve import serve
from cacheroute.cli.setup import setup
from cacheroute.cli.simulate import simulate
from cacheroute.cli.terminal import columns, say
from cacheroute.cli.trace import trace
from cacheroute.cli.tune import tune
from cacheroute.errors import CacherouteError

# typer's own errors, whether it brings click along or imports it
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
_BAD_COMMAND_LINE: Any = typer.BadParameter.__mro__[2]

_DEFAULTS = """Defaults of options: CACHEROUTE_GENERATE_TEMP=0 in the environment, or for all commands CACHEROUTE_BUDGET=2GiB; or
[generate] temp = 0 and [common] budget = "2GiB" in a TOML file. `cacheroute doctor` shows which file, and what is set."""


_NO_THREAD = "can't start new thread"  # as Python puts it, in an error of no kind of its own
_EXTRA_WORDS = re.compile(r"unexpected extra arguments?(?:\(s\))? \((.*)\)")  # as click and typer put it


class _Commands(groups.Grouped):
    """The commands, and those of other tools that do the same."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if ctx.resilient_parsing else habits.command(args, list(self.commands)))


def _help_width() -> int | None:
    """Of help on a terminal that is narrower than click believes one to be; None: as click finds it."""
    width = columns(sys.stdout)
    return width if width and width < 52 else None


app = typer.Typer(
    name="cacheroute",
    cls=_Commands,
    epilog=_DEFAULTS,
    help="Run mixture-of-experts models that are larger than your RAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its markup removes text in brackets, such as [default: all]
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "terminal_width": _help_width()},
)


class _Command(typer.core.TyperCommand):
    """A command that fails with one sentence and an exit code, ends silently at a closed pipe, and with a line at Ctrl-C.

    What is not typed of its options may be set in the environment or in the user's file (defaults.py).
    """

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            found = defaults.of(parent, info_name, self)
        except CacherouteError as e:
            if not (extra.get("resilient_parsing") or info_name == "doctor" or {"-h", "--help"} & {*args}):
                raise _USAGE_ERROR(str(e)) from None
            found = {}  # a shell completes, help is shown, and doctor tells it
        try:
            values = {name: setting.value for name, setting in found.items()}
            ctx = super().make_context(info_name, args, parent, **{"default_map": values, **extra})
        except typer.BadParameter as e:
            said = defaults.refused(e, found)
            if said:
                raise _USAGE_ERROR(said, e.ctx) from None
            raise
        ctx.meta[defaults.META] = found
        return ctx

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = args if ctx.resilient_parsing else habits.arguments(ctx.command_path, args, habits.options_of(self))
        rest = list(super().parse_args(ctx, words))
        for parameter in () if ctx.resilient_parsing else self.params:
            value = ctx.params.get(parameter.name)
            for each in value if isinstance(value, list | tuple) else [value]:
                options.check_path(max(parameter.opts, key=len), each, args)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups.below(formatter)
        super().format_options(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        try:
            interrupts.command_begins()
            progress.show_loads()
            for parameter in self.params:
                options.check_number(max(parameter.opts, key=len), ctx.params.get(parameter.name))
            if ctx.info_name != "doctor":  # which tells them itself
                for sentence in defaults.strange(ctx.find_root().command):
                    say(sentence)
            options.say_threads(ctx.params)
            for sentence in defaults.lossy(ctx):
                say(sentence)
            super().invoke(ctx)
            sys.stdout.flush()
        except CacherouteError as e:
            code = _said(defaults.blamed(str(e), ctx), e.exit_code)
        except BrokenPipeError:
            _discard_stdout()
            code = 0
        except KeyboardInterrupt as e:
            code = _said(e.args[0] if e.args else interrupts.STOPPED, 130)
        except MemoryError:
            code = _said("There is not enough memory for that; give smaller numbers, or free some.", 1)
        except OSError as e:
            code = _said(_reason(e), 1)
        except RuntimeError as e:
            if str(e) != _NO_THREAD:
                raise
            code = _said("No thread can be started: allow this process more (`ulimit -u`, or a container's limit of pids).", 1)
        else:
            return
        raise typer.Exit(code)


for _command in (
    *(generate, chat, serve, bench, tune, frontier, trace, simulate, plot),
    *(models, plan, pull, inspect, routing, doctor, setup),
):
    app.command(cls=_Command)(completion.attach(_command))

_eval = typer.Typer(cls=evaluation.AnyTask, no_args_is_help=True, help=evaluation.HELP)
for _measure in (evaluation.perplexity, eval_task.task, eval_prompt.prompt, eval_long.long):
    _eval.command(cls=_Command)(completion.attach(_measure))
app.add_typer(_eval, name="eval")


def _version(asked: bool) -> None:
    if asked:
        from cacheroute.install import versions

        print("\n".join(versions.lines()))
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the versions of all parts."),
) -> None:
    pass


def main() -> None:
    """Runs the command line of this process, and leaves it."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    if sys.stdout is None:
        return _said("Standard output is closed; send it to a file, a pipe or /dev/null.", 1)
    for argument in arguments:
        if not files.is_text(argument):
            return _said(f"The argument {argument} is not UTF-8 text; convert it, or rename the file.", 2)
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="cacheroute", standalone_mode=False)
        sys.stdout.flush()
    except _BAD_COMMAND_LINE as e:
        return _said(_usage(e, arguments), 2)
    except CacherouteError as e:  # before a command runs
        return _said(str(e), e.exit_code)
    except OSError as e:  # what help could not print
        return _said(_reason(e), 1)
    return code if isinstance(code, int) else 0


def _usage(e: Any, words: list[str]) -> str:
    """What is wrong with the command line, in one sentence. Help that was asked for by giving no arguments is shown as it is."""
    if type(e).__name__ == "NoArgsIsHelpError":
        e.show()
        return ""
    path = e.ctx.command_path if getattr(e, "ctx", None) else "cacheroute"
    missing = getattr(e, "option_name", "") if type(e).__name__ == "NoSuchOption" else habits.not_a_number(_parameter(e), words)
    if missing and getattr(e, "ctx", None):
        return str(habits.no_option(missing, habits.options_of(e.ctx.command), path))
    message = " ".join(e.format_message().split()).rstrip(".")
    extra = _EXTRA_WORDS.search(message)
    if extra and getattr(e, "ctx", None):
        message = habits.no_word(extra[1], habits.options_of(e.ctx.command))
    return f"{message}{'' if message.endswith('?') else '.'} See `{path} --help`."


def _parameter(e: Any) -> Any:
    return getattr(e, "param", None) if isinstance(e, typer.BadParameter) else None


def _reason(e: OSError) -> str:
    """Most errors of files are reported where they come up, with the file's name."""
    where = "Standard output cannot be written" if e.filename is None else f"{e.filename} cannot be used"
    return f"{where} ({e.strerror or e})."


def _said(sentence: str, code: int) -> int:
    """Prints a sentence on stderr; what stdout could not take is given up, so that the interpreter does not try it again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _discard_stdout()
    if sentence:
        with contextlib.suppress(OSError), interrupts.last_words():
            say(f"cacheroute: {sentence}")
    return code


def _discard_stdout() -> None:
    """The interpreter flushes stdout once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
