"""A completion from a loaded model as text that loses nothing: what is valid UTF-8 comes at once, what is not is U+FFFD.

llama_cpp.Llama's own stream drops the bytes of letters that it cannot put together, and holds text back to the end after one.
Prompt, sampling and stop strings are upstream's. Knows the loaded model, not who asks.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import patched_llama_cpp

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_DEFAULT_TEMPLATES = ("tokenizer.chat_template", "tokenizer.chat_template.default")


Message = dict[str, str]
"""role: "system", "user" or "assistant"; content: its text."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: its tokens, and what ends the answer beside its end-of-generation tokens."""

    tokens: list[int]
    stop: tuple[bytes, ...] = ()
    stopping_criteria: Any = None


def raw_prompt(llm: Llama, text: str) -> Prompt:
    """The text as it is, tokenised as llama_cpp.Llama.create_completion does it."""
    model = llm._model
    cls, sep = model.token_cls(), model.token_sep()
    begin = cls if cls != -1 else llm.token_bos()
    end = sep if sep != -1 else llm.token_eos()
    before = [begin] if model.add_bos_token() and begin != -1 else []
    after = [end] if model.add_eos_token() or sep != -1 else []
    return Prompt([*before, *llm.tokenize(text.encode(), add_bos=False, special=True), *after])


def has_chat_template(llm: Llama) -> bool:
    """Whether the file says how a chat is written; a template for tools only does not."""
    return bool(_template_error(llm)) or any(key in llm.metadata for key in _DEFAULT_TEMPLATES)


def chat_prompt(llm: Llama, messages: Sequence[Message]) -> Prompt:
    """The messages, the last of them the user's, written as the model's chat template has it.

    Raises TemplateError, which names --raw, for a template that cannot be parsed, fails, or renders nothing.
    """
    if error := _template_error(llm):
        raise TemplateError(error)
    chat_format = _chat_format_module()
    asked: dict[str, Any] = {}

    class _Asked:
        """Stands for the model in upstream's chat handler, which ends in create_completion()."""

        tokenize = staticmethod(llm.tokenize)
        verbose = False

        @staticmethod
        def create_completion(**kwargs: Any) -> Iterator[Any]:
            asked.update(kwargs)
            return iter(())

    handler = llm.chat_handler or llm._chat_handlers.get(llm.chat_format)
    try:
        handler = handler or chat_format.get_chat_completion_handler(llm.chat_format)
        handler(llama=_Asked, messages=list(messages), stream=True)
    except Exception as e:  # a template may raise anything
        raise TemplateError(f"{e}" if type(e) is ValueError else f"{type(e).__name__}: {e}") from None
    if not asked.get("prompt"):
        raise TemplateError("it renders nothing")
    stop = [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop") or []
    return Prompt(list(asked["prompt"]), tuple(s.encode() for s in stop if s), asked.get("stopping_criteria"))


def _template_error(llm: Llama) -> str:
    """Why the model's template cannot be parsed; "" when it can, or there is none."""
    return str(getattr(llm, "template_error", ""))


class TemplateError(CacherouteError):
    """A chat template cannot be parsed, fails for these messages, or renders nothing; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = " ".join(reason.split()).rstrip(".")
        super().__init__(f"The model's chat template cannot be used ({self.reason}); --raw continues the text without it.")


def _chat_format_module() -> Any:
    from importlib import import_module

    return import_module(f"{patched_llama_cpp.module().__name__}.llama_chat_format")


@dataclass
class Completion:
    """One answer. `pieces` gives its text as it comes; the rest is known when that has ended, or is left.

    text: all of it. n_tokens: tokens generated, without the one that ends the text. finish_reason: "stop" or "length".
    started, first, last: times (perf_counter) of the call, of the first token and of the last one; None without a token.
    full: the context ended the answer.
    begins: called when the prompt is accepted, before it is evaluated.
    prompt_cache: a file that begins the prompt, where it is there, and keeps it as soon as it is evaluated, unless it begins with
    it already. unkept: why it could not be written. keeping: seconds that writing it took, between the first token and the next.
    each_token: called with each token of the answer, before its text comes; what it raises ends the answer.
    """

    llm: Llama
    prompt: Prompt
    max_tokens: int | None
    seed: int
    sampling: dict[str, Any]
    prompt_cache: Path | None = None
    begins: Callable[[], None] | None = None
    each_token: Callable[[int], None] | None = None
    text: str = ""
    n_tokens: int = 0
    finish_reason: str = ""
    full: bool = False
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    unkept: CacherouteError | None = None
    keeping: float = 0.0

    def pieces(self) -> Iterator[str]:
        """Text as it comes. Raises UsageError when the prompt does not fit the context, and for a prompt cache that
        cannot be used."""
        for piece in self._pieces():
            if piece:
                self.text += piece
                yield piece

    def _keep(self, kept: list[int]) -> None:
        """Writes the evaluated prompt to the file, which has kept those tokens; the answer goes on when that fails."""
        if self.prompt_cache and kept[: len(self.prompt.tokens)] != self.prompt.tokens:
            start = time.perf_counter()
            try:
                self.llm.save_prompt(self.prompt_cache)
            except CacherouteError as e:
                self.unkept = e
            self.keeping = time.perf_counter() - start

    def _pieces(self) -> Iterator[str]:
        llm, tokens = self.llm, self.prompt.tokens
        room = llm.n_ctx() - len(tokens)
        if room <= 0:
            raise UsageError(
                f"The prompt of {len(tokens)} tokens does not fit the context of {llm.n_ctx()}; give a larger one with -c."
            )
        limit = room if self.max_tokens is None else min(self.max_tokens, room)
        self.started = time.perf_counter()
        kept = llm.load_prompt(self.prompt_cache) if self.prompt_cache and self.prompt_cache.exists() else []
        if self.begins:
            self.begins()
        if not limit:
            with contextlib.closing(llm.generate(list(tokens), temp=0.0)) as generated:
                next(generated, None)
            self._keep(kept)
            self.finish_reason = "length"
            return
        llm.set_seed(self.seed)
        text = Stream(self.prompt.stop)
        generated = llm.generate(list(tokens), stopping_criteria=self.prompt.stopping_criteria, **self.sampling)
        try:
            for token in generated:
                now = time.perf_counter()
                if self.first is None:
                    self.first = now
                    self._keep(kept)
                if is_end(llm, token):
                    self.finish_reason = "stop"
                    break
                self.n_tokens, self.last = self.n_tokens + 1, now
                if self.each_token:
                    self.each_token(token)
                yield text.add(token_bytes(llm, token))
                if text.stopped:
                    self.finish_reason = "stop"
                    break
                if self.n_tokens == limit:
                    self.finish_reason = "length"
                    break
            else:
                criteria = self.prompt.stopping_criteria
                self.finish_reason = "stop" if criteria and criteria(llm.input_ids[: llm.n_tokens], None) else "length"
        finally:
            generated.close()
        self.full = self.finish_reason == "length" and len(tokens) + self.n_tokens >= llm.n_ctx()
        yield text.end()


class Stream:
    """Bytes of tokens in, text out: at once, but for the beginning of a letter and what may become a stop string."""

    def __init__(self, stop: Sequence[bytes] = ()) -> None:
        self.stopped = False
        self._stop = stop
        self._held = b""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def add(self, data: bytes) -> str:
        """The text that these bytes complete; `stopped` is true when a stop string came, and what follows it is dropped."""
        if self.stopped:
            return ""
        held = self._held + data
        ends = [held.index(s) for s in self._stop if s in held]
        if ends:
            self.stopped, self._held = True, b""
            return self._decode(held[: min(ends)])
        n_kept = max((n for s in self._stop for n in range(1, min(len(s), len(held) + 1)) if held.endswith(s[:n])), default=0)
        out, self._held = held[: len(held) - n_kept], held[len(held) - n_kept :]
        return self._decode(out)

    def end(self) -> str:
        """What is left."""
        held, self._held = self._held, b""
        return self._decode(held, True)


def token_bytes(llm: Llama, token: int) -> bytes:
    """What a token stands for in text: nothing for a special one. Of any length, unlike upstream's detokenize()."""
    api, size = patched_llama_cpp.module(), 64
    while True:
        buffer = (ctypes.c_char * size)()
        n = api.llama_token_to_piece(llm._model.vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def is_end(llm: Llama, token: int) -> bool:
    """Whether a token ends an answer: a model may have several of them."""
    return bool(patched_llama_cpp.module().llama_vocab_is_eog(llm._model.vocab, token))
