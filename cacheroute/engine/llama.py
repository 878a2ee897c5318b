"""A loaded model that generates: llama_cpp.Llama with experts on flash, a budget, and a routing.

One token passes: command -> Llama -> llama.cpp -> hook -> router -> store (native/). Knows no command line.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cacheroute import interrupts
from cacheroute.engine import arguments, choice, json_schema, load_progress, log, progress, stores, templates
from cacheroute.engine.asked import Asked
from cacheroute.engine.compute_threads import ComputeThreads
from cacheroute.engine.computing import ComputingLlama
from cacheroute.engine.embeddings import MappedEmbeddings
from cacheroute.engine.flash_attention import FlashAttention
from cacheroute.engine.hook import Hook, Interrupt, Settings
from cacheroute.engine.memory_watch import MemoryWatch
from cacheroute.engine.micro_batch import UPSTREAM, MicroBatches, length_beside_all
from cacheroute.engine.open_files import OpenFiles
from cacheroute.errors import CacherouteError
from cacheroute.install import patched_llama_cpp
from cacheroute.install.machine import cores
from cacheroute.model import catalogue, context_memory, experts, gguf_file, memory_plan
from cacheroute.routing import budget as budgets
from cacheroute.routing import eviction as evictions
from cacheroute.routing import strategies
from cacheroute.routing.budget import Budget
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.trace.forced_scores import ForcedScores
from cacheroute.trace.task_profile import TaskProfile

_llama_cpp = patched_llama_cpp.module()
_SETTLE_SECONDS = 10.0  # at most, that another budget takes to be kept
_LAZY_MODE_OFF, _LAZY_MODE_EXPERTS = 0, 3  # patches/0002-lazy-experts.patch


class Llama(ComputingLlama):
    """`llama_cpp.Llama` whose routed experts stay in the file, at most `budget` of them in memory.

    Args:
        model_path: a GGUF file (of a split one, the first shard), or the name of a model that is on this disk, as -m takes it:
            "demo", "qwen3-30b-a3b", "hf:OWNER/REPO:FILE". Nothing is downloaded.
        budget: "auto": as many experts as the free memory has room for, fewer while other programs need it; "50%", 0.5 or 30 (of
            the experts of each layer), "2GiB" (all layers together), "all"; None: half of the experts, or K where that is more.
            Bytes are those in memory, whole pages. A budget of all experts loads the model as llama.cpp does, repacked for its
            kernels, unless `io` says otherwise; configure() can then give it no smaller one.
        budget_changed: with "auto", called with the new Budget when it has changed, from another thread. Also an attribute.
        routing: "original", "cache-prior:lambda=0.2", ... (`cacheroute routing`); "tuned": what `cacheroute tune` has found for
            this model and budget, or with "auto" for the largest budget that fits; None leaves the hook unset: experts are
            mapped and left to the kernel, or loaded, and no budget is kept.
        eviction: "lru", "lfu", "score" or "soft-lfu".
        io: how misses are read; "direct" (past the page cache, where the filesystem can), "buffered" (through it), "load" (all
            experts are read when the model is loaded, and there are no misses), "auto" ("load" for a budget of all experts
            without `flash_mbps` and `prefetch`, else "direct", or "buffered" where that is faster, measured once for each
            filesystem), "none" (misses are counted, memory is left to the kernel: scores and counts are the same, sooner, where
            the model fits).
        flash_mbps: paces reads to a flash of that many MB (10^6 bytes) per second.
        n_ubatch, n_batch: tokens of a prompt that are computed together; None: as many as the memory beside the budget allows, as
            each pass over the layers reads their experts again; with io "load" at most 512.
        read_ahead: while a layer computes on a prompt, the experts that the next one will surely need are read. They take memory
            beside the budget, at most those of one layer; what is chosen stays the same.
        prefetch: while a layer computes on a decoded token, up to so many experts are read that the next layer would miss if its
            router were given this layer's hidden state. They take memory beside the budget; what is chosen stays the same.
        prompt_progress: called with a PromptProgress (engine/progress.py) twice a second while a prompt is computed, from another
            thread; what it raises is raised when the prompt has been computed. Also an attribute; a pickled model has none.
        prompt_routing: how the experts of prompts are chosen: "original", "keep:cover=0.9", which reads fewer of them and is
            lossy (`cacheroute routing`), or "tuned".
        flash_attn: True: of every token; False: never; None: of prompts, in passes of 64 tokens and more, where it is faster and
            takes less memory, while it decodes more slowly.
        Everything else: as llama_cpp.Llama.

    Policies act on decoded tokens; prompts are routed by `prompt_routing`. generate() and everything above it know which is
    which; tokens given to eval() directly are prompt, except within `decoding()`.

    Routing state belongs to a sequence, and reset() starts from an empty cache. With a lossy routing of either kind a generate()
    continues after the evaluated tokens, or where an earlier prompt ended (the last 8 are known), with the routing state that was
    there, and else starts from an empty cache, so that the same prompts in the same order give the same answers; with `original`
    a prompt that shares a prefix with the evaluated tokens keeps the cache, whose state changes no logits. save_prompt() and
    load_prompt() keep an evaluated prompt in a file. save_state() and load_state(), and with them set_cache(), carry the routing
    state; a state of other settings, or one that was pickled, starts from an empty cache.

    A process that is forked from one with a loaded model may leave it alone, and end; it cannot compute with it.

    Raises UsageError for a model that is not here and arguments that do not exist or do not fit it, CacherouteError when it
    cannot be loaded.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        budget: str | float | None = budgets.AUTO,
        routing: str | strategies.Routing | None = "original",
        eviction: str = evictions.DEFAULT,
        io: str = "auto",
        flash_mbps: float | None = None,
        prefetch: int = 0,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        read_ahead: bool = True,
        prompt_progress: progress.PromptCallback | None = None,
        prompt_routing: str | PromptRouting = "original",
        budget_changed: Callable[[Budget], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.prompt_progress, self.budget_changed = prompt_progress, budget_changed
        self.template_error = ""  # why the file's chat template cannot be parsed; the setter of `metadata` sets it
        self._loading: load_progress.Loading | None = None  # the setter of `model_params` sets it
        self._hook: Hook | None = None
        self._watch: MemoryWatch | None = None
        self.computing = False
        self.computed_at = 0.0  # time.monotonic() when the last batch began or ended
        self._closed = False
        self._task: TaskProfile | None = None
        self.forced: ForcedScores | None = None  # force() sets it
        self._decoding = False
        self._lock = threading.RLock()  # held by the thread that computes
        self._inside = 0  # how many calls of that thread are under way within each other
        self._settling = False  # set_capacity() holds it for a moment
        self._untouched = False
        self._new_sequence()
        self._trace_sink: Callable[[bytes], None] | None = None
        self._stack = contextlib.ExitStack()  # close() works on a half-made object
        self._flash_mbps = flash_mbps
        self._owner = os.getpid()
        arguments.check_names(kwargs, Llama, _llama_cpp.Llama)
        arguments.check(kwargs | {"n_batch": n_batch, "n_ubatch": n_ubatch})
        kwargs = {name: value for name, value in kwargs.items() if name not in arguments.OWN}
        asked = Asked(budget, routing, eviction, io, prefetch, prompt_routing)
        arguments.check_types(model_path=model_path, **vars(asked))
        arguments.check_types(prompt_progress=prompt_progress, budget_changed=budget_changed)
        # a file comes before a model of the same name: this has always taken paths
        path = Path(model_path) if os.path.isfile(model_path) else catalogue.resolve(os.fspath(model_path))
        header = gguf_file.read(path)
        self.header, self.layout = header, arguments.overridden(experts.layout(header), kwargs.get("kv_overrides"))
        arguments.check_pace(flash_mbps)
        paced = flash_mbps is not None
        n_ctx = kwargs.get("n_ctx", 512)
        flash_attn = FlashAttention.of(kwargs.get("flash_attn"), kwargs.get("type_k"), kwargs.get("type_v"))
        plan = None
        if asked.follows_memory:
            whole = io in (stores.AUTO, stores.LOAD) and not paced and not prefetch
            plan = memory_plan.of(header, self.layout, n_ctx=n_ctx, flash_attn=bool(flash_attn), whole=whole)
        automatic = budgets.automatic(plan, self.layout) if plan else None
        settings = Settings.of(self.layout, choice.resolve(self.layout, automatic, asked), paced=paced)
        self._loaded = settings.io == stores.LOAD
        if self._loaded or settings.io != "none":
            capacity = self.layout.n_expert if self._loaded else settings.budget.capacity if settings.routing else 0
            prompts = flash_attn.computes(context_memory.ROOM)
            memory_plan.check_budget(header, self.layout, n_ctx, capacity, flash_attn=prompts, whole=self._loaded)
        given = [n for n in (n_ubatch, n_batch) if n]
        all_outputs = bool(kwargs.get("logits_all") or kwargs.get("draft_model"))
        most = None
        if kwargs.get("embedding"):  # llama.cpp takes n_batch for the number of sequences, too
            given = given or [UPSTREAM]
        elif self._loaded and not given:
            most = length_beside_all(header, self.layout, n_ctx, flash_attn=flash_attn, all_outputs=all_outputs)
        self._read_ahead = read_ahead
        self._batches = MicroBatches(
            header,
            self.layout,
            n_ctx=n_ctx,
            flash_attn=flash_attn,
            all_outputs=all_outputs,
            length=min(given, default=None),
            most=most,
        )
        kwargs |= {"n_ubatch": self._batches.ceiling, "n_batch": n_batch or max(UPSTREAM if given else 0, self._batches.ceiling)}
        kwargs["flash_attn_type"] = flash_attn
        kwargs["lazy_mode"] = _LAZY_MODE_OFF if self._loaded else _LAZY_MODE_EXPERTS
        self._files = OpenFiles(self.layout.paths)
        refused: list[str] = []
        try:
            dense = () if self._loaded else self.layout.dense_ranges
            verbose = kwargs.get("verbose", True)
            with interrupts.put_off_in_c(), log.errors(verbose=verbose) as refused, self._files.fetched(dense):
                super().__init__(str(path), use_mmap=False, **kwargs)
        except ValueError as e:
            raise CacherouteError(f"llama.cpp cannot load {path}: {log.reason(refused) or e}.") from e
        finally:
            if self._loading:
                self._loading.end()
        if self.lora_path and not self._lora_adapter:  # upstream takes a null pointer for an adapter
            raise CacherouteError(
                f"llama.cpp cannot load the LoRA adapter {self.lora_path}: {log.reason(refused) or 'it is none'}."
            )
        self._embeddings = MappedEmbeddings(self.layout, self._model.model, loaded=self._loaded)
        self._has_chat_format = bool(kwargs.get("chat_format") or kwargs.get("chat_handler"))
        # llama.cpp rounds the context up; ids and scores have room for what was asked for
        self._n_ctx = len(self.input_ids) or super().n_ctx()
        if not self._logits_all:  # upstream has a row for each token of a batch, fills none, and copies all with a state
            self.scores = np.zeros((1, self.n_vocab()), np.single)
        self._interrupt = Interrupt()
        self._interrupt.attach(self._ctx.ctx)
        self._threads, self._n_threads_set = ComputeThreads(self.n_threads, cores()), self.n_threads
        # every path that computes ends in this call: eval(), embed(), draft models, whatever upstream adds
        self._compute = self._ctx.decode
        this = weakref.ref(self)  # a circle would keep a model that is dropped
        self._ctx.decode = lambda batch: this()._decode(batch)  # type: ignore[union-attr]
        self._apply(settings, asked, plan)

    @property
    def model_params(self) -> Any:
        """llama.cpp's parameters of the model; upstream's constructor sets them before it loads it."""
        return self._model_params

    @model_params.setter
    def model_params(self, value: Any) -> None:
        self._model_params, self._loading = value, load_progress.Loading(value, dots=self.verbose)

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
        chat_format or chat_handler was given, UsageError for a `response_format` that an answer cannot be kept to: upstream would
        take any JSON, or any text, instead."""
        if self.template_error and not self._has_chat_format:
            raise CacherouteError(f"The model's chat template cannot be used ({self.template_error}); give a chat_format.")
        grammar = json_schema.of_response_format(kwargs.get("response_format"))
        if grammar is not None:
            kwargs |= {"response_format": None, "grammar": _llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)}
        return super().create_chat_completion(*args, **kwargs)

    def n_ctx(self) -> int:
        """Tokens that a sequence may have."""
        return int(getattr(self, "_n_ctx", 0) or super().n_ctx())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it this thread computes. Raises CacherouteError when another one does."""
        self._check_usable()
        if not self._lock.acquire(blocking=False) and not (self._settling and self._lock.acquire(timeout=_SETTLE_SECONDS)):
            raise CacherouteError("The model is in use by another thread; let one use it at a time, or load it for each.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._lock.release()

    def interrupt(self, asked: bool = True) -> None:
        """Ends what another thread computes, within a layer, or what is computed next: there KeyboardInterrupt is raised, as
        after Ctrl-C, and no expert is left in memory. False: an interruption that has met no computation is called off.
        """
        if asked:
            self._interrupt.ask()
        else:
            self._interrupt.take()

    def _check_usable(self) -> None:
        if self._closed:
            raise CacherouteError("The model is closed; load it again.")
        if os.getpid() != self._owner:
            raise CacherouteError("The model was loaded before this process was forked; load it again here.")

    def close(self) -> None:
        """Frees the model. The hook goes first: it works on the model's mappings. May be called twice.

        Raises CacherouteError while another thread computes, and from code that is called by an answer.
        """
        if not self._closed and os.getpid() == self._owner:
            with self._alone():
                if self.computing or self._inside > 1:  # a signal handler or a processor of the thread that computes
                    raise CacherouteError("The model computes; close it when that has ended.")
                self._closed = True
        self._closed = True
        if self._watch:
            self._watch.stop()
        if self._hook:
            context = getattr(self, "_ctx", None)
            self._hook.close(context.ctx if context else None)  # the garbage collector may have closed it first
            self._hook = None
        for part in ("_files", "_embeddings"):
            if hasattr(self, part):
                getattr(self, part).close()
        if os.getpid() == self._owner:
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        """As llama_cpp.Llama: what makes the same model again, settings as they were asked for included, the sequence not."""
        self._check_usable()
        state = {k: v for k, v in super().__getstate__().items() if k not in arguments.OWN}
        own = vars(self.asked) | {"flash_mbps": self._flash_mbps, "read_ahead": self._read_ahead}
        own["flash_attn"] = FlashAttention(self.context_params.flash_attn_type).asked  # upstream knows no third kind
        as_memory_allows = {} if self._batches.fixed else {"n_batch": None, "n_ubatch": None}
        return state | own | as_memory_allows

    def tokenize(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.tokenize."""
        self._check_usable()
        return super().tokenize(*args, **kwargs)

    def detokenize(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.detokenize."""
        self._check_usable()
        return super().detokenize(*args, **kwargs)

    def tokenizer(self) -> Any:
        """As llama_cpp.Llama.tokenizer."""
        self._check_usable()
        return super().tokenizer()

    def pooling_type(self) -> Any:
        """As llama_cpp.Llama.pooling_type."""
        self._check_usable()
        return super().pooling_type()
