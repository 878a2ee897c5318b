"""What a shell completes behind an option: names that are cheap to find. Nothing here reads a model or raises."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from typer.models import ParameterInfo

Words = Iterable[tuple[str, str]]
"""(word, what it is)."""


def _catalogue() -> Iterator[tuple[str, str]]:
    from cacheroute.model import catalogue

    for entry in catalogue.load_catalogue().values():
        yield entry.name, entry.title


def _models() -> Iterator[tuple[str, str]]:
    from cacheroute.model import catalogue

    yield from _catalogue()
    for model in itertools.chain(catalogue.hub_models(), catalogue.ollama_models(), catalogue.lmstudio_models()):
        yield model.name, "on this disk"


def _routings() -> Iterator[tuple[str, str]]:
    from cacheroute.routing import strategies, tuned

    yield "cache-prior:lambda=0.1", "a value to start with"
    for strategy in strategies.STRATEGIES.values():
        yield strategy.name + next((f":{p.name}=" for p in strategy.parameters if p.required), ""), strategy.meaning
    yield tuned.NAME, "what `tune` found for the model and the budget"


def _prompt_routings() -> Iterator[tuple[str, str]]:
    from cacheroute.routing import prompt_routing

    yield "original", "the model's own choice; lossless"
    yield f"{prompt_routing.KEEP}:{prompt_routing.PARAMETERS[0].name}=", prompt_routing.MEANING
    yield prompt_routing.TUNED, "what `tune --prompt` found for the model and the budget"


def _evictions() -> Words:
    from cacheroute.routing.eviction import ONLINE

    return [(name, "") for name in ONLINE]


def _budgets() -> Words:
    return [
        ("auto", "what fits the free memory"),
        ("25%", ""),
        ("50%", "of the experts of each layer"),
        ("75%", ""),
        ("all", "every expert"),
    ]


def _ios() -> Words:
    return [
        ("auto", "direct, unless slower"),
        ("direct", "past the page cache"),
        ("buffered", "through it"),
        ("load", "all experts with the model"),
    ]


def _plots() -> Words:
    from cacheroute.plot import figures

    return figures.KINDS.items()


WORDS: dict[str, Callable[[], Words]] = {
    "model": _models,
    "frontier files": _models,
    "tune files": _models,
    "reference": _models,
    "routing": _routings,
    "prompt_routing": _prompt_routings,
    "eviction": _evictions,
    "budget": _budgets,
    "io": _ios,
    "kind": _plots,
    "inspect file": _models,
    "pull name": _catalogue,
}
"""Argument of a command's function -> the words for it; with the command's name where the argument has a meaning of its own."""


def completer(words: Callable[[], Words]) -> Callable[[str], list[tuple[str, str]]]:
    """For typer's `autocompletion`: of a list with commas, its last part. A path is left to the shell, as is any failure."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, comma, last = incomplete.rpartition(",")
        if last.startswith((".", "/", "~")):
            return []
        try:
            return [(before + comma + word, meaning) for word, meaning in words() if word.startswith(last)]
        except Exception:  # whatever it is, a person at a prompt can type on
            return []

    return complete


_COMPLETERS = {name: completer(words) for name, words in WORDS.items()}


def attach(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives each parameter of a command's function that WORDS names its completion; returns the function.

    Done for all commands in one place, so that no command can be without.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    command.__annotations__ = hints  # or typer would read the texts again, and make options without this
    for argument, hint in hints.items():
        found = _COMPLETERS.get(f"{command.__name__} {argument}", _COMPLETERS.get(argument))
        for info in getattr(hint, "__metadata__", ()):
            if found and isinstance(info, ParameterInfo) and info.autocompletion is None:
                info.autocompletion = found
    return command
