"""The carved child: the parent with each FFN split into shared neurons and routed experts.

`Child` holds what is trained: routers, norms, and low-rank deltas on the matrices of attention and FFN (the
neurons in the carved order). Its residual has `WIDTH` columns, so that rows are whole blocks of K-quants: the
parent's D, and others that only deltas read and write. Routing is llama.cpp's `granitemoe`: softmax over all
experts, the CHOSEN largest, renormalised to one. Experts' down projections carry a factor CHOSEN, so equal
weights give the parent's own sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import nn

from cacheroute.model import demo_model

from . import parent
from .carve import CHOSEN, EXPERT_SIZE, EXPERTS, SHARED, Carving

WIDTH = demo_model.WIDTH
EPSILON = parent.EPSILON * parent.D / WIDTH
"""Of the norms: a mean square over WIDTH columns, of which the parent fills D, is so much less."""
RANKS = {"q": 16, "k": 16, "v": 16, "output": 16, "gate": 40, "up": 40, "down": 40}


def wider(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix with zeros for the rows and columns it lacks."""
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


class Matrix(nn.Module):  # type: ignore[misc]
    """A frozen matrix (rows, columns) with a low-rank delta `b @ (a / scale)`; the delta starts at zero.

    scale (columns,) is large where inputs are: the massive activations of first tokens, a thousand
    times the rest, steer all attention and must move slowly (without it training diverged).
    """

    def __init__(self, base: torch.Tensor, rank: int, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        rows, columns = base.shape
        self.register_buffer("base", base, persistent=False)
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.register_buffer("scale", torch.ones(columns) if scale is None else scale.clone())

    def inner(self) -> torch.Tensor:
        """(rank, columns) factor that meets the raw input."""
        return self.a / self.scale

    def forward(self) -> torch.Tensor:
        """The matrix as it is now."""
        return self.base + self.b @ self.inner()


class Norm(nn.Module):  # type: ignore[misc]
    """RMS norm with the parent's weight times (1 + change), as the weights span orders of magnitude."""

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        # columns that the parent lacks get its median weight
        base = F.pad(base, (0, WIDTH - len(base)), value=float(base.abs().median())) * (parent.D / WIDTH) ** 0.5
        self.register_buffer("base", base, persistent=False)
        self.change = nn.Parameter(torch.zeros_like(base))

    def weight(self) -> torch.Tensor:
        return self.base * (1 + self.change)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """With the parent's weight."""
        return F.rms_norm(x.float(), (WIDTH,), self.base, EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (WIDTH,), self.weight(), EPSILON)


TEMPERATURE = 0.5
"""Of the sigmoid that stands for an expert's presence, in logits."""


class Select(torch.autograd.Function):  # type: ignore[misc]
    """Gate weights of the chosen experts (0 elsewhere), with a gradient for those left out too.

    Forward: renormalised softmax over the CHOSEN largest logits, times CHOSEN. Backward: besides that
    function's own gradient, each logit moves as if its expert's presence were a sigmoid around the
    threshold, so that an expert that should have been chosen learns it (straight-through).
    """

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
        soft = ((logits - threshold) / TEMPERATURE).sigmoid()
        return own + grad * soft * (1 - soft) / TEMPERATURE


class Layer(nn.Module):  # type: ignore[misc]
    """Attention and FFN of one layer."""

    def __init__(self, w: parent.Weights, carving: Carving) -> None:
        super().__init__()
        order = torch.from_numpy(carving.order.astype("int64"))
        heads, kv = parent.HEADS * parent.HEAD, parent.KV_HEADS * parent.HEAD
        base = {
            "q": wider(w["attn_q"], heads, WIDTH),
            "k": wider(w["attn_k"], kv, WIDTH),
            "v": wider(w["attn_v"], kv, WIDTH),
            "output": wider(w["attn_output"], WIDTH, heads),
            "gate": wider(w["ffn_gate"][order], parent.FFN, WIDTH),
            "up": wider(w["ffn_up"][order], parent.FFN, WIDTH),
            "down": wider(w["ffn_down"][:, order], WIDTH, parent.FFN),
        }
        scale = {"down": carving.neuron_scale}
        self.matrices = nn.ModuleDict({name: Matrix(m, RANKS[name], scale.get(name)) for name, m in base.items()})
        spread = F.pad(carving.scale, (0, WIDTH - parent.D), value=1.0)
        self.register_buffer("scale", spread)
        self.router = nn.Parameter(wider(carving.router * carving.scale, EXPERTS, WIDTH))
        self.gain = nn.Parameter(carving.gain.clone())
        self.attn_norm, self.ffn_norm = Norm(w["attn_norm"]), Norm(w["ffn_norm"])

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual after the layer, router logits) for the residual x (batch, positions, WIDTH)."""
        m = {name: matrix() for name, matrix in self.matrices.items()}
        x = x + parent.attention({f"attn_{n}": m[n] for n in ("q", "k", "v", "output")}, self.attn_norm(x), positions)
        # The router sees the parent's norm: a small change of a near-zero norm weight, blown up by the
        # router's large weight there, would turn the routing over. `export` folds the difference in.
        plain = self.ffn_norm.plain(x)
        h = plain * (1 + self.ffn_norm.change)
        a = F.silu(F.linear(h, m["gate"])) * F.linear(h, m["up"])
        # Detached: the straight-through gradient is a hint for the router alone. Passed on to the
        # residual it drowned every other gradient and training diverged.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(plain.detach() / self.scale, self.router)
            weight = Select.apply(logits) * self.gain
        routed = (a[..., SHARED:].unflatten(-1, (EXPERTS, EXPERT_SIZE)) * weight[..., None].to(a.dtype)).flatten(-2)
        return x + F.linear(torch.cat((a[..., :SHARED], routed), -1), m["down"]), logits


class Child(nn.Module):  # type: ignore[misc]
    """The carved model; as it is made, the closed-form carve."""

    def __init__(self, p: dict[str, torch.Tensor], carvings: list[Carving]) -> None:
        super().__init__()
        self.embedding = p["token_embd.weight"]
        self.layers = nn.ModuleList(Layer(parent.layer_weights(p, i), c) for i, c in enumerate(carvings))
        self.output_norm = Norm(p["output_norm.weight"])

    def forward(self, tokens: torch.Tensor, trace: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Final normed states (batch, t, D), the columns that the output reads; each layer's router logits go to `trace`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.pad(F.embedding(tokens, self.embedding).float(), (0, WIDTH - parent.D))
        for layer in self.layers:
            x, logits = layer(x, positions)
            if trace is not None:
                trace.append(logits.detach())
        return self.output_norm(x)[..., : parent.D]
