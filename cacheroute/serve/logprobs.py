"""The model's probabilities of the tokens of an answer, before temperature, bias and penalties, as they come with its text."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cacheroute.engine.completion import token_bytes

if TYPE_CHECKING:
    from cacheroute.engine.llama import Llama

_LEAST = -9999.0  # OpenAI's: JSON has no infinity


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, log p of it, and the likeliest tokens in its place, best first."""

    data: bytes
    logprob: float
    top: list[tuple[bytes, float]]


class Logprobs:
    """Collects them token by token, and hands them out when the text of the token is out: stop strings hold text back."""

    def __init__(self, llm: Llama, n_top: int) -> None:
        self._llm, self._n_top = llm, n_top
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # (where its text begins, in bytes; the token)
        self._seen = self._out = 0  # bytes

    def add(self, token: int) -> None:
        """The token that was sampled last, before it is evaluated."""
        logits = self._llm.next_logits().astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        n = min(self._n_top, len(logits))
        best = [int(i) for i in np.argpartition(-logits, n - 1)[:n]] if n else []
        top = sorted(((float(logits[i]), i) for i in best), key=lambda p: (-p[0], p[1]))
        data = token_bytes(self._llm, token)
        own = TokenLogprob(data, _finite(logits[token]), [(token_bytes(self._llm, i), _finite(p)) for p, i in top])
        self._held.append((self._seen, own))
        self._seen += len(data)

    def released(self, text: str) -> list[TokenLogprob]:
        """Those of the tokens that begin before the end of all text so far, of which this is the last piece."""
        self._out += len(text.encode())
        out = []
        while self._held and self._held[0][0] < self._out:
            out.append(self._held.popleft()[1])
        return out

    def rest(self, *, stopped: bool) -> list[TokenLogprob]:
        """At the end of the answer: none where a stop string has ended it, whose tokens are no part of it."""
        return [] if stopped else [own for _, own in self._held]


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST)
