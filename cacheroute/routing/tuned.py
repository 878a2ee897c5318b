"""A tuned routing: one strategy with its own parameters for each layer of one model, in a file that `tune` writes.

`--routing tuned:PATH` names the file, `--routing tuned` finds the one of this model and budget: in the cache folder, or for the
demo model in the package.

The file is JSON:

    {
      "format": "cacheroute-routing-profile",
      "version": 1,
      "model": "cacheroute-demo",                  general.name of the GGUF; "" fits any name
      "architecture": "granitemoe",
      "n_expert": 32,                              E
      "n_used": 8,                                 K
      "layers": [0, 1, 2],                         llama.cpp's numbers of the layers that have experts
      "strategy": "cache-prior",                   a name of `cacheroute routing`
      "parameters": [{"lambda": 0.1}, {"lambda": 0.4, "j": 2, "experts": 12}, {"lambda": 0, "experts": 20}],    one of each layer
      "notes": {}                                  how it was made: eviction, budget, text, result on held-out text
    }

`experts`: how many of a layer's are in memory, in place of the budget's number; all layers together keep within the budget.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import DEMO_TUNED, cache_dir, read_json, short_routing, write_json
from cacheroute.model import catalogue, experts, gguf_file
from cacheroute.routing import budget as budgets

NAME = "tuned"
FORMAT, VERSION = "cacheroute-routing-profile", 1
DEMO = DEMO_TUNED
short = short_routing


@dataclass(frozen=True)
class TunedRouting:
    """`parameters[i]` are those of the MoE layer `layers[i]`, by the names that the grammar of routings has, and `experts`."""

    model: str
    architecture: str
    n_expert: int
    n_used: int
    layers: tuple[int, ...]
    strategy: str
    parameters: tuple[dict[str, float], ...]
    notes: dict[str, Any] = field(default_factory=dict)


def save(tuned: TunedRouting, path: Path, *, force: bool = False) -> None:
    """Writes the file whole or not at all. Raises UsageError when it exists and `force` is not given."""
    write_json(path, {"format": FORMAT, "version": VERSION, **asdict(tuned)}, force=force)


def load(path: Path) -> TunedRouting:
    """Raises UsageError for a file that is not a tuned routing of this version, or lacks parameters for a layer."""
    content = read_json(path, FORMAT, VERSION)
    try:
        tuned = TunedRouting(
            model=str(content["model"]),
            architecture=str(content["architecture"]),
            n_expert=int(content["n_expert"]),
            n_used=int(content["n_used"]),
            layers=tuple(int(i) for i in content["layers"]),
            strategy=str(content["strategy"]),
            parameters=tuple({str(k): float(v) for k, v in p.items()} for p in content["parameters"]),
            notes=dict(content.get("notes", {})),
        )
    except KeyError as e:
        raise UsageError(f"{path} is a tuned routing without {e}; make it again.") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UsageError(f"{path} is a tuned routing with a value that cannot be ({e}); make it again.") from None
    if not tuned.layers or len(tuned.parameters) != len(tuned.layers):
        raise UsageError(f"{path} has parameters for {len(tuned.parameters)} of {len(tuned.layers)} layers; make it again.")
    return tuned


def mass_past_k(model: Path) -> float | None:
    """The share of the router's mass past rank K, mean of the layers, as `tune` last measured it for any budget, if it has."""
    found = None
    files = [path(model, n) for n in capacities(model, routing=True)]
    for file in sorted((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime):
        with suppress(CacherouteError, TypeError, ValueError):  # a damaged one is reported where it is used
            past = load(file).notes.get("mass_past_k")
            found = sum(map(float, past)) / len(past) if past else found
    return found


@dataclass(frozen=True)
class Settings:
    """What to give as `routing` and `eviction`: a routing holds for the eviction that it was tuned with."""

    routing: str
    eviction: str


def path(model: Path, capacity: int) -> Path:
    """The file for a model file and a budget of so many experts per layer, whether it is there or not."""
    return cache_dir() / "tuned" / f"{gguf_file.fingerprint(model)}-{capacity}.json"


def capacities(model: Path, *, routing: bool) -> list[int]:
    """Experts of each layer in the budgets that something is tuned for: routings of decoded tokens, or else of prompts."""
    end = "" if routing else "-prompt"
    names = (cache_dir() / "tuned").glob(f"{gguf_file.fingerprint(model)}-*{end}.json")
    numbers = {name.stem.removesuffix(end).rpartition("-")[2] for name in names}
    notes = load(DEMO).notes
    own = [int(notes["budget"])] if routing and notes["fingerprint"] == gguf_file.fingerprint(model) else []
    return sorted({*own, *(int(n) for n in numbers if n.isdecimal())})


def find(model: Path, budget: str | float | None) -> Settings:
    """The user's own file, else the packaged one where it is of this model and budget. Raises UsageError when there is none."""
    layout = experts.layout(gguf_file.read(model))
    capacity = budgets.parse(budget, layout).capacity
    file = path(model, capacity)
    if not file.exists() and _is_for(DEMO, model, capacity):
        file = DEMO
    if not file.exists():
        name = layout.model or model.name
        if capacity == layout.n_expert:
            raise UsageError(f"Nothing is tuned for a budget of all: {name} misses nothing there; leave `tuned` out.")
        budget = budget or budgets.default_name(layout)
        command = f"cacheroute tune{catalogue.as_option(model)} --budget {budget}"
        raise UsageError(f"Nothing is tuned for {name} at a budget of {budget}; run `{command}` first.")
    return Settings(f"{NAME}:{file}", str(load(file).notes.get("eviction", "lru")))


def _is_for(file: Path, model: Path, capacity: int) -> bool:
    notes = load(file).notes
    return (notes["fingerprint"], notes["budget"]) == (gguf_file.fingerprint(model), capacity)


def resolve(model: Path, budget: str | float | None, routing: str, eviction: str) -> tuple[str, str]:
    """(routing, eviction) as given, or those of the tuned file where `routing` is "tuned"."""
    if routing != NAME:
        return routing, eviction
    found = find(model, budget)
    return found.routing, found.eviction
