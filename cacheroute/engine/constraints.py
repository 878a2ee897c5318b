"""What an answer may be: where it ends, a grammar that it follows, and biases of single tokens.

What can be wrong with them is found before a model is loaded; that a token exists, when it is known. Knows no options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheroute.engine import callbacks
from cacheroute.errors import UsageError
from cacheroute.install import patched_llama_cpp

if TYPE_CHECKING:
    from cacheroute.engine.completion import Prompt
    from cacheroute.engine.llama import Llama

_BIAS = re.compile(r"\s*(\d{1,9})\s*([+-])\s*(inf|\d+(?:\.\d*)?|\.\d+)\s*")
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}
# llama-cpp-python's rule of a character lets control characters into strings, where JSON has none; llama.cpp's own does not
_CHARACTER = re.compile(r'^char ::= \[\^"\\\\\]', re.MULTILINE)
_JSON_CHARACTER = r'char ::= [^"\\\\\\x7F\\x00-\\x1F]'
_ONLY_ESCAPES = re.compile(r"(?:\\[nrt])+")


@dataclass(frozen=True)
class Constraints:
    """`stop`: texts that end an answer and are no part of it. `grammar`: GBNF, "" for none. `bias`: token -> added logit."""

    stop: tuple[str, ...] = ()
    grammar: str = ""
    bias: Mapping[int, float] = field(default_factory=dict)

    def ending(self, prompt: Prompt) -> Prompt:
        """The prompt, whose answer ends at the stop strings, too."""
        return replace(prompt, stop=(*prompt.stop, *(s.encode() for s in self.stop)))

    def sampling(self, llm: Llama) -> dict[str, Any]:
        """Arguments for llm.generate(). Raises UsageError for a token or a grammar that is not of this model."""
        arguments: dict[str, Any] = {}
        if self.grammar:
            arguments["grammar"] = _grammar(self.grammar)
            callbacks.check_grammar(llm._model.vocab, arguments["grammar"])
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
        grammar = from_schema(json_schema)
    if grammar:
        callbacks.check_grammar(None, _grammar(grammar))
    if not all(stop):
        raise UsageError("A stop string has at least one letter.")
    return Constraints(tuple(map(_unescaped, stop)), grammar, _biases(bias))


def from_schema(text: str) -> str:
    """The GBNF of a JSON schema, by llama-cpp-python's converter. Raises UsageError for what is none, or none that it knows."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"The JSON schema is not valid JSON ({_line(e)}); a file is @FILE.") from None
    if not isinstance(schema, dict):
        raise UsageError('The JSON schema has to be an object, such as {"type": "object"}.')
    converter = import_module(f"{patched_llama_cpp.module().__name__}.llama_grammar")
    try:
        return _CHARACTER.sub(_JSON_CHARACTER, str(converter.json_schema_to_gbnf(text)))
    except Exception as e:  # it raises whatever it stumbles over
        reason = "it refers to another document" if "allow-fetch" in str(e) else _line(e)
        raise UsageError(f"The JSON schema cannot be used ({reason}).") from None


def _line(e: Exception) -> str:
    said = " ".join(str(e).split()).rstrip(".")
    known = {RecursionError: "it is nested too deeply", KeyError: "it refers to what it does not have"}
    if type(e) in known:
        return known[type(e)]
    if isinstance(e, AttributeError | TypeError):
        return "a part of it is no schema"
    return f"{said[:120]}" if type(e) in (AssertionError, ValueError, json.JSONDecodeError) and said else type(e).__name__


def _grammar(text: str) -> Any:
    return patched_llama_cpp.module().LlamaGrammar.from_string(text, verbose=False)


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
