"""What a loaded model computes: prompts in passes, decoded tokens one by one, through one gate before llama_decode()."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cacheroute import interrupts
from cacheroute.engine import callbacks, progress
from cacheroute.engine.configured import ConfiguredLlama
from cacheroute.engine.flash_attention import FlashAttention
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import patched_llama_cpp
from cacheroute.install.machine import available_memory
from cacheroute.model import memory_plan

if TYPE_CHECKING:
    from cacheroute.engine.compute_threads import ComputeThreads
    from cacheroute.engine.embeddings import MappedEmbeddings
    from cacheroute.engine.micro_batch import MicroBatches, Plan

_llama_cpp = patched_llama_cpp.module()


class ComputingLlama(ConfiguredLlama):
    """The part of engine.llama.Llama that computes; that class has the rest."""

    prompt_progress: progress.PromptCallback | None
    computed_at: float
    _n_ctx: int
    _decoding: bool
    _read_ahead: bool
    _batches: MicroBatches
    _threads: ComputeThreads
    _n_threads_set: int
    _embeddings: MappedEmbeddings
    _compute: Callable[[Any], None]  # llama_decode()

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it, tokens given to eval() count as decoded: the routing acts on them."""
        before, self._decoding = self._decoding, True
        try:
            yield
        finally:
            self._decoding = before

    def eval(self, tokens: Sequence[int]) -> None:
        """As llama_cpp.Llama.eval.

        Raises UsageError when the context is full, CacherouteError when an expert cannot be read or the model does not do what
        its file says.
        """
        with self._alone():
            if self.n_tokens + len(tokens) > self._n_ctx:
                raise UsageError(
                    f"{self.n_tokens + len(tokens)} tokens do not fit the context of {self._n_ctx}; "
                    "give a larger one (-c, n_ctx=)."
                )
            if self._decoding:
                super().eval(tokens)
                return
            plan = self.plan(len(tokens))
            cuts = [0, len(tokens)] if self._batches.fixed else plan.cuts()  # a fixed split is llama.cpp's own
            parts = [tokens[begin:end] for begin, end in itertools.pairwise(cuts)]
            lengths = [len(part) for part in parts]
            prompt = progress.Prompt.of(lengths, self.n_batch, self.context_params.n_ubatch, self.layout)
            if self._hook:
                self._hook.read_ahead(plan.ahead if self._read_ahead else 0)
            with progress.of_prompt(self._hook, self.n_tokens, prompt, self.prompt_progress):
                for part in parts:
                    super().eval(part)

    def plan(self, n_tokens: int) -> Plan:
        """How a prompt of so many more tokens, after those evaluated, would be computed with the memory that is free now."""
        resident = self.budget.nbytes if self._loaded else self.resident_bytes
        free = available_memory(ulimits=False) if self._watch else None
        reserve = 0 if free is None else memory_plan.reserve(free + resident)  # with less, the watch makes the budget smaller
        return self._batches.plan(max(n_tokens, 1), self.n_tokens, self.budget, resident, reserve)

    def _decode(self, batch: Any) -> None:
        """The one gate before llama_decode(): keeps the budget, sets the phase, and raises errors, for every caller."""
        self._check_usable()
        first = int(batch.batch.pos[0]) if batch.batch.n_tokens and batch.batch.pos else self.n_tokens
        if first == 0:
            self._files.check()
        self._untouched = complete = False
        self._points.cut(first)
        self._logits, broken, self._broken_off = None, self._broken_off, True
        self._requires_eval = True  # eval() says otherwise at its end
        if self._hook:
            self._hook.begin(first, decode=self._decoding)
        self._set_threads()
        try:
            self.computing, self.computed_at = True, time.monotonic()
            try:
                start = time.perf_counter()
                self._compute(batch)
                if self._decoding:
                    self._threads.took(time.perf_counter() - start)
                complete = not self._interrupt.seen()  # what an interrupted batch has computed is of no use
            except RuntimeError:
                if not self._interrupt.seen():
                    raise
            finally:
                if self._hook:
                    self._hook.finish(complete=complete)
                interrupted = self._interrupt.take()
        finally:
            self.computing, self.computed_at = False, time.monotonic()
        if interrupted:
            interrupts.met()
            raise KeyboardInterrupt
        self._embeddings.check()
        self._broken_off = broken
        if self._hook and self._trace_sink:
            self._trace_sink(self._hook.take_trace())

    def _set_threads(self) -> None:
        """Of decoding, fewer beside other work. Flash attention sums in another order with other threads: there it stays."""
        n = self.n_threads if self.context_params.flash_attn_type == FlashAttention.ALWAYS else self._threads.look()
        if n != self._n_threads_set:
            self._n_threads_set = n
            self._ctx.set_n_threads(n, self.n_threads_batch)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.embed. Forgets the sequence.

        Raises UsageError where there is no token to embed, of which upstream crashes.
        """
        given = args[0] if args else kwargs.get("input")
        texts = [given] if isinstance(given, str) else list(given or ())
        with self._alone():
            if not texts or any(not text and not self.tokenize(b"") for text in texts):
                raise UsageError("There is nothing to embed: a text is empty.")
            super().reset()
            try:
                return super().embed(*args, **kwargs)
            finally:
                super().reset()

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As llama_cpp.Llama.generate; the prompt is prefill, what follows is decode.

        A model has one sequence: where another generate() has begun meanwhile, or the sequence was changed, the next token
        raises CacherouteError.
        """
        tokens = list(tokens)
        n_known = len(tokens) + (0 if kwargs.get("reset", True) else self.n_tokens)  # evaluated or sampled
        processors = callbacks.Processors(kwargs.get("logits_processor") or ())
        if kwargs.get("logits_processor"):
            kwargs["logits_processor"] = _llama_cpp.LogitsProcessorList([processors])
        if kwargs.get("grammar"):
            callbacks.check_grammar(self._model.vocab, kwargs["grammar"])
        with self._alone():
            if kwargs.get("reset", True):
                self._begin_prompt(tokens)
            own = self._generation = object()  # not before: a call that is refused leaves another thread's answer alone
        inner = super().generate(tokens, *args, **kwargs)
        try:
            with self._alone():
                token = callbacks.sent(inner, None)
                self._keep_point()
            while token is not None:
                processors.check()
                n_tokens, n_known = self.n_tokens, n_known + 1
                more = yield token
                if more and not self._logits_all:
                    raise UsageError("Tokens can be sent to an answer of a model that was loaded with logits_all=True.")
                if self._generation is not own or self.n_tokens != n_tokens:
                    what = "Another answer was begun" if self._generation not in (own, None) else "The sequence was changed"
                    raise CacherouteError(f"{what} before this answer ended; end it first, or load the model twice.")
                if n_known > self._n_ctx:
                    return  # full: the last token was sampled and cannot be evaluated
                with self._alone(), self.decoding():  # only while it runs: a generator that is left alone changes nothing
                    token = callbacks.sent(inner, more)
        finally:
            inner.close()
