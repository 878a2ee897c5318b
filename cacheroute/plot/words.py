"""What figures call routings, evictions and budgets: words, in place of the names that are typed."""

from __future__ import annotations

from cacheroute.files import short_routing

short = short_routing  # as tables have it

_STRATEGIES = {
    "original": "original (lossless)",
    "cache-prior": "cache prior",
    "max-rank": "max rank",
    "cumsum": "cumulative sum",
    "pruning": "pruning",
    "drop-cold": "drop cold",
    "dynamic-k": "dynamic K",
    "speculate": "speculation",
    "tuned": "tuned",
    "python": "own policy",
    "none": "",
}
_EVICTIONS = {
    "lru": "LRU",
    "lfu": "LFU",
    "score": "router score",
    "soft-lfu": "soft LFU",
    "belady": "optimum (Belady)",
    "none": "",
}
_PARAMETERS = {"lambda": "λ", "max-loss": "max loss"}


def strategy(name: str) -> str:
    """Of a routing without its parameters; a name that is not known stays as it is."""
    return _STRATEGIES.get(name, name)


def parameters(routing: str) -> str:
    """As in "λ 0.2, j 2" of "cache-prior:lambda=0.2:j=2"; "" where there are none. Of a file or a class, its last part."""
    name, _, rest = routing.partition(":")
    if name in ("tuned", "python"):
        return rest.replace("/", ":").rpartition(":")[2]
    pairs = [part.partition("=") for part in rest.split("[")[0].split(":") if part]
    return ", ".join(f"{_PARAMETERS.get(key, key)} {value}".strip() for key, _, value in pairs)


def routing(text: str) -> str:
    """A routing with its parameters."""
    return f"{strategy(text.partition(':')[0])} {parameters(text)}".strip()


def eviction(name: str) -> str:
    """An eviction; a name that is not known stays as it is."""
    return _EVICTIONS.get(name, name)


def budget(text: str) -> str:
    """As in "50%", "16 experts" and "2GiB"."""
    return f"{text} experts" if text.isdecimal() else text


def listed(parts: list[str]) -> str:
    """As in "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)
