"""Closed-form carving: which neurons are shared, which make an expert together, and a first router.

Takes the dense parent and calibration tokens; gives a `Carving` per layer. No gradient step is
taken. Knows nothing about distillation or GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from scipy.optimize import linear_sum_assignment

from cacheroute.model import demo_model

from . import parent

SHARED, EXPERTS, EXPERT_SIZE, CHOSEN = demo_model.SHARED, demo_model.EXPERTS, demo_model.EXPERT_SIZE, demo_model.CHOSEN
SPREAD = 0.75
"""Within-token standard deviation of the first router's logits.

Probabilities should carry information (at 0 they are flat), but the parent needs every chosen expert at
weight one: at 1 the closed-form carve loses three times the parent's perplexity, at 0.5 little that
training does not give back.
"""


@dataclass
class Activity:
    """One layer on N calibration tokens.

    h (N, D): the FFN's normed input. c (N, FFN): each neuron's output norm over its residual's norm.
    rms (FFN,): root mean square of each neuron's activation.
    """

    h: torch.Tensor
    c: torch.Tensor
    rms: torch.Tensor


@dataclass
class Carving:
    """order (FFN,): shared neurons, then expert 0's, expert 1's ...; router (EXPERTS, D); gain (EXPERTS,).

    scale (D,): root mean square of each dimension of h; `router * scale` is what is trained, because
    the raw weights of rarely moving dimensions are a thousand times those of the others.
    neuron_scale (FFN,): how far each neuron's activation is above the median one (at least 1), in `order`.
    """

    order: np.ndarray
    router: torch.Tensor
    scale: torch.Tensor
    gain: torch.Tensor
    neuron_scale: torch.Tensor


def observe(p: dict[str, torch.Tensor], batches: list[torch.Tensor]) -> list[Activity]:
    """Run the parent over `batches` of tokens (b, t) and record every FFN.

    Contributions are divided by the residual's norm, or a few massive activations (first tokens)
    would decide everything.
    """
    h_all: list[list[torch.Tensor]] = [[] for _ in range(parent.LAYERS)]
    c_all: list[list[torch.Tensor]] = [[] for _ in range(parent.LAYERS)]
    energy = torch.zeros(parent.LAYERS, parent.FFN)
    for tokens in batches:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = p["token_embd.weight"][tokens]
        for i in range(parent.LAYERS):
            w = parent.layer_weights(p, i)
            x = x + parent.attention(w, parent.rms_norm(x, w["attn_norm"]), positions)
            h = parent.rms_norm(x, w["ffn_norm"])
            a, down = parent.dense_ffn(w, h), w["ffn_down"]
            c = a.abs() * down.norm(dim=0) / x.norm(dim=-1, keepdim=True)
            energy[i] += a.pow(2).flatten(0, 1).sum(0).cpu()
            h_all[i].append(h.flatten(0, 1).cpu())
            c_all[i].append(c.flatten(0, 1).cpu())
            x = x + F.linear(a, down)
    rms = (energy / sum(t.numel() for t in batches)).sqrt()
    return [Activity(torch.cat(h), torch.cat(c), r) for h, c, r in zip(h_all, c_all, rms, strict=True)]


def balanced_clusters(points: np.ndarray, clusters: int, rounds: int, seed: int) -> np.ndarray:
    """Cluster number of each point (n, d); every cluster gets exactly n / clusters points.

    k-means with a linear assignment of points to cluster slots as the assignment step.
    """
    size = len(points) // clusters
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), clusters, replace=False)]
    label = np.zeros(len(points), np.int64)
    for _ in range(rounds):
        cost = (centres**2).sum(1)[None] - 2 * points @ centres.T
        _, slot = linear_sum_assignment(np.repeat(cost, size, axis=1))
        new = slot // size
        if (new == label).all():
            break
        label = new
        centres = np.stack([points[label == e].mean(0) for e in range(clusters)])
    return label


def order_neurons(c: torch.Tensor, seed: int) -> np.ndarray:
    """Shared neurons (largest mean c squared) first, then the rest by balanced cluster."""
    strength = (c**2).mean(0)
    by_strength = strength.argsort(descending=True).numpy()
    shared, rest = np.sort(by_strength[:SHARED]), np.sort(by_strength[SHARED:])
    profile = c[:, rest]
    profile = profile - profile.mean(0)
    # The Gram matrix's leading directions hold what matters of the (tokens x neurons) profiles.
    value, vector = torch.linalg.eigh((profile.T @ profile).double() / len(profile))
    keep = 96
    points = (vector[:, -keep:] * value[-keep:].clamp_min(0).sqrt()).numpy()
    label = balanced_clusters(points, EXPERTS, 30, seed)
    return np.concatenate([shared] + [rest[label == e] for e in range(EXPERTS)]).astype(np.uint16)


def expert_norms(c: torch.Tensor, order: np.ndarray) -> torch.Tensor:
    """(N, EXPERTS): root of the summed squared contributions of each expert's neurons."""
    routed = c[:, order[SHARED:].astype(np.int64)]
    return (routed.view(-1, EXPERTS, EXPERT_SIZE) ** 2).sum(-1).sqrt()


def input_scale(h: torch.Tensor) -> torch.Tensor:
    """(D,) root mean square of each dimension, floored at a fiftieth of the median."""
    rms = h.pow(2).mean(0).sqrt()
    return rms.clamp_min(float(rms.median()) / 50)


def ridge_router(h: torch.Tensor, norms: torch.Tensor, penalty: float = 0.1) -> torch.Tensor:
    """(EXPERTS, D) ridge regression from h to the log of the experts' norms, scaled to std SPREAD.

    The log chooses as well as the norm itself (same share of the routed energy) and its logits have
    no heavy tail, so the softmax over them stays close to what the parent would have added.
    """
    target = (norms + 1e-3 * norms.mean()).log()
    scale = input_scale(h)
    h = h / scale
    gram = (h.T @ h).double() / len(h)
    reg = penalty * torch.eye(len(gram), dtype=gram.dtype)
    w = torch.linalg.solve(gram + reg, (h.T @ target).double() / len(h)).T.float()
    spread = (h @ w.T).std(dim=-1).mean()
    return w * (SPREAD / spread) / scale


def expert_gain(logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """(EXPERTS,) least-squares factor that brings each expert's gate weights back to one where it counts."""
    top, ids = logits.topk(CHOSEN, -1)
    weight = torch.zeros_like(logits).scatter(-1, ids, top.softmax(-1) * CHOSEN)
    energy = norms**2
    return (weight * energy).sum(0) / ((weight**2) * energy).sum(0).clamp_min(1e-12)


def carve(activity: list[Activity]) -> list[Carving]:
    """One `Carving` per layer."""
    out = []
    for i, layer in enumerate(activity):
        order = order_neurons(layer.c, seed=i)
        norms = expert_norms(layer.c, order)
        router = ridge_router(layer.h, norms)
        gain = expert_gain(layer.h @ router.T, norms)
        neurons = (layer.rms / layer.rms.median()).clamp_min(1.0)[order.astype(np.int64)]
        out.append(Carving(order, router, input_scale(layer.h), gain, neurons))
    return out
