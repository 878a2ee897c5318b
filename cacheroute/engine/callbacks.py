"""What a caller hands to the sampler, made safe: errors in it reach the caller and do not crash or pass unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp


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


def check_grammar(model: Any, grammar: Any) -> None:
    """Raises CacherouteError for a grammar that llama.cpp cannot parse; it would add a null sampler and crash."""
    api = patched_llama_cpp.module().llama_cpp
    sampler = api.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
    if not sampler:
        raise CacherouteError("The grammar cannot be parsed; llama.cpp's grammars/README.md describes the form.")
    api.llama_sampler_free(sampler)
