"""`generate --prompts`: many prompts with one loaded model, an answer or an error a line of JSON, in the order of the prompts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from cacheroute import interrupts
from cacheroute.cli import options, progress, prompt
from cacheroute.cli.terminal import say
from cacheroute.errors import CacherouteError, UsageError, did_you_mean
from cacheroute.files import TwiceError, as_json, check_regular, decoded, expanded, is_text, one_of_each, unreadable

if TYPE_CHECKING:
    from cacheroute.engine.completion import Prompt
    from cacheroute.engine.constraints import Constraints
    from cacheroute.engine.llama import Llama
    from cacheroute.engine.shared_prefix import SharedPrefix

_SECONDS_BEFORE_WORD = 2.0
_KEYS = ("prompt", "id", "system", "n_predict")


@dataclass(frozen=True)
class Asked:
    """One prompt. `index`: from 1, as --skip counts; `id`: of a line that has one; `error`: why it cannot be asked, or ""."""

    index: int
    prompt: str = ""
    id: Any = None
    system: str | None = None
    n_predict: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """An open file of prompts; `total`: how many there are, where that can be known before they are read."""

    name: str
    number: int
    total: int | None

    @staticmethod
    def of(name: str) -> Source:
        """A file, or "-" for standard input. Raises UsageError for what cannot be read."""
        if name == "-":
            if sys.stdin is None:
                raise UsageError("Standard input is closed; name a file of prompts.")
            try:
                return Source("standard input", sys.stdin.fileno(), None)
            except (OSError, ValueError):
                raise UsageError("Standard input cannot be read; name a file of prompts.") from None
        path = expanded(name)
        try:
            mode = path.stat().st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
                check_regular(path, "a file of prompts")
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe is opened before there is a writer
            total = None
            if stat.S_ISREG(mode):
                with path.open("rb") as file:
                    total = sum(1 for line in file if line.strip())
        except (OSError, ValueError) as e:
            raise unreadable(path, e) from None
        if total == 0:
            raise UsageError(f"{name} has no prompt: write one a line.")
        return Source(name, number, total)

    def prompts(self) -> Iterator[Asked]:
        """As they come: each line that is not blank. Raises UsageError when the file cannot be read to its end."""
        index = 0
        for line, raw in enumerate(self._lines(), 1):
            if raw.strip():
                index += 1
                yield _parsed(index, raw, f"Line {line} of {self.name}")

    def _lines(self) -> Iterator[bytes]:
        """Without their ends; after a while without the first, a word on what is waited for."""
        held = b""
        self._wait()
        while True:
            try:
                chunk = os.read(self.number, 1 << 20)
            except OSError as e:
                raise UsageError(f"{self.name} cannot be read ({e.strerror}).") from None
            *whole, held = (held + chunk).split(b"\n")
            yield from whole
            if not chunk:
                break
            if len(held) > prompt.MAX_BYTES:
                raise UsageError(f"A line of {self.name} has more than {prompt.MAX_BYTES // 2**20} MiB: give less text.")
        if held:
            yield held

    def _wait(self) -> None:
        terminal = os.isatty(self.number)
        if terminal or not select.select([self.number], [], [], _SECONDS_BEFORE_WORD)[0]:
            say(f"waiting for prompts on {self.name}, one a line" + ("; Ctrl-D ends them" if terminal else ""))
            select.select([self.number], [], [])
        os.set_blocking(self.number, True)


def source(name: str | None, skip: int, output: str, *, others: bool, stdin: bool) -> Source | None:
    """What --prompts names; None without it. `others`: whether options of a single prompt are given, `stdin`: whether it may be
    read. Raises UsageError for options that do not go together, and what cannot be read, typer.Exit where nothing is left."""
    if name is None and skip:
        raise UsageError("--skip leaves out prompts of --prompts, and there are none.")
    if name is None:
        return None
    if output != "jsonl":
        raise UsageError(f"With --prompts each answer is a line of JSON, as -o jsonl has them; leave -o {output} out.")
    if others:
        raise UsageError("With --prompts each line is a prompt of its own; leave out -p, -f and --prompt-cache.")
    if name == "-" and not stdin:
        raise UsageError("--prompts - reads standard input; leave out --no-stdin, or name a file.")
    found = Source.of(name)
    if found.total is not None and skip >= found.total:
        say(f"--skip {skip} leaves out every prompt of {name}, which has {found.total}")
        raise typer.Exit
    return found


def _parsed(index: int, raw: bytes, where: str) -> Asked:
    """A line as it is, or a JSON object. What is wrong with it is its `error`."""
    try:
        text = decoded(raw, where).rstrip("\r")
    except UsageError as e:
        return Asked(index, error=str(e))
    if not text.lstrip().startswith("{"):
        return Asked(index, text)
    try:
        found = json.loads(text, object_pairs_hook=one_of_each)
    except TwiceError as e:
        return Asked(index, error=f"{where} has the key {e.key!r} twice; leave out one.")
    except (ValueError, RecursionError) as e:
        if not text.lstrip().startswith('{"'):
            return Asked(index, text)  # a text that begins with a brace
        return Asked(index, error=f"{where} is not valid JSON ({e}).")
    own = found.get("id")
    try:
        json.dumps(own, allow_nan=False)
    except ValueError:
        return Asked(index, error=f"{where} has an id that is no number of JSON.")
    if error := _wrong(found, where):
        return Asked(index, id=own, error=error)
    return Asked(index, found["prompt"], own, found.get("system"), found.get("n_predict"))


def _wrong(found: dict[str, Any], where: str) -> str:
    """What is wrong with the object of a line, or ""."""
    for key in found:
        if key not in _KEYS:
            known = f"there are {', '.join(_KEYS)}."
            return f"{where} has the key {key!r}; {did_you_mean(key, _KEYS, known)}"
    text, system, n = found.get("prompt"), found.get("system"), found.get("n_predict")
    if not isinstance(text, str) or not text.strip():
        return f'{where} has no prompt: write {{"prompt": "..."}}.'
    if system is not None and not isinstance(system, str):
        return f"{where}: system is a text."
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not -2 <= n < 2**31):
        return f"{where}: n_predict is a number of tokens, or -1."
    if not is_text(text + (system or "")):
        return f"{where} has half a surrogate pair, which is no letter."
    return ""


@dataclass(frozen=True)
class Settings:
    """What holds for every prompt that does not say otherwise. `seed`: of the first one; each has one more than that before."""

    chat: bool
    system: str
    max_tokens: int | None
    seed: int
    sampling: dict[str, Any]
    constraints: Constraints


@dataclass
class _Run:
    """The prompts of one model so far."""

    llm: Llama
    settings: Settings
    prefix: SharedPrefix
    last: int  # the index of the last line that is written
    done: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = field(default=0, init=False)  # tokens after the first of each answer, which took the seconds

    @interrupts.shield
    def write(self, index: int, line: dict[str, Any]) -> None:
        """Ctrl-C waits until the line is whole, and counted."""
        sys.stdout.write(as_json(line) + "\n")
        sys.stdout.flush()
        self.done, self.last = self.done + 1, index

    def line(self, asked: Asked) -> dict[str, Any]:
        """The answer, or why there is none."""
        known = {"index": asked.index} | ({} if asked.id is None else {"id": asked.id})
        try:
            if asked.error:
                raise UsageError(asked.error)
            return known | self._answer(asked)
        except CacherouteError as e:
            self.failed += 1
            return known | {"error": str(e)}

    def _answer(self, asked: Asked) -> dict[str, Any]:
        from cacheroute.engine.completion import Completion

        own, llm = self.settings, self.llm
        limit = own.max_tokens if asked.n_predict is None else asked.n_predict if asked.n_predict >= 0 else None
        whole = _prompt(llm, own, asked.prompt, asked.system)
        before = llm.stats()
        run = Completion(llm, whole, limit, (own.seed + asked.index - 1) % (options.MAX_SEED + 1), own.sampling)
        if len(whole.tokens) < llm.n_ctx():
            self.prefix.go_to(whole.tokens)
        for _ in run.pieces():
            pass
        after = llm.stats()
        decode, prefill = after.decode - before.decode, after.prefill - before.prefill
        seconds = (run.last or 0) - (run.first or 0)
        self.tokens += run.n_tokens
        if run.n_tokens > 1:
            self.seconds, self.steps = self.seconds + seconds, self.steps + run.n_tokens - 1
        return {
            "text": run.text,
            "finish_reason": run.finish_reason,
            "seed": run.seed,
            "n_prompt": len(whole.tokens),
            "n_gen": run.n_tokens,
            "ts": (run.n_tokens - 1) / seconds if seconds > 0 else None,
            "time_to_first_token_s": run.first - run.started if run.first else None,
            "miss_rate": decode.miss_rate,
            "swap_rate": decode.swap_rate,
            "drop_rate": decode.drop_rate,
            "read_mib_per_token": decode.read_mib_per_token,
            "prompt_read_mib": prefill.read_mib,
            "prompt_swap_rate": prefill.swap_rate,
        }

    def summary(self) -> str:
        """One line on all of them."""
        s = self.llm.stats()
        parts = [f"{self.done} prompt{'' if self.done == 1 else 's'}" + (f", {self.failed} failed" if self.failed else "")]
        rate = f", {self.steps / self.seconds:.1f} tok/s" if self.seconds > 0 else ""
        parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'}{rate}")
        if s.io == "load":
            parts.append("all experts in memory")
        else:
            if s.decode.hits + s.decode.misses:
                parts.append(f"{100 * s.decode.miss_rate:.0f}% of experts read from disk")
            parts.append(f"read {s.prefill.read_mib:.1f} MiB for prompts, {s.decode.read_mib:.1f} for answers")
        if self.llm.routing and self.llm.routing.lossy and not options.changes_nothing(self.llm):
            parts.append(f"swapped {s.decode.swapped}/{s.decode.examined}")
        if s.decode.dropped:
            parts.append(f"dropped {s.decode.dropped}/{s.decode.examined}")
        if self.llm.prompt_routing.lossy:
            parts.append(f"prompts swapped {s.prefill.swapped}/{s.prefill.examined}")
        return " | ".join(parts)


def _prompt(llm: Llama, own: Settings, text: str, system: str | None) -> Prompt:
    from cacheroute.engine import completion

    if not own.chat:
        if system:
            raise UsageError("A system's message is part of the chat template, which is not used here.")
        return own.constraints.ending(completion.raw_prompt(llm, text))
    said = own.system if system is None else system
    messages = [*([{"role": "system", "content": said}] if said else []), {"role": "user", "content": text}]
    return own.constraints.ending(completion.chat_prompt(llm, messages))


def answer(llm: Llama, source: Source, settings: Settings, skip: int, *, quiet: bool = False) -> None:
    """Answers the prompts after the first `skip`, and says at the end what it took, unless it is `quiet`.

    Raises CacherouteError when one of them has failed; the others are answered. Ctrl-C leaves whole lines, and says how many.
    """
    from cacheroute.engine.shared_prefix import SharedPrefix

    run = _Run(llm, settings, SharedPrefix(llm, *(_prompt(llm, settings, text, None).tokens for text in ("a", "b"))), skip)
    with _shown(llm, source, skip, quiet=quiet) as advance:
        try:
            for asked in source.prompts():
                if asked.index <= skip:
                    continue
                run.write(asked.index, run.line(asked))
                interrupts.check()
                advance(1, f"prompt {asked.index}")
        except KeyboardInterrupt:
            with interrupts.last_words():
                if run.done and not quiet:
                    say(run.summary())
                say(f"cacheroute: Stopped; --skip {run.last} goes on after what is answered.")
            raise KeyboardInterrupt("") from None
    if not quiet:
        say(run.summary())
    if run.failed:
        raise CacherouteError(f"{run.failed} of {run.done} prompts failed; their lines say why.")


@contextlib.contextmanager
def _shown(llm: Llama, source: Source, skip: int, *, quiet: bool) -> Iterator[Callable[[int, str], None]]:
    """A bar for prompts whose number is known. On a terminal it leaves no room for answers and for the line of a long prompt."""
    if source.total is None or sys.stdout.isatty() or (quiet and not sys.stderr.isatty()):
        yield lambda units, text: None
        return
    llm.prompt_progress = None
    with progress.bar("prompts", max(source.total - skip, 1)) as advance:
        yield advance
