"""The settings of a loaded model, which may change while it is loaded: budget, routing, eviction, reading; and its counters."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cacheroute.engine import arguments, choice, stores
from cacheroute.engine.asked import Asked, Kept
from cacheroute.engine.hook import Hook, Interrupt, Settings
from cacheroute.engine.memory_watch import MemoryWatch
from cacheroute.engine.sequence import SequenceLlama, alone
from cacheroute.engine.stats import Stats
from cacheroute.errors import UsageError
from cacheroute.install.machine import available_memory
from cacheroute.model import memory_plan
from cacheroute.native.counters import Counters
from cacheroute.routing import budget as budgets
from cacheroute.routing import strategies
from cacheroute.routing.budget import Budget
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.trace.forced_scores import ForcedScores

if TYPE_CHECKING:
    from cacheroute.engine.open_files import OpenFiles
    from cacheroute.model.gguf_file import GgufFile
    from cacheroute.model.memory_plan import MemoryPlan


class ConfiguredLlama(SequenceLlama):
    """The part of engine.llama.Llama that sets how experts are kept and chosen; that class has the rest."""

    header: GgufFile
    io: str
    prefetch: int
    forced: ForcedScores | None
    budget_changed: Callable[[Budget], None] | None
    _flash_mbps: float | None
    _interrupt: Interrupt
    _files: OpenFiles
    _watch: MemoryWatch | None
    _lock: threading.RLock
    _settling: bool
    computing: bool
    _trace_sink: Callable[[bytes], None] | None

    @alone
    def configure(
        self,
        *,
        budget: str | float | Kept | None = Kept.KEPT,
        routing: str | strategies.Routing | Kept | None = Kept.KEPT,
        eviction: str | Kept = Kept.KEPT,
        io: str | Kept = Kept.KEPT,
        prefetch: int | Kept = Kept.KEPT,
        prompt_routing: str | PromptRouting | Kept = Kept.KEPT,
    ) -> None:
        """Changes settings of a loaded model, and keeps those that are not given, as they were asked for: a budget of "auto" or
        a routing of "tuned" is worked out anew. No expert is resident, the sequence is forgotten, counters start at 0.

        How it was loaded stays: with all experts in memory (io "load"), it can have no smaller budget; with its experts in the
        file, a budget of all leaves them there, not repacked. Raises UsageError for anything else.
        When it fails, nothing has changed but that experts may have left memory.
        """
        self.configure_as(
            self.asked.but(
                budget=budget, routing=routing, eviction=eviction, io=io, prefetch=prefetch, prompt_routing=prompt_routing
            )
        )

    @alone
    def configure_as(self, asked: Asked) -> None:
        """As configure() with every setting given."""
        self._check_usable()
        arguments.check_types(**vars(asked))
        own = {"paced": self._flash_mbps is not None, "loaded": self._loaded}
        plan = None
        automatic: str | int | None = None
        if self._loaded and budgets.is_auto(asked.budget):
            automatic = "all"
        elif asked.follows_memory:
            free = available_memory(ulimits=False)
            more = None if free is None else free + self.resident_bytes
            flash_attn = bool(self.context_params.flash_attn_type)
            plan = memory_plan.of(
                self.header, self.layout, n_ctx=self._n_ctx, flash_attn=flash_attn, loaded=True, whole=False, free=more
            )
            automatic = budgets.automatic(plan, self.layout)
        settings = Settings.of(self.layout, choice.resolve(self.layout, automatic, asked), **own)
        if settings.routing and settings.io not in ("none", "load"):
            memory_plan.check_more(self.layout, settings.budget.nbytes, self.resident_bytes)
        self._apply(settings, asked, plan)
        super().reset()
        self._warm()

    def set_capacity(self, capacity: int) -> None:
        """Until configure() the budget is so many experts of each layer, and the sequence goes on: a lossless answer is the same.

        What is above leaves before the next layer chooses, or at once where nothing computes. Any thread. Raises UsageError for
        fewer than K or more than E, and for a model that is loaded with all of its experts.
        """
        self._check_usable()
        arguments.check_types(capacity=capacity)
        if self._loaded:
            raise UsageError("This model was loaded with all of its experts in memory; its budget cannot change.")
        if not self.layout.n_used <= capacity <= self.layout.n_expert:
            raise UsageError(f"{capacity} experts of a layer are not within {self.layout.n_used} and {self.layout.n_expert}.")
        if capacity != self.budget.capacity and (self.n_tokens or self.computing):
            self._two_budgets = True
        self.budget = Budget(capacity, capacity * self.layout.resident_bytes)
        self._settling = True
        idle = self._lock.acquire(blocking=False)
        try:
            if self._hook:  # a signal handler of the thread that computes has the lock, too
                self._hook.set_capacity(capacity, at_once=idle and not self.computing)
        finally:
            if idle:
                self._lock.release()
            self._settling = False
        if self.budget_changed:
            self.budget_changed(self.budget)

    def _apply(self, settings: Settings, asked: Asked, plan: MemoryPlan | None) -> None:
        """Makes the new hook before the old one goes. `settings`: what `asked` comes to. `plan`: of a budget that changes with
        the free memory, None: it stays."""
        hook = Hook(self.layout, settings, self._model.model, self.forced, self._files.paths) if settings.routing else None
        if hook:
            hook.attach(self._ctx.ctx, self._interrupt)
            hook.set_pace(self._flash_mbps)
        if self._watch:
            self._watch.stop()
            self._watch = None
        if self._hook:
            self._hook.close(None if hook else self._ctx.ctx)
        self._hook = hook
        self._new_sequence()
        self.budget, self.routing, self.eviction = settings.budget, settings.routing, settings.eviction
        self.io, self.prefetch = hook.io if hook else settings.io, settings.prefetch
        self.prompt_routing, self._lossy = settings.prompt_routing, settings.lossy
        self._configured = settings.budget
        self.asked = asked
        if plan and hook and self.io not in (stores.NONE, stores.LOAD):
            self._watch = MemoryWatch(self, plan)

    @property
    def flash_mbps(self) -> float | None:
        """The pace of reads in MB/s, None for as fast as the device goes."""
        return self._flash_mbps

    @flash_mbps.setter
    def flash_mbps(self, value: float | None) -> None:
        arguments.check_pace(value)
        if self._loaded and value is not None:
            raise UsageError("All experts of this model are in memory, so there are no reads to pace.")
        self._flash_mbps = value
        if self._hook:
            self._hook.set_pace(value)

    @alone
    def force(self, scores: ForcedScores | None) -> None:
        """From now on layers rank these scores, a row for each token of a sequence, instead of the model's; None: the model's.

        The generated text is then meaningless; gate weights stay the model's. Resets what configure() resets. Raises UsageError
        for scores of another E or number of layers; eval() raises CacherouteError for a token that they do not have.
        """
        layout = self.layout
        arguments.check_types(scores=scores)
        if scores and (len(scores.z), scores.z[0].shape[1]) != (len(layout.layers), layout.n_expert):
            raise UsageError(f"{scores.name} does not fit {len(layout.layers)} layers of {layout.n_expert} experts.")
        self.forced = scores
        self.configure()

    @contextlib.contextmanager
    def tracing(self, sink: Callable[[bytes], None]) -> Iterator[None]:
        """Within it `sink` is given the records (trace/trace_file.py) of every token, after each batch; starts a new sequence."""
        if self._hook is None:
            raise UsageError("There is nothing to trace without a routing.")
        with self._alone():
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

    def stats(self) -> Stats:
        """Counters since the model was loaded or configured."""
        return Stats.of(self)

    def decoded_by_layer(self) -> list[Counters]:
        """Counters of the decoded tokens, one per MoE layer; reads are not counted by layer."""
        return [self._hook.counters(i, prefill=False) for i in range(len(self.layout.layers))] if self._hook else []

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in memory: as the store counts them, whole pages, or with io "load" all of the file's."""
        if self._loaded:
            return self.layout.all_expert_bytes
        return self._hook.resident_bytes if self._hook else 0

    def measure_resident(self) -> int | None:
        """Bytes of experts in memory as the kernel says (mincore), whole pages, of slots and of the file alike (of slots alone
        where the file belongs to another user); None without mincore, and where experts were loaded with the model."""
        return self._hook.measure_resident() if self._hook and not self._loaded else None
