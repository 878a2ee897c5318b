"""The table parent / carved / distilled: perplexity, cache misses of the real trace, router sharpness.

Everything is measured on the same windows of the held-out documents. Knows nothing about training.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from tokenizers import Tokenizer

from . import parent
from .carve import CHOSEN, EXPERTS
from .child import Child
from .text import SEPARATOR

BUDGETS = (0.25, 0.5, 0.75)
MASSES = (0.5, 0.7, 0.9)


@dataclass
class Row:
    """One model. Perplexities per token; the rest is empty for the dense parent.

    miss[trace][budget]: share of expert activations not in a per-layer LRU of that share of the
    experts. cumsum[p]: mean number of experts with probabilities that sum to p. by_document: perplexity.
    """

    name: str
    held_out: float
    wiki: float
    by_document: list[float]
    miss: dict[str, dict[str, float]] = field(default_factory=dict)
    cumsum: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, object]:
        return asdict(self)


def windows(tok: Tokenizer, text: str, count: int, length: int) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly spread over a document."""
    out = []
    for k in range(count):
        at = len(text) * k // count
        at = text.find(" ", at) + 1 if at else 0
        out.append(tok.encode(text[at : at + 8 * length]).ids[:length])
    return [w for w in out if len(w) == length]


def lru_misses(chosen: np.ndarray, capacity: int) -> float:
    """Share of misses of one layer's trace (tokens, CHOSEN) in an LRU of `capacity` experts."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for row in chosen.tolist():
        for expert in row:
            if expert in cache:
                cache.move_to_end(expert)
            else:
                misses += 1
                cache[expert] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return misses / chosen.size


def miss_table(trace: np.ndarray, seed: int = 0) -> dict[str, dict[str, float]]:
    """Misses of a trace (layers, tokens, CHOSEN): as it is, shuffled in time, and of an i.i.d. router."""
    rng = np.random.default_rng(seed)
    shuffled = np.stack([layer[rng.permutation(len(layer))] for layer in trace])
    uniform = rng.random((*trace.shape[:2], EXPERTS)).argsort(-1)[..., :CHOSEN]
    named = {"real": trace, "shuffled": shuffled, "iid": uniform}
    return {
        name: {f"{b:.0%}": float(np.mean([lru_misses(t, int(b * EXPERTS)) for t in traces])) for b in BUDGETS}
        for name, traces in named.items()
    }


def measure(
    name: str,
    hidden: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor],
    embedding: torch.Tensor,
    documents: list[list[list[int]]],
    wiki: list[list[int]],
) -> Row:
    """Perplexities and routing of one model; `hidden(tokens, trace)` gives its final states."""
    trace: list[list[torch.Tensor]] = []

    def loss(window: list[int], keep: bool) -> float:
        tokens = torch.tensor([window], device=embedding.device)
        logits: list[torch.Tensor] = []
        out = F.linear(hidden(tokens, logits)[0, :-1], embedding)
        if keep and logits:
            trace.append([x[0].cpu() for x in logits])
        return float(F.cross_entropy(out, tokens[0, 1:]))

    losses = [[loss(w, True) for w in document] for document in documents]
    mean = float(np.mean([x for document in losses for x in document]))
    row = Row(
        name,
        math.exp(mean),
        math.exp(float(np.mean([loss(w, False) for w in wiki]))),
        [round(math.exp(float(np.mean(d))), 2) for d in losses],
    )
    if trace:
        layers = [torch.cat([t[i] for t in trace]) for i in range(parent.LAYERS)]
        chosen = np.stack([x.topk(CHOSEN, -1).indices.numpy() for x in layers])
        row.miss = miss_table(chosen)
        for mass in MASSES:
            counts = [
                (x.softmax(-1).sort(-1, descending=True).values.cumsum(-1) < mass).sum(-1).float().mean() + 1 for x in layers
            ]
            row.cumsum[str(mass)] = float(np.mean(counts))
    return row


def _states(child: Child, tokens: torch.Tensor, trace: list[torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = child(tokens, trace=trace)
    return hidden


def table(
    p: dict[str, torch.Tensor],
    tok: Tokenizer,
    children: dict[str, Child],
    heldout: Path,
    wiki: Path,
    per_document: int = 2,
    length: int = 512,
) -> list[Row]:
    """Rows for the parent and each child on the held-out documents and a wiki-like text."""
    documents = [windows(tok, d, per_document, length) for d in heldout.read_text("utf-8").split(SEPARATOR)]
    articles = windows(tok, wiki.read_text("utf-8"), 2 * per_document, length)
    embedding = p["token_embd.weight"]
    rows = [measure("parent", lambda t, _: parent.parent_hidden(p, t), embedding, documents, articles)]
    for name, child in children.items():
        child.requires_grad_(False)
        rows.append(measure(name, partial(_states, child), embedding, documents, articles))
    return rows
