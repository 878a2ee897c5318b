"""Answers as OpenAI's API writes them, whole and in chunks, for chats and for texts."""

from __future__ import annotations

import secrets
import time
from typing import Any

from cacheroute.serve.logprobs import TokenLogprob
from cacheroute.serve.worker import Report


class Answer:
    """One answer: its id and time are the same in all chunks."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._of = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._n_characters = 0  # of the text so far

    def begin(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        """A chunk of text; `logprobs` None: they were not asked for."""
        chunk = self._chunk({"content": text} if self.chat else text, logprobs)
        self._n_characters += len(text)
        return chunk

    def end(self, finish_reason: str) -> dict[str, Any]:
        """The chunk after all text."""
        return self._chunk({} if self.chat else "", None, finish_reason)

    def end_usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk of usage, which has no choices."""
        return {**self._of, "object": self._object(chunk=True), "choices": [], "usage": usage}

    def whole(self, text: str, logprobs: list[TokenLogprob] | None, finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """All of it at once."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": self._logprobs(logprobs), "finish_reason": finish_reason}
        return {**self._of, "object": self._object(chunk=False), "choices": [choice], "usage": usage}

    def _chunk(
        self, content: dict[str, str] | str, logprobs: list[TokenLogprob] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        own = {"delta" if self.chat else "text": content}
        choice = {"index": 0, **own, "logprobs": self._logprobs(logprobs), "finish_reason": finish_reason}
        return {**self._of, "object": self._object(chunk=True), "choices": [choice]}

    def _object(self, *, chunk: bool) -> str:
        return ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"

    def _logprobs(self, tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        if self.chat:
            entries = [_entry(t.data, t.logprob) | {"top_logprobs": [_entry(*best) for best in t.top]} for t in tokens]
            return {"content": entries, "refusal": None}
        texts = [_text(t.data) for t in tokens]
        starts = [self._n_characters + sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [{_text(data): logprob for data, logprob in reversed(t.top)} for t in tokens]
        return {"tokens": texts, "token_logprobs": [t.logprob for t in tokens], "top_logprobs": top, "text_offset": starts}


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def usage(report: Report) -> dict[str, Any]:
    """OpenAI's `usage` with ours in `cacheroute`, whose names are those of `cacheroute generate -o json`."""
    run, prompt, decode = report.run, report.after.prefill - report.before.prefill, report.after.decode - report.before.decode
    n_prompt = len(run.prompt.tokens)
    cached = max(n_prompt - prompt.tokens, 0)
    seconds = run.last - run.first if run.first and run.last else 0.0
    own = {
        "routing": report.after.routing,
        "prompt_routing": report.after.prompt_routing,
        "queue_s": round(report.waited, 4),
        "time_to_first_token_s": run.first - run.started if run.first else None,
        "prompt_ts": prompt.tokens / (run.first - run.started) if run.first and prompt.tokens else None,
        "ts": (run.n_tokens - 1) / seconds if seconds > 0 else None,
        "prompt_read_mib": prompt.read_mib,
        "read_mib_per_token": decode.read_mib_per_token,
        "miss_rate": decode.miss_rate,
        "swap_rate": decode.swap_rate,
        "drop_rate": decode.drop_rate,
        "prompt_swap_rate": prompt.swap_rate,
    }
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": run.n_tokens,
        "total_tokens": n_prompt + run.n_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "cacheroute": own,
    }
