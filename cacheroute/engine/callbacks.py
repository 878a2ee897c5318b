"""What a caller hands to the sampler, made safe: errors in it reach the caller and do not crash or pass unseen."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from cacheroute.engine import log
from cacheroute.errors import UsageError
from cacheroute.install import patched_llama_cpp

_MOST_REASON = 80  # letters


class Processors:
    """Logits processors whose first exception is kept: llama.cpp calls them through C, where it would be lost."""

    def __init__(self, processors: Iterable[Callable[[Any, Any], Any]]) -> None:
        self._processors = list(processors)
        self._error: BaseException | None = None

    def __call__(self, ids: Any, scores: Any) -> Any:
        try:
            for processor in self._processors if self._error is None else ():
                scores = processor(ids, scores)
        except BaseException as e:
            self._error = e
        return scores

    def check(self) -> None:
        """Raises what a processor has raised."""
        if self._error is not None:
            raise self._error


def sent(answer: Generator[int, Sequence[int] | None, None], tokens: Sequence[int] | None) -> int | None:
    """The next token of an answer, None at its end."""
    try:
        return answer.send(tokens)
    except StopIteration:
        return None


class GrammarError(UsageError):
    """A grammar that cannot be parsed, with the parser's `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The grammar cannot be parsed ({reason}); llama.cpp's grammars/README.md describes the form.")
        self.reason = reason


def check_grammar(vocabulary: Any, grammar: Any) -> None:
    """Raises GrammarError, a UsageError, for a grammar that llama.cpp cannot parse; it would add a null sampler and crash.

    `vocabulary` None: before there is a model; a grammar that names tokens (`<think>`) is then passed over.
    """
    text = grammar._grammar
    if "\0" in text:
        raise GrammarError("it has a NUL character")
    if not text.strip():
        raise UsageError("The grammar is empty; llama.cpp's grammars/README.md describes the form.")
    if vocabulary is None and "<" in text:
        return
    api = patched_llama_cpp.module().llama_cpp
    with log.errors(verbose=False) as lines, _stderr_kept() as said:
        sampler = api.llama_sampler_init_grammar(vocabulary, text.encode(), grammar._root.encode())
    if not sampler:
        reason = _reason(said[0] if said else "") or log.reason(lines)
        raise GrammarError(reason)
    api.llama_sampler_free(sampler)


def _reason(said: str) -> str:
    """Of what the parser prints, the reason: what follows it is the rest of the grammar, then all of it."""
    _, found, rest = said.partition("error parsing grammar: ")
    line = rest.split("\n", 1)[0].strip()
    line += " its end" if line.endswith(" at") else ""
    return (line[:_MOST_REASON] + "..." if len(line) > _MOST_REASON else line) if found else ""


@contextlib.contextmanager
def _stderr_kept() -> Iterator[list[str]]:
    """Within it what C code prints on stderr goes nowhere; afterwards it is in the list."""
    said: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode("utf-8", "replace"))
