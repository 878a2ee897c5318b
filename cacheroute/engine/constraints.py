"""What an answer may be: where it ends, a grammar that it follows, and biases of single tokens.

What can be wrong with them is found before a model is loaded; that a token exists, when it is known. Knows no options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheroute.engine import callbacks
from cacheroute.engine.json_schema import SchemaError, to_grammar
from cacheroute.errors import UsageError
from cacheroute.install import patched_llama_cpp

if TYPE_CHECKING:
    from cacheroute.engine.completion import Prompt
    from cacheroute.engine.llama import Llama

_BIAS = re.compile(r"\s*(\d{1,9})\s*([+-])\s*(inf|\d+(?:\.\d*)?|\.\d+)\s*")
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}
_ONLY_ESCAPES = re.compile(r"(?:\\[nrt])+")


@dataclass(frozen=True)
class Constraints:
    """`stop`: texts that end an answer and are no part of it. `grammar`: GBNF, "" for none. `bias`: token -> added logit.
    `of_schema`: whether the grammar was made of a JSON schema, which is then what is wrong where it cannot be parsed."""

    stop: tuple[str, ...] = ()
    grammar: str = ""
    bias: Mapping[int, float] = field(default_factory=dict)
    of_schema: bool = False

    def ending(self, prompt: Prompt) -> Prompt:
        """The prompt, whose answer ends at the stop strings, too."""
        return replace(prompt, stop=(*prompt.stop, *(s.encode() for s in self.stop)))

    def sampling(self, llm: Llama) -> dict[str, Any]:
        """Arguments for llm.generate(). Raises UsageError for a token or a grammar that is not of this model."""
        arguments: dict[str, Any] = {}
        if self.grammar:
            arguments["grammar"] = _grammar(self.grammar)
            _check(llm._model.vocab, arguments["grammar"], of_schema=self.of_schema)
        beyond = [token for token in self.bias if token >= llm.n_vocab()]
        if beyond:
            raise UsageError(f"The model has no token {beyond[0]} to give a bias to; it has {llm.n_vocab()}, from 0 on.")
        if self.bias:
            arguments["logits_processor"] = [_adding(self.bias)]
        return arguments


def of(stop: Sequence[str] = (), grammar: str = "", json_schema: str = "", bias: Sequence[str] = ()) -> Constraints:
    """Of texts as they are typed. `bias`: TOKEN+BIAS or TOKEN-BIAS. Raises UsageError for what cannot be meant."""
    if grammar and json_schema:
        raise UsageError("An answer follows one grammar: give a grammar or a JSON schema.")
    if json_schema:
        grammar = to_grammar(json_schema)
    if grammar:
        _check(None, _grammar(grammar), of_schema=bool(json_schema))
    if not all(stop):
        raise UsageError("A stop string has at least one letter.")
    return Constraints(tuple(map(_unescaped, stop)), grammar, _biases(bias), of_schema=bool(json_schema))


def _grammar(text: str) -> Any:
    return patched_llama_cpp.module().LlamaGrammar.from_string(text, verbose=False)


def _check(vocabulary: Any, grammar: Any, *, of_schema: bool) -> None:
    """As callbacks.check_grammar(), in the words of what was asked for."""
    try:
        callbacks.check_grammar(vocabulary, grammar)
    except callbacks.GrammarError as e:
        if not of_schema:
            raise
        raise SchemaError(f"a pattern or a reference in it has no grammar: {e.reason}") from None


def _unescaped(stop: str) -> str:
    """A shell passes '\\n' on as two letters, and a line end is meant. Elsewhere a backslash is one: "\\nabla" is TeX."""
    return re.sub(r"\\.", lambda m: _ESCAPES[m[0]], stop) if _ONLY_ESCAPES.fullmatch(stop) else stop


def _biases(typed: Sequence[str]) -> dict[int, float]:
    found: dict[int, float] = {}
    for text in typed:
        match = _BIAS.fullmatch(text)
        if not match:
            raise UsageError(f"{text!r} is no bias of a token: write TOKEN+BIAS or TOKEN-BIAS, as in 15043-1 or 15043-inf.")
        token, value = int(match[1]), float(match[2] + match[3])
        if value > 1e30:
            raise UsageError(f"{text!r}: a bias above all others is +100.")
        found[token] = found.get(token, 0.0) + value
    return found


def _adding(bias: Mapping[int, float]) -> Callable[[Any, Any], Any]:
    """A logits processor."""
    tokens, values = np.fromiter(bias.keys(), np.intp), np.fromiter(bias.values(), np.float32)

    def add(ids: Any, scores: Any) -> Any:
        changed = np.array(scores)
        changed[tokens] += values
        return changed

    return add
