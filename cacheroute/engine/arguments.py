"""Arguments of llama_cpp.Llama that are checked before llama.cpp has them: it would crash, or do something else."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

from cacheroute.errors import UsageError, did_you_mean
from cacheroute.model.experts import ExpertLayout
from cacheroute.routing.prompt_routing import PromptRouting
from cacheroute.routing.strategies import Routing
from cacheroute.trace.forced_scores import ForcedScores

OWN = ("use_mmap", "use_mlock", "lazy_mode")
"""What is mapped and what is read follows from budget and io; what stock has by default may be given all the same."""
_DEFAULTS = {"use_mmap": True, "use_mlock": False}
_PATCHED = ("lazy_mode", "use_extra_bufts")  # patches/0002-lazy-experts.patch takes them out of **kwargs
_GPU = {"n_gpu_layers": 0, "main_gpu": 0, "tensor_split": None}  # and what leaves everything on the CPU
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "model_path": ((str, os.PathLike), "a path or a name"),
    "budget": ((str, Real, type(None)), 'a text such as "50%", a number, or None'),
    "routing": ((str, Routing, type(None)), "a text, a Routing, or None"),
    "eviction": ((str,), "a text"),
    "io": ((str,), "a text"),
    "prefetch": ((Integral,), "a whole number"),
    "capacity": ((Integral,), "a whole number"),
    "scores": ((ForcedScores, type(None)), "ForcedScores or None"),
    "prompt_routing": ((str, PromptRouting), "a text or a PromptRouting"),
    "prompt_progress": ((Callable, type(None)), "a function or None"),  # type: ignore[dict-item]
    "budget_changed": ((Callable, type(None)), "a function or None"),  # type: ignore[dict-item]
}
_CACHE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "IQ4_NL": 20, "BF16": 30}
"""What keys and values may be kept in, by their numbers in ggml.h; others would end the process."""
_SIZES = {"n_ctx": 0, "n_batch": 1, "n_ubatch": 0, "n_threads": 0, "n_threads_batch": 0}  # and their least


def check_types(**given: object) -> None:
    """Raises UsageError for one of our own arguments that is of another type than it may be."""
    for name, value in given.items():
        types, what = _KINDS[name]
        if not isinstance(value, types) or isinstance(value, bool):
            raise UsageError(f"{name} is {what}, not {value!r}.")


def check_pace(value: object) -> None:
    """Raises UsageError for a `flash_mbps` that is no positive number, nor None."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")):
        return
    raise UsageError(f"flash_mbps is a number of MB/s above 0, or None for no pace, not {value!r}.")


@functools.cache
def _names(classes: tuple[type, ...]) -> frozenset[str]:
    parameters = [p for cls in classes for p in inspect.signature(cls).parameters.values()]
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD) | set(_PATCHED)


def check_names(arguments: Collection[str], *classes: type) -> None:
    """Raises UsageError for one that no constructor of the classes takes; llama_cpp.Llama would pass over it in silence."""
    known = _names(classes)
    for name in arguments:
        if name not in known:
            meant = did_you_mean(name, known, "help(cacheroute.Llama) and help(llama_cpp.Llama) list what there is.")
            raise UsageError(f"Llama has no argument {name!r}; {meant}")


def overridden(layout: ExpertLayout, kv_overrides: dict[str, Any] | None) -> ExpertLayout:
    """A layout of which `kv_overrides` changes the number of experts that a token uses.

    Raises UsageError where that is not within 1 and E, and for another E: the file has as many as it has.
    """
    given = kv_overrides or {}
    if f"{layout.architecture}.expert_count" in given:
        raise UsageError(
            f"kv_overrides cannot change {layout.architecture}.expert_count: the file has {layout.n_expert} experts."
        )
    name = f"{layout.architecture}.expert_used_count"
    n_used = given.get(name, layout.n_used)
    if not isinstance(n_used, Integral) or isinstance(n_used, bool) or not 1 <= int(n_used) <= layout.n_expert:
        raise UsageError(f"kv_overrides: {name} is a whole number from 1 to {layout.n_expert}, not {n_used!r}.")
    return dataclasses.replace(layout, n_used=int(n_used))


def check(arguments: dict[str, Any]) -> None:
    """Raises UsageError for one that is not for the caller, for what asks for a GPU, or a number that C cannot hold."""
    for name in OWN:
        if name in arguments and arguments[name] is not _DEFAULTS.get(name):
            raise UsageError(
                f"{name} is not for the caller to choose: what is mapped and what is read follows from budget and io."
            )
    for name, none in _GPU.items():
        if arguments.get(name, none) not in (none, None):
            raise UsageError(f"{name}={arguments[name]!r} asks for a GPU, and experts run on the CPU here: leave it out.")
    if arguments.get("vocab_only"):
        raise UsageError("vocab_only leaves out the experts, which are what is kept here: take llama_cpp.Llama for it.")
    for name in ("type_k", "type_v"):
        if arguments.get(name) not in (None, *_CACHE_TYPES.values()):
            known = ", ".join(f"{number} ({kind})" for kind, number in _CACHE_TYPES.items())
            raise UsageError(f"{name}={arguments[name]!r} is no type for keys and values: {known}.")
    for name, least in _SIZES.items():
        value = arguments.get(name)
        if value is not None and not (isinstance(value, Integral) and least <= int(value) < 2**31):
            raise UsageError(f"{name} is a whole number of at least {least} and below 2^31, not {value!r}.")
