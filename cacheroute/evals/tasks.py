"""The requests of lm-evaluation-harness, in tokens: scores of continuations, rolling scores, greedy text.

How they are routed: the head of a context, up to its last blank line (the few-shot examples), is a prompt and runs by `original`.
What follows, the question and its answers, is decoded one token at a time, so that the routing acts on it; `generate_until`
decodes only what it generates. The result of a request depends on the request alone: a head that several requests share is
evaluated once, a question once for all of its answers, and the routing state after it is restored exactly for each.

Knows a loaded model; knows nothing of lm-evaluation-harness (evals/harness.py does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheroute.engine import completion
from cacheroute.errors import UsageError
from cacheroute.evals.perplexity import LogP, log_probabilities
from cacheroute.install.machine import available_memory
from cacheroute.routing import strategies

if TYPE_CHECKING:
    from cacheroute.engine.checkpoint import Checkpoint
    from cacheroute.engine.llama import Llama

_Key = tuple[int, str, tuple[int, ...]]


class Heads:
    """The head that was evaluated last, for scorers of one model that follow each other with other routings: prompts are routed
    by `original`, so its keys and values are the same for all of them, and the state of the caches for all of one budget and
    eviction."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._sequence: bytes | None = None
        self._marks: dict[_Key, Checkpoint] = {}

    def find(self, llm: Llama, tokens: list[int]) -> Checkpoint | None:
        """The end of that head with the settings of `llm`, if it is known."""
        return self._marks.get(_key(llm)) if tokens == self._tokens else None

    def keep(self, llm: Llama) -> None:
        """The sequence of `llm` is a head, unless its state is too large for the free memory."""
        tokens = llm._tokens()
        if tokens != self._tokens:
            self._tokens, self._sequence, self._marks = tokens, None, {}
        if self._sequence is None and llm.state_bytes() > (available_memory() or 0) // 8:
            return
        mark = llm.checkpoint(sequence=self._sequence is None)
        self._sequence = mark.sequence = self._sequence or mark.sequence
        self._marks[_key(llm)] = mark


def _key(llm: Llama) -> _Key:
    return llm.budget.capacity, llm.eviction, strategies.capacities(llm.routing, llm.budget, llm.layout)


@dataclass
class _Question:
    """Tokens before an answer, all evaluated; the log-probabilities after them; and the state, where it can be brought back."""

    tokens: list[int]
    row: LogP
    mark: Checkpoint | None


class TaskScorer:
    """A model with the settings that it has now. `truncated` counts requests whose context lost its beginning to the window."""

    def __init__(self, llm: Llama, heads: Heads | None = None) -> None:
        """`heads`: those of other scorers of the same model."""
        self.llm = llm
        self.truncated = 0
        self._kept: Checkpoint | None = None  # after the head that came last
        self._question: _Question | None = None
        policy = llm.routing.policy if llm.routing else ""
        self._heads = None if policy else heads  # a policy in Python keeps a state that no checkpoint has
        self._rewinds = not (policy or llm._is_recurrent or llm._is_hybrid)
        llm.reset()

    @property
    def prefix_token(self) -> int:
        """The token before a text that has no context."""
        bos = self.llm.token_bos()
        return int(bos if bos >= 0 else self.llm.token_eos())

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Tokens of a text; with `bos`, after the model's BOS token if it uses one."""
        return list(self.llm.tokenize(text.encode(), add_bos=bos and self.llm._model.add_bos_token(), special=True))

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """(log p of the continuation in nats, whether greedy decoding would produce it).

        An empty continuation has log p = 0. Spaces at the end of the context belong to the continuation, whose tokens are those
        of both texts together beyond the number of the context's own (lm-evaluation-harness encodes so). Of continuations of one
        context that follow each other, the context is evaluated for the first.
        """
        if not context:
            tokens, start = [self.prefix_token, *self.encode(continuation)], 1
        else:
            stripped = context.rstrip()
            continuation, context = context[len(stripped) :] + continuation, stripped
            tokens = self.encode(context, bos=True) or [self.prefix_token]
            start = len(tokens)
            tokens += self.encode(context + continuation, bos=True)[start:]
        tokens, start = self._fit(tokens, start)
        if start >= len(tokens):
            return 0.0, True
        log_p, greedy = 0.0, True
        for token, row in zip(tokens[start:], self._rows(tokens, start, self._head_length(context, tokens, start)), strict=True):
            log_p += float(row[token])
            greedy = greedy and int(row.argmax()) == token
        return log_p, greedy

    def loglikelihood_rolling(self, text: str) -> float:
        """log p of a whole text in nats, each token once, in windows of the context, of which each has all the context it can."""
        tokens = self.encode(text)
        total, window, done = 0.0, self.llm.n_ctx(), 0
        while done < len(tokens):
            end = min(done + window, len(tokens))
            # every window but the first is moved back from its end until it is full; before its first token stands one more
            start = max(end - window, 0) if done else 0
            part = [tokens[start - 1] if start else self.prefix_token, *tokens[start:end]]
            first = len(part) - (end - done)
            rows = self._rows(part, first, first - 1)
            total += sum(float(row[token]) for token, row in zip(part[first:], rows, strict=True))
            done = end
        return total

    def generate_until(self, context: str, until: Sequence[str], max_tokens: int) -> str:
        """Greedy text after a context, without the first of `until` that comes and what follows it; empty strings are ignored."""
        stops = [s for s in until if s]
        room = min(max_tokens, self.llm.n_ctx() - 1)
        tokens = self.encode(context, bos=True) or [self.prefix_token]
        keep = self.llm.n_ctx() - room
        if len(tokens) > keep:
            self.truncated += 1
            tokens = tokens[-keep:]
        self._start(tokens, self._head_length(context, tokens, len(tokens)), decode=False)
        made = b""
        text = ""
        for n in range(1, room + 1):
            token = int(log_probabilities(self.llm).argmax())
            if completion.is_end(self.llm, token):
                break
            made += completion.token_bytes(self.llm, token)
            text = made.decode("utf-8", "ignore")
            cut = min((i for i in (text.find(s) for s in stops) if i >= 0), default=-1)
            if cut >= 0:
                return text[:cut]
            if n < room:
                with self.llm.decoding():
                    self.llm.eval([token])
        return text

    def _fit(self, tokens: list[int], start: int) -> tuple[list[int], int]:
        """The last tokens that fit the window: one more than the context, as the last one is not evaluated."""
        cut = len(tokens) - self.llm.n_ctx() - 1
        if cut <= 0:
            return tokens, start
        if start - cut < 1:
            raise UsageError(
                f"An answer of {len(tokens) - start} tokens does not fit the context of {self.llm.n_ctx()}; give more with -c."
            )
        self.truncated += 1
        return tokens[cut:], start - cut

    def _head_length(self, context: str, tokens: list[int], start: int) -> int:
        """Tokens of the context's head; less than `start`, as the last token before the continuation is decoded."""
        blank = context.rstrip().rfind("\n\n")
        if blank < 0:
            return 0
        head = self.encode(context[: blank + 2], bos=True)
        same = 0
        while same < min(len(head), start - 1) and head[same] == tokens[same]:
            same += 1
        return same

    def _rows(self, tokens: list[int], start: int, head: int) -> Iterator[LogP]:
        """log p of the vocabulary before each of tokens[start:]."""
        before = tokens[:start]
        known = self._question if self._question and self._question.tokens == before else None
        if known and len(tokens) == start + 1:
            yield known.row  # another answer of one token to the same question: no new evaluation
            return
        if known and known.mark:
            self.llm.return_to(known.mark)
        else:
            self._start(before[:-1], head)
            self._decode(before[-1])
            mark = self.llm.checkpoint() if self._rewinds else None
            known = self._question = _Question(before, log_probabilities(self.llm), mark)
        yield known.row
        for token in tokens[start:-1]:
            self._decode(token)
            yield log_probabilities(self.llm)

    def _decode(self, token: int) -> None:
        with self.llm.decoding():
            self.llm.eval([token])

    def _start(self, tokens: list[int], head: int, *, decode: bool = True) -> None:
        """Evaluates tokens[:head] as a prompt, or restores the state after them, and then the others, decoded or not."""
        self._question = None
        if self._kept and self._kept.tokens == tokens[:head]:
            self.llm.return_to(self._kept)
        else:
            self._begin(tokens[:head])
        if not decode:
            self.llm.eval(tokens[head:])
            return
        for token in tokens[head:]:
            self._decode(token)

    def _begin(self, head: list[int]) -> None:
        """A new sequence with those tokens, which may be none."""
        self.llm.reset()
        self._kept = None
        if not head:
            return
        known = self._heads.find(self.llm, head) if self._heads else None
        if known:
            self.llm.return_to(known)
        else:
            self.llm.eval(head)
            if self._heads:
                self._heads.keep(self.llm)
        if self._rewinds:
            self._kept = self.llm.checkpoint()
