"""What a client may ask, as OpenAI's API has it: names, types and ranges. Knows no model.

What the server does not do is refused and not ignored. `top_k`, `min_p` and `repeat_penalty` are llama.cpp's, beside OpenAI's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import from_json

from cacheroute.files import TwiceError, one_of_each
from cacheroute.serve.failures import ApiError

MAX_TOP_LOGPROBS = 20
MAX_INT = 2**31 - 1


# the kinds that one parameter may have: what is wrong is said of the one that was sent
_TEXT, _LIST, _TOKENS = "<text>", "<list>", "<tokens>"


def _kind(value: Any) -> str | None:
    return _TEXT if isinstance(value, str) else _LIST if isinstance(value, list) else None


def _kind_of_prompt(value: Any) -> str | None:
    """None for lists in a list, as for other types: several prompts."""
    if not isinstance(value, list) or any(isinstance(part, list | dict) for part in value):
        return _TEXT if isinstance(value, str) else None
    return _TOKENS if value and isinstance(value[0], int | float) else _LIST


def _either(kind: Callable[[Any], str | None], kinds: str) -> Discriminator:
    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be a text, or {kinds}")


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(_Shape):
    include_usage: bool = False


class TextPart(_Shape):
    type: Literal["text"]
    text: str


class Message(_Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[TextPart], Tag(_LIST)], _either(_kind, "a list of parts of type text")
    ] = ""
    name: str = ""

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        own = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return own | ({"name": self.name} if self.name else {})


class NamedSchema(_Shape):
    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama-cpp-python's, of a json_object

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must fit; None: it is text."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ApiError(400, "A response_format of json_schema needs a json_schema.", param="response_format")
            return self.json_schema.schema_
        if self.type == "json_object":
            return {"type": "object"} if self.schema_ is None else self.schema_
        return None

    def check(self) -> None:
        """Raises ApiError for a schema that no answer of this type is kept to."""
        for name, own, kind in (("json_schema", self.json_schema, "json_schema"), ("schema", self.schema_, "json_object")):
            if own is not None and self.type != kind:
                words = f"response_format.{name} needs `type: {kind}` beside it, and the type is {self.type!r}."
                raise ApiError(400, words, param="response_format")


class Asked(_Shape):
    """What both kinds of completion share."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    temperature: float = Field(default=0.8, ge=0, le=2)
    top_p: float = Field(default=0.95, ge=0, le=1)
    top_k: int = Field(default=40, ge=0, le=MAX_INT)
    min_p: float = Field(default=0.05, ge=0, le=1)
    repeat_penalty: float = Field(default=1.0, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    stop: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[str], Field(max_length=16), Tag(_LIST)],
        _either(_kind, "a list of at most 16 texts"),
    ] = Field(default_factory=list)
    seed: int | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    n: Literal[1] = 1
    # said by clients of OpenAI's own service, of no meaning for an answer
    user: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    store: Literal[False] = False

    def check(self) -> None:
        """Raises ApiError for parameters that mean nothing without another one, or beside it."""
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options needs `stream: true` beside it.", param="stream_options")

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(s for s in ([self.stop] if isinstance(self.stop, str) else self.stop) if s)


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat = ResponseFormat(type="text")

    def check(self) -> None:
        """As Asked's."""
        super().check()
        self.response_format.check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs `logprobs: true` beside it.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            words = "max_tokens and max_completion_tokens are two limits of one answer; leave out one."
            raise ApiError(400, words, param="max_tokens")

    @property
    def n_logprobs(self) -> int | None:
        """The likeliest tokens that are wanted beside each token; None: no probabilities are."""
        return self.top_logprobs if self.logprobs else None


class TextRequest(Asked):
    """POST /v1/completions"""

    prompt: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[str], Tag(_LIST)] | Annotated[list[int], Tag(_TOKENS)],
        _either(_kind_of_prompt, "one list of texts or of tokens"),
    ]
    max_tokens: int | None = Field(default=16, ge=0, le=MAX_INT)  # OpenAI's default
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def n_logprobs(self) -> int | None:
        """As ChatRequest's."""
        return self.logprobs


Request = TypeVar("Request", bound=Asked)


def parse(body: bytes, shape: type[Request]) -> Request:
    """The request of a body. Raises ApiError, 400, for what is no JSON, does not fit, or would be ignored."""
    try:
        data = from_json(body, allow_inf_nan=False)
        json.loads(body, object_pairs_hook=one_of_each)
    except TwiceError as e:
        raise ApiError(400, f"The body has the key {e.key!r} twice in one object; leave out one.", param=e.key) from None
    except ValueError as e:
        raise ApiError(400, f"The body is no JSON text in UTF-8 ({e}).") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is no JSON object.")
    try:
        asked = shape.model_validate(data)
    except ValidationError as e:
        raise _refused(e) from None
    asked.check()
    return asked


def _refused(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    where = ".".join(str(part) for part in first["loc"] if part not in (_TEXT, _LIST, _TOKENS))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"This server has no parameter {where!r}.", param=name, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"The parameter {where!r} is missing.", param=name)
    return ApiError(400, f"{where}: {first['msg'].rstrip('.')}.", param=name)
