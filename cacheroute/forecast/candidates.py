"""What there is to forecast for: one model file, or the whole catalogue and what is on this disk. Reads headers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.files import cache_dir
from cacheroute.forecast import workload
from cacheroute.forecast.forecast import Tuned
from cacheroute.forecast.workload import Workload
from cacheroute.model import catalogue, context_memory, experts, gguf_file, memory_plan
from cacheroute.model.catalogue import ModelEntry
from cacheroute.model.experts import ExpertLayout, NotRoutableError
from cacheroute.model.memory_plan import MemoryPlan
from cacheroute.routing import strategies, tuned

CONTEXT = 4096  # where a model of the catalogue that is not here is asked for the context that it was trained for


@dataclass(frozen=True)
class Candidate:
    """`name` is what -m takes, `nbytes` of the files; `path` and `layout` None for a model that is not here; `n_ctx`: tokens of
    context that the plan has room for."""

    name: str
    nbytes: int
    path: Path | None
    layout: ExpertLayout | None
    work: Workload
    plan: MemoryPlan
    n_ctx: int


def of_file(path: Path, *, name: str, n_ctx: int, free: int | None) -> Candidate:
    """Raises UsageError for a file that is no model with experts."""
    header = gguf_file.read(path)
    layout = experts.layout(header)
    n_ctx = n_ctx or context_memory.trained_context(header)
    plan = memory_plan.of(header, layout, n_ctx=n_ctx, free=free)
    return Candidate(name, header.nbytes, path, layout, workload.of_header(header, layout), plan, n_ctx)


def of_entry(entry: ModelEntry, *, n_ctx: int, free: int | None) -> Candidate:
    """Of a model that is not here, by the catalogue's numbers."""
    n_ctx = n_ctx or CONTEXT
    plan = memory_plan.of_entry(entry, n_ctx=n_ctx, free=free)
    return Candidate(entry.name, entry.nbytes, None, None, workload.of_entry(entry), plan, n_ctx)


def everything(*, n_ctx: int, free: int | None, say: Callable[[str], None]) -> Iterator[Candidate]:
    """The catalogue, then other models on this disk. `say` is told of files that cannot be used; those without experts are left
    out."""
    listed = set()
    for entry in catalogue.load_catalogue().values():
        path = catalogue.entry_path(entry)
        if path:
            listed.add(path.resolve())
            try:
                yield of_file(path, name=entry.name, n_ctx=n_ctx, free=free)
                continue
            except CacherouteError as e:
                say(f"{entry.name}: {e}")
        yield of_entry(entry, n_ctx=n_ctx, free=free)
    for model in (*catalogue.hub_models(), *catalogue.ollama_models(), *catalogue.lmstudio_models()):
        if model.path.resolve() in listed:
            continue
        try:
            yield of_file(model.path, name=model.name, n_ctx=n_ctx, free=free)
        except NotRoutableError:
            continue
        except CacherouteError as e:
            say(f"{model.name}: {e}")


def tuned_for(path: Path, capacity: int) -> Tuned | None:
    """What `tune` has found for a model at a budget. Cheap where it has found nothing."""
    try:
        own = any((cache_dir() / "tuned").glob(f"*-{capacity}.json"))
        if not own and tuned.load(tuned.DEMO).notes["budget"] != capacity:
            return None
        found = tuned.find(path, capacity)
        routing = strategies.parse(found.routing)
    except (CacherouteError, OSError):
        return None
    notes = routing.tuned.notes if routing.tuned else {}
    loss, kl = notes.get("max_ppl_increase"), notes.get("held_out_kl")
    return Tuned(
        routing,
        found.eviction,
        float(loss) if isinstance(loss, int | float) else None,
        _kl(kl) if notes.get("max_kl") is not None else None,
        str(notes.get("reference", "")),
    )


def _kl(notes: Any) -> tuple[float, float | None, float | None] | None:
    """(mean, low, high) of what `tune` has measured on text that took no part."""
    try:
        low, high = (None if notes[end] is None else float(notes[end]) for end in ("kl_low", "kl_high"))
        return float(notes["kl"]), low, high
    except (KeyError, TypeError, ValueError):
        return None
