"""The carved child: the parent with each FFN split into shared neurons and routed experts.

`Child` holds what is trained: routers, norms, and low-rank deltas on the FFN matrices (the neurons
in the carved order). Routing is llama.cpp's `granitemoe`: softmax over all experts, the CHOSEN
largest, renormalised to one. Experts' down projections carry a factor CHOSEN, so equal weights give
the parent's own sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import nn

from . import parent
from .carve import CHOSEN, EXPERT_SIZE, EXPERTS, SHARED, Carving

MATRICES = ("gate", "up", "down")


class LowRank(nn.Module):  # type: ignore[misc]
    """A delta `b @ (a / scale)` on a frozen matrix (rows, columns); starts at zero.

    scale (columns,) is large where inputs are: the massive activations of first tokens, a thousand
    times the rest, steer all attention and must move slowly (without it training diverged).
    """

    def __init__(self, rows: int, columns: int, rank: int, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.register_buffer("scale", torch.ones(columns) if scale is None else scale.clone())

    def inner(self) -> torch.Tensor:
        """(rank, columns) factor that meets the raw input."""
        return self.a / self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.inner()), self.b)


class Norm(nn.Module):  # type: ignore[misc]
    """RMS norm with the parent's weight times (1 + change), as the weights span orders of magnitude."""

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(base))

    def weight(self) -> torch.Tensor:
        return self.base * (1 + self.change)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return parent.rms_norm(x, self.weight())


class Select(torch.autograd.Function):  # type: ignore[misc]
    """Gate weights of the chosen experts (0 elsewhere), with a gradient for those left out too.

    Forward: renormalised softmax over the CHOSEN largest logits, times CHOSEN. Backward: besides that
    function's own gradient, each logit moves as if its expert's presence were a sigmoid around the
    threshold, so that an expert that should have been chosen learns it (straight-through).
    """

    TEMPERATURE = 0.5

    @staticmethod
    def forward(ctx, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        top, ids = logits.topk(CHOSEN + 1, -1)
        threshold = top[..., CHOSEN - 1 :].mean(-1, keepdim=True)
        weights = top[..., :CHOSEN].softmax(-1) * CHOSEN
        gate = torch.zeros_like(logits).scatter(-1, ids[..., :CHOSEN], weights)
        ctx.save_for_backward(logits, gate, threshold)
        return gate

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        logits, gate, threshold = ctx.saved_tensors
        own = gate * (grad - (grad * gate).sum(-1, keepdim=True) / CHOSEN)
        soft = ((logits - threshold) / Select.TEMPERATURE).sigmoid()
        return own + grad * soft * (1 - soft) / Select.TEMPERATURE


class Layer(nn.Module):  # type: ignore[misc]
    """FFN of one layer."""

    def __init__(self, p: dict[str, torch.Tensor], i: int, carving: Carving, rank: int) -> None:
        super().__init__()
        order = torch.from_numpy(carving.order.astype("int64"))
        self.register_buffer("gate", p[f"blk.{i}.ffn_gate.weight"][order].contiguous(), persistent=False)
        self.register_buffer("up", p[f"blk.{i}.ffn_up.weight"][order].contiguous(), persistent=False)
        self.register_buffer("down", p[f"blk.{i}.ffn_down.weight"][:, order].contiguous(), persistent=False)
        self.register_buffer("scale", carving.scale.clone())
        self.router = nn.Parameter(carving.router * carving.scale)
        self.gain = nn.Parameter(carving.gain.clone())
        self.attn_norm = Norm(p[f"blk.{i}.attn_norm.weight"])
        self.ffn_norm = Norm(p[f"blk.{i}.ffn_norm.weight"])
        if rank:
            self.d_gate, self.d_up = LowRank(parent.FFN, parent.D, rank), LowRank(parent.FFN, parent.D, rank)
            self.d_down = LowRank(parent.D, parent.FFN, rank, carving.neuron_scale)
        self.rank = rank

    def forward(self, x: torch.Tensor, select: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, router logits) for the residual x (..., D)."""
        # The router sees the parent's norm: a small change of a near-zero norm weight, blown up by the
        # router's large weight there, would turn the routing over. `export` folds the difference in.
        plain = parent.rms_norm(x, self.ffn_norm.base)
        h = plain * (1 + self.ffn_norm.change)
        g, u = F.linear(h, self.gate), F.linear(h, self.up)
        if self.rank:
            g, u = g + self.d_gate(h), u + self.d_up(h)
        a = F.silu(g) * u
        # Detached: the straight-through gradient is a hint for the router alone. Passed on to the
        # residual it drowned every other gradient and training diverged.
        logits = F.linear(plain.detach() / self.scale, self.router)
        weight = select(logits) * self.gain
        routed = (a[..., SHARED:].unflatten(-1, (EXPERTS, EXPERT_SIZE)) * weight[..., None]).flatten(-2)
        shared = a[..., :SHARED]
        y = F.linear(shared, self.down[:, :SHARED]) + F.linear(routed, self.down[:, SHARED:])
        if self.rank:
            inner = self.d_down.inner()
            low = F.linear(shared, inner[:, :SHARED]) + F.linear(routed, inner[:, SHARED:])
            y = y + F.linear(low, self.d_down.b)
        return y, logits


class Child(nn.Module):  # type: ignore[misc]
    """The carved model; `rank=0` is the closed-form carve."""

    def __init__(self, p: dict[str, torch.Tensor], carvings: list[Carving], rank: int) -> None:
        super().__init__()
        self.p = p
        self.layers = nn.ModuleList(Layer(p, i, c, rank) for i, c in enumerate(carvings))
        self.output_norm = Norm(p["output_norm.weight"])

    def forward(
        self,
        tokens: torch.Tensor,
        select: Callable[[torch.Tensor], torch.Tensor] = Select.apply,
        trace: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Final normed hidden states (batch, t, D); appends each layer's router logits to `trace`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.p["token_embd.weight"][tokens]
        for i, layer in enumerate(self.layers):
            x = x + parent.attention(self.p, i, layer.attn_norm(x), positions)
            y, logits = layer(x, select)
            if trace is not None:
                trace.append(logits.detach())
            x = x + y
        return self.output_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.p["token_embd.weight"])
