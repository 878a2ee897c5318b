"""A routing profile: one strategy with its own parameters for each layer of one model. `--routing profile:PATH`.

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
      "notes": {}                                  anything; who made it, from what, at what price
    }

`experts`: how many of a layer's are in memory, in place of the budget's number; all layers together keep within the budget.

Knows no model but by its numbers, and no policy but by its name.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError, UsageError

FORMAT, VERSION = "cacheroute-routing-profile", 1


@dataclass(frozen=True)
class RoutingProfile:
    """`parameters[i]` are those of the MoE layer `layers[i]`, by the names that the grammar of routings has, and `experts`."""

    model: str
    architecture: str
    n_expert: int
    n_used: int
    layers: tuple[int, ...]
    strategy: str
    parameters: tuple[dict[str, float], ...]
    notes: dict[str, Any] = field(default_factory=dict)


def save(profile: RoutingProfile, path: Path, *, force: bool = False) -> None:
    """Writes the file in one piece. Raises UsageError when it exists and `force` is not given."""
    write_json(path, {"format": FORMAT, "version": VERSION, **asdict(profile)}, force=force)


def load(path: Path) -> RoutingProfile:
    """Raises UsageError with one sentence for what is no profile of this version, or has no parameters for some layer."""
    content = read_json(path, FORMAT, VERSION)
    try:
        profile = RoutingProfile(
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
        raise UsageError(f"{path} is a routing profile without {e}; make it again.") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise UsageError(f"{path} is a routing profile with a value that cannot be ({e}); make it again.") from None
    if not profile.layers or len(profile.parameters) != len(profile.layers):
        raise UsageError(f"{path} has parameters for {len(profile.parameters)} of {len(profile.layers)} layers; make it again.")
    return profile


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The object in a JSON file whose `format` is `kind`. Raises UsageError for any other file or version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror}).") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise UsageError(f"{path} is not a {kind} file.")
    if content.get("version") != version:
        raise UsageError(f"{path} is of version {content.get('version')}; this cacheroute reads version {version}.")
    return content


def write_json(path: Path, content: dict[str, Any], *, force: bool) -> None:
    """Writes a JSON file in one piece. Raises UsageError when it exists unless `force`, CacherouteError when it cannot."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force replaces it.")
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as f:
            try:
                json.dump(content, f, indent=1)
                f.write("\n")
            except BaseException:
                os.unlink(f.name)
                raise
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)
    except OSError as e:
        raise CacherouteError(f"{path} cannot be written ({e.strerror}).") from None
