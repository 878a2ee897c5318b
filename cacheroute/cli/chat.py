"""`cacheroute chat`: a conversation on a terminal or in a pipe."""

from __future__ import annotations

import itertools
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheroute import interrupts
from cacheroute.cli import options, progress, summary
from cacheroute.cli import sampling as sampling_options
from cacheroute.cli.settings import load as load_model
from cacheroute.cli.settings import say_start
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import decoded, expanded, is_text
from cacheroute.routing import budget as budgets
from cacheroute.routing.eviction import DEFAULT

if TYPE_CHECKING:
    from cacheroute.engine.conversation import Conversation
    from cacheroute.engine.llama import Llama

_SECONDS_TO_STOP = 10.0  # an answer; then Ctrl-C ends the program
_HELP = """/routing NAME    choose experts by another routing, as --routing; without a name: which one it is
/budget SIZE     keep other experts in memory, as --budget
/stats           what has been read and swapped since the model was loaded or set
/system TEXT     the system's message; without a text: none
/retry           answer the last question again, otherwise
/save FILE       write the conversation to a file
/load FILE       take up a conversation that /save has written
/clear           forget the conversation
/quit            leave (Ctrl-D); Ctrl-C stops an answer
A line that begins with // is a message that begins with /. Alt-Enter begins a new line; what is pasted may have many."""


def chat(
    model: options.ModelOption = None,
    system: Annotated[str, typer.Option("-sys", "--system", "--system-prompt", help="The system's message.")] = "",
    load: Annotated[Path | None, typer.Option("--load", help="Take up a conversation that /save has written.")] = None,
    n_predict: Annotated[
        int, typer.Option("-n", "--n-predict", min=-2, help="Tokens of an answer, at least 1; -1: until it stops.")
    ] = -1,
    ctx_size: options.CtxOption = 4096,
    threads: options.ThreadsOption = None,
    seed: options.SeedOption = -1,
    temp: options.TempOption = 0.8,
    top_k: options.TopKOption = 40,
    top_p: options.TopPOption = 0.95,
    min_p: options.MinPOption = 0.05,
    repeat_penalty: options.RepeatOption = 1.0,
    stop: sampling_options.StopOption = None,
    grammar: sampling_options.GrammarOption = None,
    grammar_file: sampling_options.GrammarFileOption = None,
    json_schema: sampling_options.JsonSchemaOption = None,
    json_schema_file: sampling_options.JsonSchemaFileOption = None,
    logit_bias: sampling_options.LogitBiasOption = None,
    budget: options.BudgetOption = budgets.AUTO,
    routing: Annotated[str, typer.Option("--routing", help="How experts are chosen; see `cacheroute routing`.")] = "original",
    prompt_routing: options.PromptRoutingOption = "original",
    eviction: options.EvictionOption = DEFAULT,
    io: options.IoOption = "auto",
    flash_mbps: options.FlashOption = None,
    prefetch: options.PrefetchOption = 0,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More statistics under each answer.")] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Talk with a model. What has been said stays evaluated, and the experts stay in memory, between the turns.

    Answers go to stdout, everything else to stderr. Ctrl-C stops an answer and keeps what has come of it; /help lists commands.
    From a pipe each line is a message or a command, and the answers are all that is on stdout.
    """
    if n_predict == 0:
        raise UsageError("An answer of no tokens is none: give -n 1 or more, or -1.")
    options.check_verbosity(verbose=verbose, quiet=quiet)
    constraints = sampling_options.constraints(stop, grammar, grammar_file, json_schema, json_schema_file, logit_bias)
    from cacheroute.engine.asked import Asked
    from cacheroute.engine.conversation import Conversation, check_template
    from cacheroute.model import catalogue, context_memory

    path = catalogue.resolve(model)
    settings = Asked(budget, routing, eviction, io, prefetch, prompt_routing)
    context_memory.check(path, ctx_size)
    llm = load_model(path, settings, n_ctx=ctx_size, n_threads=threads, flash_mbps=flash_mbps)
    with closing(llm), progress.PromptLine(verbose=False) as llm.prompt_progress:
        check_template(llm)
        conversation = Conversation(llm, system, constraints=constraints)
        if load:
            conversation.load(load)
            conversation.system = system or conversation.system
        sampling: dict[str, Any] = dict(temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty)
        sampling |= constraints.sampling(llm)
        seeds = iter(lambda: secrets.randbelow(2**31), None) if seed < 0 else itertools.count(seed)
        limit = n_predict if n_predict >= 0 else None
        talk = Talk(conversation, sampling, seeds, limit, verbose=verbose, quiet=quiet)
        interrupts.command_goes_on(_SECONDS_TO_STOP)
        say_start(llm, quiet=quiet)
        for line in _lines():
            if not talk.take(line):
                break


@dataclass
class Talk:
    """What a line does: a message is answered, a command acts. `seeds`: one for each answer."""

    conversation: Conversation
    sampling: dict[str, Any]
    seeds: Iterator[int]
    max_tokens: int | None
    verbose: bool = False
    quiet: bool = False
    _gone: bool = field(default=False, init=False)

    def take(self, line: str) -> bool:
        """False: the conversation is over. What is wrong with a line is said, and the conversation goes on."""
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                name, *argument = text[1:].split(None, 1) or [""]
                return self._command(name, argument[0] if argument else "")
            if text and not is_text(text):
                raise UsageError("That line is not UTF-8 text.")
            if text:
                self._answer(text[1:] if text.startswith("//") else text)
        except CacherouteError as e:
            say(f"cacheroute: {e}")
        except KeyboardInterrupt:
            interrupts.went_on()
            say("cacheroute: Stopped.")
        return True

    def _answer(self, question: str) -> bool:
        """Whether something has come of an answer."""
        conversation, llm = self.conversation, self.conversation.llm
        before = llm.stats()
        run = conversation.ask(question, self.max_tokens, next(self.seeds), self.sampling)
        if conversation.gone and not self._gone:
            say("The context is full: the oldest turns leave it from here on; a larger one is -c.")
        self._gone = bool(conversation.gone)
        try:
            for piece in run.pieces():
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            interrupts.went_on()
        finally:
            conversation.answered(run.text)
            if run.text and not run.text.endswith("\n"):
                print(flush=True)
        if run.full:
            say(f"The context of {llm.n_ctx()} tokens is full; give a larger one with -c.")
        after = llm.stats()
        if not self.quiet:
            say(summary.turn(run, after.decode - before.decode, after.prefill - before.prefill, verbose=self.verbose))
        elif not run.finish_reason:
            say(interrupts.STOPPED)
        return bool(run.text.strip())

    def _command(self, name: str, argument: str) -> bool:
        commands: dict[str, Callable[[str], None]] = {
            "routing": self._routing,
            "budget": self._budget,
            "stats": lambda _: _say_lines(_totals(self.conversation.llm)),
            "system": self._system,
            "retry": lambda _: self._retry(),
            "save": lambda a: self.conversation.save(_file(a)),
            "load": lambda a: self.conversation.load(_file(a)),
            "clear": lambda _: self.conversation.clear(),
            "help": lambda _: _say_lines(_HELP),
        }
        if name in ("quit", "exit", "bye"):
            return False
        if name not in commands:
            raise UsageError(f"There is no command /{name}; /help lists them.")
        commands[name](argument)
        return True

    def _routing(self, argument: str) -> None:
        if not argument:
            say(f"routing {self.conversation.llm.routing}")
            return
        self._set(routing=argument)

    def _budget(self, argument: str) -> None:
        llm = self.conversation.llm
        if not argument:
            say(f"budget {llm.budget.capacity} of {llm.layout.n_expert} experts of each layer")
            return
        self._set(budget=argument)

    def _set(self, **changed: Any) -> None:
        """All that was said is evaluated again by the next turn: the caches start empty."""
        llm = self.conversation.llm
        llm.configure(**changed)
        say_start(llm, quiet=self.quiet)

    def _system(self, argument: str) -> None:
        self.conversation.system = argument

    def _retry(self) -> None:
        conversation, before = self.conversation, list(self.conversation.messages)
        question = conversation.take_back()
        if question is None:
            raise UsageError("Nothing has been asked yet.")
        answered = False
        try:
            answered = self._answer(question)
        finally:
            if not answered:
                conversation.messages = before


def _say_lines(text: str) -> None:
    for line in text.splitlines():
        say(line)


def _file(argument: str) -> Path:
    try:
        words = shlex.split(argument)
    except ValueError:
        words = []
    if len(words) != 1:
        raise UsageError("Give the name of one file; one with spaces in quotes.")
    return expanded(words[0])


def _lines() -> Iterator[str]:
    """What is typed, or piped in."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        yield from _typed()
        return
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield decoded(raw, f"Line {number} of standard input")
        except UsageError as e:
            say(f"cacheroute: {e}")


def _typed() -> Iterator[str]:
    """With line editing; the prompt is on stderr, as stdout has the answers."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr), key_bindings=keys)
    say("/help lists the commands.")
    while True:
        try:
            yield session.prompt("> ", handle_sigint=False)  # interrupts.py has taken it
        except KeyboardInterrupt:
            interrupts.went_on()
            say("Ctrl-D or /quit leaves.")
        except EOFError:
            return


def _totals(llm: Llama) -> str:
    s = llm.stats()
    lines = [f"routing {s.routing}, eviction {s.eviction}, io {s.io}, {s.capacity} experts of each layer"]
    for name, c in (("prompts", s.prefill), ("answers", s.decode)):
        lines.append(
            f"{name}: {c.tokens} tokens, read {c.read_mib:.1f} MiB, {100 * c.miss_rate:.1f}% of experts from disk, "
            f"{c.swapped} of {c.examined} swapped"
        )
    kept = (
        f"{s.resident_bytes / 2**20:.1f} of {s.budget_bytes / 2**20:.1f} MiB"
        if s.resident_bytes
        else "none, until the next answer"
    )
    lines.append(f"resident {kept}")
    return "\n".join(lines)
