"""From what a client asks to what a model computes: tokens, stop strings, sampling and a grammar, checked before they wait."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cacheroute.engine.completion import Prompt, TemplateError, chat_prompt, has_chat_template, raw_prompt
from cacheroute.engine.constraints import Constraints
from cacheroute.engine.json_schema import SchemaError, to_grammar
from cacheroute.errors import UsageError
from cacheroute.serve.failures import ApiError
from cacheroute.serve.requests import Asked, ChatRequest, TextRequest

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_SAMPLING = ("top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
_SEEDS = 2**32 - 1  # the last one stands for a random one
# of a schema, whose grammar grows with them: llama-cpp-python writes a repetition out
_MAX_NESTED, _OPEN = 200, 10
_PARSER = getattr(re, "_parser", None) or import_module("sre_parse")  # its name before Python 3.11
_MAX_SCHEMA_BYTES, _MAX_REPETITIONS, _MAX_PATTERN, _MAX_GRAMMAR_BYTES = 64 * 1024, 1000, 1000, 1024 * 1024
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")


@dataclass(frozen=True)
class Task:
    """An answer to compute. `n_logprobs`: as ChatRequest.n_logprobs."""

    prompt: Prompt
    max_tokens: int | None
    seed: int
    sampling: dict[str, Any]
    constraints: Constraints
    n_logprobs: int | None


def of_chat(llm: Llama, asked: ChatRequest) -> Task:
    """Raises ApiError for what the model's template cannot write, what does not fit the context, or a schema that cannot be."""
    if not has_chat_template(llm):
        raise ApiError(400, "The model's file has no chat template; /v1/completions continues text with it.", param="messages")
    try:
        prompt = chat_prompt(llm, [message.plain() for message in asked.messages])
    except TemplateError as e:
        raise ApiError(400, f"The model's chat template cannot write these messages ({e.reason}).", param="messages") from None
    schema = asked.response_format.schema_of_answer
    grammar = "" if schema is None else _grammar(schema)
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    return _task(llm, asked, prompt, most, asked.n_logprobs, grammar)


def of_text(llm: Llama, asked: TextRequest) -> Task:
    """As of_chat(). A list of numbers is a prompt of tokens."""
    given = asked.prompt
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        given = given[0]
    if isinstance(given, str):
        prompt = raw_prompt(llm, given)
    else:
        tokens = [token for token in given if isinstance(token, int)]
        if len(tokens) < len(given):
            raise ApiError(400, "A request has one prompt; send one for each.", param="prompt")
        if not all(0 <= token < llm.n_vocab() for token in tokens):
            raise ApiError(400, f"The model has tokens 0 to {llm.n_vocab() - 1}.", param="prompt")
        prompt = Prompt(tokens)
    if not prompt.tokens:
        if llm.token_bos() < 0:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        prompt = Prompt([llm.token_bos()])
    return _task(llm, asked, prompt, asked.max_tokens, asked.n_logprobs)


def _task(llm: Llama, asked: Asked, prompt: Prompt, max_tokens: int | None, n_logprobs: int | None, grammar: str = "") -> Task:
    if len(prompt.tokens) >= llm.n_ctx():
        raise ApiError(
            400,
            f"The prompt of {len(prompt.tokens)} tokens does not fit the context of {llm.n_ctx()}.",
            code="context_length_exceeded",
            param="messages" if isinstance(asked, ChatRequest) else "prompt",
        )
    sampling = {name: getattr(asked, name) for name in _SAMPLING} | {"temp": asked.temperature}
    own = Constraints(asked.stops, grammar, _bias(llm, asked.logit_bias), of_schema=bool(grammar))
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed % _SEEDS
    return Task(own.ending(prompt), max_tokens, seed, sampling, own, n_logprobs)


def _bias(llm: Llama, given: dict[str, float]) -> dict[int, float]:
    if not all(
        token.isdecimal() and len(token) < 10 and token == str(int(token)) and int(token) < llm.n_vocab() for token in given
    ):
        raise ApiError(400, f"logit_bias names tokens by their numbers, 0 to {llm.n_vocab() - 1}.", param="logit_bias")
    return {int(token): value for token, value in given.items()}


def _grammar(schema: dict[str, Any]) -> str:
    """What llama.cpp keeps an answer to; it is parsed when its turn comes. Raises ApiError for a schema that has no grammar."""
    try:
        _check(schema)
        text = json.dumps(schema)
        if len(text) > _MAX_SCHEMA_BYTES:
            raise ValueError(f"it has more than {_MAX_SCHEMA_BYTES} bytes")
        grammar = to_grammar(text)
        if len(grammar) > _MAX_GRAMMAR_BYTES:
            raise ValueError("its grammar is too large")
    except UsageError as e:
        raise ApiError(400, str(e), param="response_format") from None
    except (ValueError, RecursionError) as e:
        raise ApiError(400, str(SchemaError(str(e))), param="response_format") from None
    return grammar


def _check(schema: Any) -> None:
    """Raises ValueError for what would make a grammar of any size."""
    for node in _nodes(schema):
        for name in ("minItems", "maxItems", "minLength", "maxLength"):
            n = node.get(name, 0)
            if isinstance(n, dict):
                continue  # a property of that name
            if not isinstance(n, int) or not 0 <= n <= _MAX_REPETITIONS:
                raise ValueError(f"{name} is a number up to {_MAX_REPETITIONS}")
        pattern = node.get("pattern", "")
        if isinstance(pattern, str):
            numbers = [int(n) for found in _QUANTIFIER.findall(pattern) for n in found if n]
            if len(pattern) > _MAX_PATTERN or max(numbers, default=0) > _MAX_REPETITIONS:
                raise ValueError(f"a pattern has up to {_MAX_PATTERN} characters and repeats up to {_MAX_REPETITIONS} times")
            if _nested(pattern) > _MAX_NESTED:
                raise ValueError(f"repetitions within repetitions of a pattern come to at most {_MAX_NESTED} together")


def _nested(pattern: str) -> int:
    """The largest product of repetitions that lie within each other, 0 where none do: llama.cpp follows every way to divide a
    text among them. One without an end counts as _OPEN."""
    try:
        return _product(_PARSER.parse(pattern), 0)
    except (re.error, RecursionError, OverflowError):
        numbers = [int(n) for found in _QUANTIFIER.findall(pattern) for n in found if n]
        return math.prod(max(n, 1) for n in numbers) if len(numbers) > 1 else 0


def _product(node: Any, depth: int) -> int:
    """Of a parsed pattern, `depth` repetitions deep; 0 below none that lie within each other."""
    most = 0
    for name, value in node:
        if str(name) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            n = _OPEN if value[1] > _MAX_REPETITIONS else int(value[1])
            inner = _product(value[2], depth + 1)
            most = max(most, n * max(inner, 1) if inner or depth else 0)
        else:
            parts = list(value) if isinstance(value, tuple) else []
            parts = [p for part in parts for p in (part if isinstance(part, list) else [part])]  # a list: alternatives
            most = max([most, *(_product(p, depth) for p in parts if hasattr(p, "data"))])
    return most


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    left = [value]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            yield here
            left += here.values()
        elif isinstance(here, list):
            left += here
