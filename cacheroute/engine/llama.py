"""A loaded model that generates: llama_cpp.Llama with experts on flash, a budget, and a routing.

One token passes: command -> Llama -> llama.cpp -> hook -> router -> store (native/). Knows no command line.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from cacheroute.engine import callbacks, log, templates
from cacheroute.engine.checkpoint import Checkpoint, load_sequence, save_sequence
from cacheroute.engine.hook import Hook, Interrupt, Settings
from cacheroute.engine.open_files import OpenFiles
from cacheroute.engine.stats import Stats
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import patched_llama_cpp
from cacheroute.model import context_memory, experts, gguf_file
from cacheroute.native.counters import Counters
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.trace.forced_scores import ForcedScores
from cacheroute.trace.task_profile import TaskProfile

_llama_cpp = patched_llama_cpp.module()
_LAZY_MODE_EXPERTS = 3  # patches/0002-lazy-experts.patch
_SIZES = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 0, "n_seq_max": 1, "n_threads": 1, "n_threads_batch": 1}  # and their least
_OWN = ("use_mmap", "use_mlock", "lazy_mode")  # arguments of llama_cpp.Llama that are not for the caller


class Llama(_llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """`llama_cpp.Llama` whose routed experts stay in the file, at most `budget` of them in memory.

    Args:
        model_path: a GGUF file, or the first shard of a split one.
        budget: "50%" or 30 (of the experts of each layer), "2GiB" (all layers together), "all"; None: half of the
            experts, or K where that is more. Bytes are those in memory, whole pages.
        routing: "original", "cache-prior:lambda=0.2", ... (`cacheroute routing`); None leaves the hook unset: experts are
            mapped and left to the kernel, and no budget is kept.
        eviction: "lru", "lfu", "score" or "soft-lfu".
        io: how misses are read; "mmap" (through the page cache) or "direct" (past it, where the filesystem can), "auto"
            (the faster one, measured once for each filesystem and shown on stderr), "none" (misses are counted, memory is left to
            the kernel: scores and counts are the same, sooner, where the model fits).
        flash_mbps: paces reads to a flash of that many MB (10^6 bytes) per second.
        prefetch: while a layer computes on a decoded token, up to so many experts are read that the next layer would miss if its
            router were given this layer's hidden state. They take memory beside the budget; what is chosen stays the same.
        prompt_routing: how the experts of prompts are chosen: "original", or "keep:cover=0.9", which reads fewer of them and is
            lossy (`cacheroute routing`).
        Everything else: as llama_cpp.Llama.

    Policies act on decoded tokens; prompts are routed by `prompt_routing`. generate() and everything above it know which is
    which; tokens given to eval() directly are prompt, except within `decoding()`.

    Routing state belongs to a sequence: reset() and, with a lossy routing of either kind, any generate() that does not continue
    the tokens already evaluated start from an empty cache, so that a run can be repeated exactly; with `original` a prompt that
    shares a prefix with them keeps the cache, whose state changes no logits. save_state() and load_state(), and with them
    set_cache(), carry the routing state; a state of other settings, or one that was pickled, starts from an empty cache.

    A process that is forked from one with a loaded model may leave it alone, and end; it cannot compute with it.

    Raises UsageError for arguments that do not fit the model, CacherouteError when the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str,
        *,
        budget: str | int | None = None,
        routing: str | strategies.Routing | None = "original",
        eviction: str = evictions.DEFAULT,
        io: str = "mmap",
        flash_mbps: float | None = None,
        prefetch: int = 0,
        prompt_routing: str | PromptRouting = "original",
        **kwargs: Any,
    ) -> None:
        self.template_error = ""  # why the file's chat template cannot be parsed; the setter of `metadata` sets it
        self._hook: Hook | None = None
        self._closed = False
        self._task: TaskProfile | None = None
        self.forced: ForcedScores | None = None  # force() sets it
        self._decoding = False
        self._lock = threading.RLock()  # held by the thread that computes
        self._generation: object = None  # the generate() that began last
        self._untouched = False  # no token since the last reset: resetting once more would read a warm cache twice
        self._trace_sink: Callable[[bytes], None] | None = None
        self._stack = contextlib.ExitStack()  # close() works on a half-made object
        self._flash_mbps = flash_mbps
        self._owner = os.getpid()
        header = gguf_file.read(model_path)
        self.layout = experts.layout(header)
        settings = Settings.of(self.layout, budget, routing, eviction, io, prefetch, prompt_routing)
        for name in _OWN:
            if name in kwargs:
                raise UsageError(f"{name} is not for the caller to choose: experts are mapped and dense weights are read.")
        for name, least in _SIZES.items():
            if name in kwargs and kwargs[name] is not None and not least <= kwargs[name] < 2**31:
                raise UsageError(f"{name} is at least {least} and below 2^31, not {kwargs[name]}.")
        if settings.io != "none":
            # the page cache gives way to others, down to the least; slots do not
            least = settings.budget.nbytes if settings.io == "direct" else self.layout.n_used * self.layout.resident_bytes
            context_memory.check_budget(header, self.layout, kwargs.get("n_ctx", 512), least if settings.routing else 0)
        self._files = OpenFiles(self.layout.paths)
        refused: list[str] = []
        try:
            with log.errors(verbose=kwargs.get("verbose", True)) as refused:
                super().__init__(str(model_path), use_mmap=False, lazy_mode=_LAZY_MODE_EXPERTS, **kwargs)
        except ValueError as e:
            raise CacherouteError(f"llama.cpp cannot load {model_path}: {log.reason(refused) or e}.") from e
        self._has_chat_format = bool(kwargs.get("chat_format") or kwargs.get("chat_handler"))
        # llama.cpp rounds the context up; ids and scores have room for what was asked for
        self._n_ctx = len(self.input_ids) or super().n_ctx()
        self._interrupt = Interrupt()
        self._interrupt.attach(self._ctx.ctx)
        # every path that computes ends in this call: eval(), embed(), draft models, whatever upstream adds
        self._compute = self._ctx.decode
        this = weakref.ref(self)  # a circle would keep a model that is dropped
        self._ctx.decode = lambda batch: this()._decode(batch)  # type: ignore[union-attr]
        self._apply(settings)

    @property
    def metadata(self) -> Any:
        """The file's scalar metadata as text, without chat templates that cannot be parsed: upstream's constructor parses them
        all, and a broken one must not keep a model from loading."""
        return self._metadata

    @metadata.setter
    def metadata(self, value: Any) -> None:
        self._metadata, self.template_error = templates.split(value)

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.create_chat_completion. Raises CacherouteError when the model's template cannot be parsed and no
        chat_format or chat_handler was given."""
        if self.template_error and not self._has_chat_format:
            raise CacherouteError(f"The model's chat template cannot be used ({self.template_error}); give a chat_format.")
        return super().create_chat_completion(*args, **kwargs)

    def configure(
        self,
        *,
        budget: str | int | None = None,
        routing: str | strategies.Routing | None = "original",
        eviction: str = evictions.DEFAULT,
        io: str = "mmap",
        prefetch: int = 0,
        prompt_routing: str | PromptRouting = "original",
    ) -> None:
        """Changes the settings of a loaded model: no expert is resident, the sequence is forgotten, counters start at 0.

        When it fails, nothing has changed but that experts may have left memory.
        """
        self._check_usable()
        self._apply(Settings.of(self.layout, budget, routing, eviction, io, prefetch, prompt_routing))
        super().reset()
        self._warm()

    def _apply(self, settings: Settings) -> None:
        """Makes the new hook before the old one goes."""
        hook = Hook(self.layout, settings, self._model.model, self.forced, self._files.paths) if settings.routing else None
        if hook:
            hook.attach(self._ctx.ctx)
            hook.set_pace(self._flash_mbps)
        if self._hook:
            self._hook.close(None if hook else self._ctx.ctx)
        self._hook = hook
        self.budget, self.routing, self.eviction = settings.budget, settings.routing, settings.eviction
        self.io, self.prefetch = hook.io if hook else settings.io, settings.prefetch
        self.prompt_routing, self._lossy = settings.prompt_routing, settings.lossy

    def n_ctx(self) -> int:
        """Tokens that a sequence may have."""
        return int(getattr(self, "_n_ctx", 0) or super().n_ctx())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it this thread computes. Raises CacherouteError when another one does."""
        self._check_usable()
        if not self._lock.acquire(blocking=False):
            raise CacherouteError("The model is in use by another thread; let one use it at a time, or load it for each.")
        try:
            yield
        finally:
            self._lock.release()

    def _check_usable(self) -> None:
        if self._closed:
            raise CacherouteError("The model is closed; load it again.")
        if os.getpid() != self._owner:
            raise CacherouteError("The model was loaded before this process was forked; load it again here.")

    def close(self) -> None:
        """Frees the model. The hook goes first: it works on the model's mappings. May be called twice."""
        self._closed = True
        if self._hook:
            context = getattr(self, "_ctx", None)
            self._hook.close(context.ctx if context else None)  # the garbage collector may have closed it first
            self._hook = None
        if hasattr(self, "_files"):
            self._files.close()
        if os.getpid() == self._owner:
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        """As llama_cpp.Llama: what makes the same model again, settings included, the sequence not."""
        self._check_usable()
        state = {k: v for k, v in super().__getstate__().items() if k not in _OWN}
        own: dict[str, Any] = {"budget": self.budget.capacity, "routing": self.routing, "eviction": self.eviction, "io": self.io}
        own |= {"flash_mbps": self._flash_mbps, "prefetch": self.prefetch, "prompt_routing": self.prompt_routing}
        return state | own

    @property
    def flash_mbps(self) -> float | None:
        """The pace of reads in MB/s, None for as fast as the device goes."""
        return self._flash_mbps

    @flash_mbps.setter
    def flash_mbps(self, value: float | None) -> None:
        self._flash_mbps = value
        if self._hook:
            self._hook.set_pace(value)

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

        Raises CacherouteError when the context is full, an expert cannot be read, or the model does not do what its file says.
        """
        with self._alone():
            if self.n_tokens + len(tokens) > self._n_ctx:
                raise CacherouteError(
                    f"{self.n_tokens + len(tokens)} tokens do not fit the context of {self._n_ctx}; "
                    "give a larger one (-c, n_ctx=)."
                )
            super().eval(tokens)

    def _decode(self, batch: Any) -> None:
        """The one gate before llama_decode(): keeps the budget, sets the phase, and raises errors, for every caller."""
        self._check_usable()
        first = int(batch.batch.pos[0]) if batch.batch.n_tokens and batch.batch.pos else self.n_tokens
        if first == 0:
            self._files.check()
        self._untouched = complete = False
        if self._hook:
            self._hook.begin(first, decode=self._decoding)
        try:
            self._compute(batch)
            complete = True
        except RuntimeError:
            if self._interrupt.take():
                raise KeyboardInterrupt from None
            raise
        finally:
            if self._hook:
                self._hook.finish(complete=complete)
        if self._hook and self._trace_sink:
            self._trace_sink(self._hook.take_trace())

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.embed. Forgets the sequence."""
        with self._alone():
            super().reset()
            try:
                return super().embed(*args, **kwargs)
            finally:
                super().reset()

    def tokenize(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.tokenize."""
        self._check_usable()
        return super().tokenize(*args, **kwargs)

    def detokenize(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.detokenize."""
        self._check_usable()
        return super().detokenize(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.sample."""
        self._check_usable()
        return super().sample(*args, **kwargs)

    def reset(self) -> None:
        """Forgets the sequence and, with it, which experts are resident."""
        self._check_usable()
        super().reset()
        if self._hook and not self._untouched:
            self._hook.reset()
            self._warm()

    def rewind(self) -> None:
        """Clears the tokens; experts stay in memory."""
        super().reset()

    def checkpoint(self, *, sequence: bool = False) -> Checkpoint:
        """Keeps the routing state, for return_to(); with `sequence` also the model's, so that it outlives this sequence."""
        self._check_usable()
        state = save_sequence(self._ctx.ctx) if sequence else None
        return Checkpoint(self._hook, [int(t) for t in self.input_ids[: self.n_tokens]], state)

    def return_to(self, mark: Checkpoint) -> None:
        """Continues after the tokens of a checkpoint of the same budget and eviction; the routing may be another. Counters go on.

        Without its `sequence`, those tokens must still be the first ones here, and the model must not be recurrent: its state
        cannot be cut back. Not for a policy in Python, which keeps its own state. Raises CacherouteError for what does not fit.
        """
        self._check_usable()
        if not mark.fits(self._hook):
            raise CacherouteError("A checkpoint fits the budget and the eviction that it was taken with.")
        self._untouched = False
        if mark.sequence is not None:
            load_sequence(self._ctx.ctx, mark.sequence)
            self.input_ids[: len(mark.tokens)] = mark.tokens
        self.n_tokens = len(mark.tokens)

    def save_state(self) -> Any:
        """As llama_cpp.Llama.save_state, with the routing state."""
        self._check_usable()
        state = super().save_state()
        state.routing = self.checkpoint()
        return state

    def load_state(self, state: Any) -> None:
        """As llama_cpp.Llama.load_state; a state without routing state, or of another budget or eviction, starts from an empty
        cache."""
        self._check_usable()
        super().load_state(state)
        mark = getattr(state, "routing", None)
        self._untouched = False
        if self._hook and not (mark and mark.fits(self._hook)):
            self._hook.reset()

    def load_experts(self, layer: int, ids: Sequence[int]) -> None:
        """Brings experts of a layer (by its place in `layout`) into memory; they count as used, the last as the most recent."""
        if self._hook:
            self._untouched = False
            self._hook.warm(layer, ids)

    def warm(self, task: TaskProfile | None) -> None:
        """From now on every sequence starts with the experts that a task uses most in the cache; None: with an empty one.

        Clears the sequence. Raises UsageError when the profile is of another model.
        """
        if task:
            task.check(self.layout)
        self._task = task
        self._untouched = False
        self.reset()

    def _warm(self) -> None:
        if self._task and self._hook:
            for layer, capacity in enumerate(strategies.capacities(self.routing, self.budget, self.layout)):
                self.load_experts(layer, self._task.best(layer, capacity))
        self._untouched = True

    def force(self, scores: ForcedScores | None) -> None:
        """From now on layers rank these scores, a row for each token of a sequence, instead of the model's; None: the model's.

        The generated text is then meaningless; gate weights stay the model's. Resets what configure() resets. Raises UsageError
        for scores of another E or number of layers; eval() raises CacherouteError for a token that they do not have.
        """
        layout = self.layout
        if scores and (len(scores.z), scores.z[0].shape[1]) != (len(layout.layers), layout.n_expert):
            raise UsageError(f"{scores.name} does not fit {len(layout.layers)} layers of {layout.n_expert} experts.")
        self.forced = scores
        self.configure(
            budget=self.budget.capacity,
            routing=self.routing,
            eviction=self.eviction,
            io=self.io,
            prefetch=self.prefetch,
            prompt_routing=self.prompt_routing,
        )

    @contextlib.contextmanager
    def tracing(self, sink: Callable[[bytes], None]) -> Iterator[None]:
        """Within it `sink` is given the records (trace/trace_file.py) of every token, after each batch; starts a new sequence."""
        if self._hook is None:
            raise UsageError("There is nothing to trace without a routing.")
        self._hook.trace(True)
        self._trace_sink = sink
        self._untouched = False
        self.reset()
        try:
            yield
        finally:
            self._trace_sink = None
            if self._hook:
                self._hook.trace(False)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As llama_cpp.Llama.generate; the prompt is prefill, what follows is decode.

        A model has one sequence: where another generate() has begun meanwhile, the next token raises CacherouteError.
        """
        tokens = list(tokens)
        own = self._generation = object()
        processors = callbacks.Processors(kwargs.get("logits_processor") or ())
        if kwargs.get("logits_processor"):
            kwargs["logits_processor"] = _llama_cpp.LogitsProcessorList([processors])
        if kwargs.get("grammar"):
            callbacks.check_grammar(self._model, kwargs["grammar"])
        if self._lossy and list(self.input_ids[: self.n_tokens]) != tokens[: self.n_tokens]:
            self.reset()
        inner = super().generate(tokens, *args, **kwargs)
        try:
            with self._alone():
                token = next(inner)
            while True:
                processors.check()
                more = yield token
                if self._generation is not own:
                    raise CacherouteError("Another answer was begun before this one ended; end one first, or load two.")
                if self.n_tokens >= self._n_ctx:
                    return  # full: the last token was sampled and cannot be evaluated
                with self._alone(), self.decoding():  # only while it runs: a generator that is left alone changes nothing
                    token = inner.send(more)
        except StopIteration:
            return
        finally:
            inner.close()

    def stats(self) -> Stats:
        """Counters since the model was loaded or configured."""
        return Stats(
            routing=str(self.routing) if self.routing else "none",
            prompt_routing=str(self.prompt_routing),
            eviction=self.eviction,
            io=self.io,
            n_expert=self.layout.n_expert,
            n_used=self.layout.n_used,
            n_layers=len(self.layout.layers),
            capacity=self.budget.capacity,
            budget_bytes=self.budget.nbytes,
            resident_bytes=self._hook.resident_bytes if self._hook else 0,
            prefill=self._hook.counters(prefill=True) if self._hook else Counters(),
            decode=self._hook.counters(prefill=False) if self._hook else Counters(),
        )

    def decoded_by_layer(self) -> list[Counters]:
        """Counters of the decoded tokens, one per MoE layer; reads are not counted by layer."""
        return [self._hook.counters(i, prefill=False) for i in range(len(self.layout.layers))] if self._hook else []

    def measure_resident(self) -> int | None:
        """Bytes of experts in memory as the kernel says (mincore), whole pages, of slots and of the file alike; None where it
        does not tell (a file that belongs to another user)."""
        return self._hook.measure_resident() if self._hook else None
