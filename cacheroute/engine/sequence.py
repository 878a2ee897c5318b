"""The sequence of a loaded model: what of it is evaluated, going back in it, and keeping it in memory or in a file.

A prompt whose tokens are evaluated already is not evaluated again. With a lossless routing that holds for any common prefix,
since the cache changes no logits. With a lossy one the experts that run depend on the cache, so a prompt continues only where the
state of the cache is known: after all evaluated tokens, or at a point, which is kept at the end of each prompt with its logits.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from cacheroute.engine import log, prompt_cache
from cacheroute.engine.checkpoint import Checkpoint, Point, Points, load_sequence, n_shared, sample, save_sequence
from cacheroute.engine.prompt_cache import Kept
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import engine_build, patched_llama_cpp
from cacheroute.model import gguf_file
from cacheroute.routing import strategies

if TYPE_CHECKING:
    from cacheroute.engine.asked import Asked
    from cacheroute.engine.hook import Hook
    from cacheroute.model.experts import ExpertLayout
    from cacheroute.routing.budget import Budget
    from cacheroute.routing.prompt_routing import PromptRouting
    from cacheroute.trace.task_profile import TaskProfile

_llama_cpp = patched_llama_cpp.module()
F = TypeVar("F", bound=Callable[..., Any])
_KV_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 30: "bf16"}  # enum ggml_type
_CONTEXT = ("flash_attn_type", "swa_full", "rope_scaling_type", "rope_freq_base", "rope_freq_scale")
_YARN = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx")


def alone(method: F) -> F:
    """A method of a model that only the thread that computes may call; another one gets a CacherouteError."""

    @functools.wraps(method)
    def guarded(self: SequenceLlama, *args: Any, **kwargs: Any) -> Any:
        with self._alone():
            return method(self, *args, **kwargs)

    return cast(F, guarded)


class SequenceLlama(_llama_cpp.Llama):  # type: ignore[misc, name-defined]
    """The part of engine.llama.Llama that keeps and restores a sequence; that class has the rest."""

    layout: ExpertLayout
    budget: Budget
    routing: strategies.Routing | None
    eviction: str
    prompt_routing: PromptRouting
    _lossy: bool  # either routing is
    asked: Asked
    _configured: Budget  # before set_capacity() or the free memory has changed it
    _two_budgets: bool  # set_capacity() has come in the middle of the sequence
    _loaded: bool  # all experts are in memory, as llama.cpp loads them
    _hook: Hook | None
    _task: TaskProfile | None
    _untouched: bool  # no token since the last reset: resetting once more would read a warm cache twice
    _broken_off: bool  # the last batch did not end: its tokens have changed the routing state and are not in the sequence
    _generation: object  # of the generate() that began last, None where the sequence is another since
    _points: Points
    _logits: bytes | None  # of the token that follows, where the sequence is at a point and llama.cpp has those of another token

    def _check_usable(self) -> None:
        raise NotImplementedError

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    def _new_sequence(self) -> None:
        """The KV cache holds other tokens, or another hook acts: no point is left, and no answer can go on."""
        self._generation = None
        self._points, self._logits, self._broken_off, self._two_budgets = Points(), None, False, False

    def _tokens(self) -> list[int]:
        return [int(t) for t in self.input_ids[: self.n_tokens]]

    @alone
    def reset(self) -> None:
        """Forgets the sequence and, with it, which experts are resident."""
        self._check_usable()
        super().reset()
        self._logits, self._broken_off, self._two_budgets = None, False, False
        if self._hook and not self._untouched:
            self._hook.reset()
            self._warm()

    @alone
    def rewind(self, n: int = 0) -> None:
        """Clears the tokens from the n-th on; experts stay in memory. A recurrent model cannot be cut back: n is 0 there."""
        super().reset()
        self.n_tokens, self._logits = n, None

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.sample. Raises CacherouteError where a grammar leaves no token: llama.cpp would end the process."""
        self._check_usable()
        if not self.n_tokens:
            raise UsageError("There is no token to go on from: give a prompt that is not empty.")
        if self._logits is None and not kwargs.get("grammar"):
            return super().sample(*args, **kwargs)
        idx = kwargs.pop("idx", None)
        logits = self._logits
        if logits is None:
            row = self._ctx.get_logits_ith(-1 if idx is None else idx - self.n_tokens)
            logits = ctypes.string_at(row, 4 * self.n_vocab())
        return sample(self._sampler or self._init_sampler(*args, **kwargs), logits)

    def next_logits(self) -> npt.NDArray[np.float32]:
        """Those by which the token after the evaluated ones is sampled, [n_vocab], before any bias or penalty; a copy."""
        self._check_usable()
        if self._logits is not None:
            return np.frombuffer(self._logits, np.float32)
        return np.array(np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), (self.n_vocab(),)), np.float32)

    @alone
    def checkpoint(self, *, sequence: bool = False) -> Checkpoint:
        """Keeps the routing state, for return_to(); with `sequence` also the model's, so that it outlives this sequence."""
        self._check_usable()
        state = bytes(save_sequence(self._ctx.ctx)) if sequence else None
        return Checkpoint(self._hook, self._tokens(), state, self._capacity(), two_budgets=self._two_budgets)

    def state_bytes(self) -> int:
        """Of what checkpoint(sequence=True) keeps of the model now, without the routing state."""
        self._check_usable()
        return int(_llama_cpp.llama_cpp.llama_state_seq_get_size(self._ctx.ctx, 0))

    def _capacity(self) -> int | None:
        """Of the caches, None without."""
        return self.budget.capacity if self._hook else None

    @property
    def automatic(self) -> bool:
        """The budget follows the free memory."""
        return self.asked.follows_memory

    def _is_of_this_budget(self, mark: Checkpoint) -> bool:
        """Also where the budget follows the free memory, and may have been another."""
        return self.automatic or mark.capacity in (None, self._capacity())

    @alone
    def return_to(self, mark: Checkpoint) -> None:
        """Continues after the tokens of a checkpoint of the same budget and eviction; the routing may be another. Counters go on.
        A budget that follows the free memory may have changed: then the least wanted experts leave.

        Without its `sequence`, those tokens must still be the first ones here, and the model must not be recurrent: its state
        cannot be cut back. Not for a policy in Python, which keeps its own state. Raises CacherouteError for what does not fit.
        """
        self._check_usable()
        if not self._is_of_this_budget(mark) or not mark.fits(self._hook):
            raise CacherouteError("A checkpoint fits the budget and the eviction that it was taken with.")
        self._untouched, self._logits, self._broken_off = False, None, False
        if mark.sequence is not None:
            self._new_sequence()
            load_sequence(self._ctx.ctx, mark.sequence)
            self.input_ids[: len(mark.tokens)] = mark.tokens
        self._two_budgets = mark.two_budgets
        self.n_tokens = len(mark.tokens)
        self._requires_eval = True

    @alone
    def save_state(self) -> Any:
        """As llama_cpp.Llama.save_state, with the routing state."""
        self._check_usable()
        state = super().save_state()
        state.routing = self.checkpoint()
        return state

    @alone
    def load_state(self, state: Any) -> None:
        """As llama_cpp.Llama.load_state; a state without routing state, or of another budget or eviction, starts from an empty
        cache."""
        self._check_usable()
        self._new_sequence()
        if not self._logits_all:  # the rows of another class, which holds more of them
            state = copy.copy(state)
            state.scores = state.scores[: len(self.scores)]
        super().load_state(state)
        mark = getattr(state, "routing", None)
        self._two_budgets = bool(mark and mark.two_budgets)
        self._untouched = False
        if self._hook and not (mark and mark.fits(self._hook)):
            self._hook.reset()

    @alone
    def load_experts(self, layer: int, ids: Sequence[int]) -> None:
        """Brings experts of a layer (by its place in `layout`) into memory; they count as used, the last as the most recent."""
        if self._hook:
            self._untouched = False
            self._hook.warm(layer, ids)

    @alone
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

    # ---- a prompt of which something may be evaluated already

    def _begin_prompt(self, tokens: list[int]) -> None:
        """Before generate() of these tokens: goes to where they can be continued, or resets. llama_cpp.Llama then cuts the rest
        off, also where a lossless routing shares more than a point."""
        if self._hook and self._hook.failed:
            return self.reset()
        n, lossy, can_cut = self.n_tokens, self._lossy, self._can_cut()
        shared = n_shared(self.input_ids[:n], tokens)
        known = not self._broken_off or (can_cut and not lossy)  # the state after the n tokens
        live = not self._requires_eval or self._logits is not None
        if n == 0 or (known and shared == n and (n < len(tokens) or live)):
            return
        point = None if self.routing and self.routing.policy else self._points.best(shared)
        if point is not None and ((point.n < n and not can_cut) or (lossy and not self._is_of_this_budget(point.mark))):
            point = None
        whole = point is not None and point.n == len(tokens) and bool(point.logits)
        if point is not None and (lossy or whole):
            self._go_to(point, routing=lossy)
        elif not known or (shared < n and (lossy or not can_cut)):
            self.reset()

    def _go_to(self, point: Point, *, routing: bool) -> None:
        """With `routing` also the caches go back; without, those of a lossless routing stay as they are."""
        if routing:
            if self._hook:
                self._hook.begin(point.n, decode=False)  # what is read to go there is no part of an answer
            self.return_to(point.mark)
        self.n_tokens = point.n
        self._logits = point.logits or None
        self._requires_eval = not point.logits

    def _keep_point(self) -> None:
        """After a prompt: makes this place a point, unless it is one, or a policy in Python has a state of its own."""
        if self._logits is not None or not self.n_tokens or (self.routing and self.routing.policy):
            return
        at = None if self._requires_eval else self._ctx.get_logits_ith(-1)
        logits = ctypes.string_at(at, 4 * self.n_vocab()) if at else b""
        self._points.add(Point(self.checkpoint(), logits))

    def _can_cut(self) -> bool:
        """Whether the last tokens can be taken out of the KV cache: not from a recurrent state, nor where a window has passed."""
        api = _llama_cpp.llama_cpp
        recurrent = bool(self._is_recurrent or self._is_hybrid)
        return not recurrent and api.llama_memory_seq_pos_min(api.llama_get_memory(self._ctx.ctx), 0) <= 0

    # ---- in a file

    def save_prompt(self, path: str | os.PathLike[str]) -> None:
        """Keeps the evaluated tokens in a file: their KV cache, and the routing state and logits at the end of each prompt.

        The file is written beside its place and renamed. Raises UsageError where a file is that is not a prompt cache, for a
        policy in Python, when nothing is evaluated, and when a lossy sequence has had two budgets; CacherouteError when the file
        cannot be written.
        """
        with self._alone():
            settings = self._settings()
            if not self.n_tokens:
                raise UsageError("There is no evaluated prompt to keep.")
            if self._two_budgets and "budget" in settings:
                raise UsageError(
                    "The budget has changed since this sequence began, and a lossy one is of one budget: reset it first."
                )
            self._keep_point()
            points = [(p.n, p.mark.routing_bytes(), p.logits) for p in self._points if p.n <= self.n_tokens]
            prompt_cache.write(Path(path), Kept(self._tokens(), points, save_sequence(self._ctx.ctx)), settings)

    def load_prompt(self, path: str | os.PathLike[str]) -> list[int]:
        """Continues after the tokens that save_prompt() has kept, in place of the sequence, and returns them: generate() of a
        prompt that begins with them evaluates only the rest.

        With a lossless routing any common prefix is used. With a lossy one a prompt that parts from them continues at the last
        point that both have, and is evaluated whole where there is none: the answer is that of a run without the file.

        Raises UsageError for a file that is not a prompt cache, is damaged, does not fit the context, or was made with another
        model, engine or setting.
        """
        with self._alone():
            if self._logits_all:
                raise UsageError("A prompt cache has no scores of each token; load the model without logits_all.")
            file = Path(path)
            kept = prompt_cache.read(file, self._settings())
            if len(kept.tokens) > self.n_ctx():
                raise UsageError(
                    f"{file} keeps {len(kept.tokens)} tokens, which do not fit the context of {self.n_ctx()}; "
                    "give a larger one (-c, n_ctx=), or name another file."
                )
            self._untouched = False
            self.reset()
            self._new_sequence()
            try:
                self._restore(kept)
            except (CacherouteError, ValueError) as e:
                _llama_cpp.llama_cpp.llama_memory_clear(_llama_cpp.llama_cpp.llama_get_memory(self._ctx.ctx), True)
                self._new_sequence()
                self._untouched = False
                self.reset()
                raise UsageError(f"{file} is a damaged prompt cache ({str(e).rstrip('.')}); remove it.") from None
            return kept.tokens

    def _restore(self, kept: Kept) -> None:
        """Raises CacherouteError or ValueError for what cannot be."""
        n, vocabulary = len(kept.tokens), self.n_vocab()
        if not n or not all(0 <= t < vocabulary for t in kept.tokens):
            raise ValueError("its tokens are none of this model")
        if [p for p, _, _ in kept.points][-1:] != [n] or not all(0 < p <= n for p, _, _ in kept.points):
            raise ValueError("it has no state after its last token")
        points = Points()
        for at, routing, logits in kept.points:
            if len(logits) not in (0, 4 * vocabulary):
                raise ValueError("its logits are none of this model")
            points.add(Point(Checkpoint.of_bytes(kept.tokens[:at], bytes(routing)), bytes(logits)))
        api = _llama_cpp.llama_cpp
        memory = api.llama_get_memory(self._ctx.ctx)
        api.llama_memory_clear(memory, True)
        with log.errors(verbose=False):
            load_sequence(self._ctx.ctx, kept.sequence)
        if api.llama_memory_seq_pos_max(memory, 0) != n - 1 or api.llama_memory_seq_pos_min(memory, 0) < 0:
            raise ValueError("the places of its tokens are not those of a sequence")
        self.input_ids[:n] = kept.tokens
        self._points = points
        last = points.best(n)
        assert last
        self._go_to(last, routing=True)

    def _settings(self) -> prompt_cache.Settings:
        """What a kept prompt depends on, by the names that a person knows it by."""
        if self.routing and self.routing.policy:
            raise UsageError(f"A prompt cache cannot keep the state of {self.routing}: a policy in Python has its own.")
        p = self.context_params
        configured, now = self._configured.capacity, self.budget.capacity
        own = strategies.capacities(self.routing, self._configured, self.layout)
        layers = "" if set(own) == {configured} else f" (layers {_short(own if now == configured else (own, configured))})"
        context = [f"{name}={getattr(p, name):g}" for name in (*_CONTEXT, *_YARN)]
        return {
            "model": f"{self.layout.model or self.layout.paths[0].name} ({self._fingerprint})",
            "engine": engine_build.LOCAL_VERSION,
            "experts": self._repacked(),  # other last bits
            "eviction": self.eviction if self.routing else "none",
            "routing": _name(self.routing),
            "prompt routing": str(self.prompt_routing),
            "type of the KV cache": f"{_KV_TYPES.get(p.type_k, p.type_k)}/{_KV_TYPES.get(p.type_v, p.type_v)}",
            "context": ",".join(context),
            "adapter": f"{self.lora_path}, {self.lora_scale:g}" if self.lora_path else "none",
            "metadata": ",".join(f"{name}={value}" for name, value in sorted((self.kv_overrides or {}).items())) or "none",
            "warm start": _short(self._task) if self._task else "none",
            # a state of another budget is cut to this one; where the cache changes the choice, so would that
            **({"budget": f"{now}{layers}"} if self._lossy and not self.automatic else {}),
        }

    def _repacked(self) -> str:
        """Which weights llama.cpp may have put in the order of its kernels, by what decides it."""
        if not self.model_params.use_extra_bufts:
            return "read as they are"
        return "loaded with the model (--budget all)" if self._loaded else "left in the file (a smaller --budget)"

    @functools.cached_property
    def _fingerprint(self) -> str:
        return gguf_file.content_fingerprint(self.layout.paths[0])


def _name(routing: strategies.Routing | None) -> str:
    if routing is None or not routing.layers:
        return str(routing).lower() if routing is None else str(routing)
    return f"{routing.name} tuned as {_short([(r.name, r.parameters) for r in routing.layers])}"


def _short(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
