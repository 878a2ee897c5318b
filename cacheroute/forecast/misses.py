"""How many of a token's experts will not be in memory.

From what this model was measured to miss, where `tune`, `frontier` or `eval perplexity` have scored it at this budget. Else from
a prior: the router and the cache themselves, run on scores as local as those of the demo model (trace/forced_scores.py) with
this model's E and K. Models differ, so a prior has a range.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from cacheroute.errors import CacherouteError
from cacheroute.files import cache_dir
from cacheroute.model import gguf_file
from cacheroute.routing import strategies
from cacheroute.routing.strategies import Routing
from cacheroute.trace import forced_scores, score_files, simulate

LOCALITIES: dict[str, dict[str, float]] = {
    "high": {"rho": 0.4, "skew": 0.6},
    "typical": {},
    "low": {"rho": 0.2, "skew": 0.2},
}
"""Parameters of synthetic scores: little is missed, as on the demo model, much. With the E and K of the four models of arXiv
2412.00099, LRU and half of the experts, they miss 18 to 30%, 32 to 38% and 40 to 43%; the paper measured 22 to 40%."""
_LAYERS, _SKIPPED, _TOKENS = 4, 128, 256
_LONGEST_FILE = 2**28
_OTHER_TEXT = (
    1.15  # between kinds of text the demo model's misses differ by about so much (scripts/LOG.md, "Experts of earlier runs")
)


@dataclass(frozen=True)
class MissRate:
    """A share of the chosen experts, and between what it probably is. `tokens` it was measured on; 0: it is a prior."""

    typical: float
    low: float
    high: float
    tokens: int = 0


def expected(n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str, model: Path | None = None) -> MissRate:
    """With `capacity` experts of each layer in memory. `model`: a file, whose scores may be in the cache folder."""
    share, tokens = typical(n_expert, n_used, capacity, routing, eviction, model)
    if capacity >= n_expert:
        return MissRate(0.0, 0.0, 0.0)
    if tokens:  # the text that comes is another one
        return MissRate(share, share / _OTHER_TEXT, min(share * _OTHER_TEXT, 1.0), tokens)
    low, high = (_simulated(n_expert, n_used, capacity, routing, eviction, name) for name in ("high", "low"))
    return MissRate(share, min(low, share), max(high, share))


def typical(
    n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str, model: Path | None = None
) -> tuple[float, int]:
    """expected() without its range: the rate, and the tokens that it was measured on, 0 for a prior."""
    if capacity >= n_expert:
        return 0.0, 0
    counted = recorded(model, capacity, eviction).get(strategies.routing_key(routing)) if model else None
    if counted:
        return counted[0] / counted[1], counted[2] // n_used
    return _simulated(n_expert, n_used, capacity, routing, eviction, "typical"), 0


def _simulated(n_expert: int, n_used: int, capacity: int, routing: Routing, eviction: str, locality: str) -> float:
    """Of synthetic scores. A tuned routing has its own parameters in each layer, so each layer gets some tokens."""
    n_layers = len(routing.layers) or _LAYERS
    scores = _scores(n_layers, n_expert, locality)
    return simulate.miss_rate(scores, n_used, capacity, routing, eviction, skip=_SKIPPED)


@functools.lru_cache(maxsize=8)
def _scores(n_layers: int, n_expert: int, locality: str) -> tuple[forced_scores.Halves, ...]:
    return forced_scores.synthetic(n_layers, _SKIPPED + _TOKENS, n_expert, LOCALITIES[locality])


@functools.lru_cache(maxsize=8)
def recorded(model: Path, capacity: int, eviction: str) -> dict[str, tuple[int, int, int]]:
    """(experts missed, experts that ran, of these those of one layer) by routing_key(), of all text on which this model was
    scored at this budget."""
    found: dict[str, tuple[int, int, int]] = {}
    try:
        files = sorted((cache_dir() / "scores").glob("*.jsonl"))
        fingerprint = gguf_file.content_fingerprint(model) if files else ""
    except (OSError, CacherouteError):
        return found
    seen: set[tuple[str, str, int]] = set()
    for file in files:
        try:
            if file.stat().st_size > _LONGEST_FILE:
                continue
            with file.open(encoding="utf-8") as lines:
                head = json.loads(next(lines))
                if head.get("format") != score_files.FORMAT or head.get("model") != fingerprint:
                    continue
                for line in lines:
                    cell = json.loads(line)
                    if cell["budget"] != capacity or cell["eviction"] != eviction:
                        continue
                    counts = (*cell["misses"], cell["selected"])
                    if not all(type(n) is int and n >= 0 for n in counts):
                        raise ValueError("a damaged line")
                    place = str(head.get("text")), str(cell["routing"]), int(cell["chunk"])
                    if place in seen:  # scored by two versions
                        continue
                    seen.add(place)
                    missed, ran, in_one = found.get(place[1], (0, 0, 0))
                    n_layers = len(cell["misses"])
                    found[place[1]] = missed + sum(counts[:-1]), ran + counts[-1], in_one + counts[-1] // n_layers
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError, ZeroDivisionError):
            continue  # being written, or of another version
    return {routing: counts for routing, counts in found.items() if counts[1] > 0}
