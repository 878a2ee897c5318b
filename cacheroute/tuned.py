"""Where `tune` leaves its routing profiles, and how `--routing tuned` finds them: one for each model and budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cacheroute import budget as budgets
from cacheroute import experts, gguf_file
from cacheroute import profile as profiles
from cacheroute.build_tools import cache_dir
from cacheroute.errors import UsageError
from cacheroute.evals.loading import fingerprint

NAME = "tuned"


@dataclass(frozen=True)
class Tuned:
    """What to give as `routing` and `eviction`: a profile holds for the eviction that it was tuned with."""

    routing: str
    eviction: str


def path(model: Path, capacity: int) -> Path:
    """The profile of a model file and a budget of so many experts per layer, whether it is there or not."""
    return cache_dir() / "tuned" / f"{fingerprint(model)}-{capacity}.json"


def find(model: Path, budget: str | int) -> Tuned:
    """Raises UsageError when nothing was tuned for this model and budget."""
    layout = experts.layout(gguf_file.read(model))
    file = path(model, budgets.parse(budget, layout).capacity)
    if not file.exists():
        name = layout.model or model.name
        raise UsageError(f"Nothing is tuned for {name} at a budget of {budget}; run `cacheroute tune --budget {budget}` first.")
    return Tuned(f"profile:{file}", str(profiles.load(file).notes.get("eviction", "lru")))


def resolve(model: Path, budget: str | int, routing: str, eviction: str) -> tuple[str, str]:
    """(routing, eviction) as they are, or the tuned ones where `routing` is "tuned": those belong together."""
    if routing != NAME:
        return routing, eviction
    found = find(model, budget)
    return found.routing, found.eviction
