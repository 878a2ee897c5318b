"""From a trained `Child` to `cacheroute/data/demo_model.npz`, and back for evaluation.

Low-rank factors become int8 with one scale a row (b) or a column (a), so that the builder's product
is exact. Knows nothing about training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .child import RANKS, Child, Layer, Matrix

Arrays = dict[str, np.ndarray]


def balance(delta: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, a) with the same product and r orthogonal, equally scaled directions."""
    q_b, r_b = torch.linalg.qr(delta.b.detach().double())
    q_a, r_a = torch.linalg.qr(delta.inner().detach().double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    # A random rotation spreads the large directions over all, so none is rounded away.
    mix, _ = torch.linalg.qr(torch.randn(len(s), len(s), generator=torch.Generator().manual_seed(0), dtype=s.dtype))
    root = s.sqrt()
    return (q_b @ (u * root) @ mix).float(), (mix.T @ (v * root[:, None]) @ q_a.T).float()


def to_int8(x: torch.Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scale) with one scale for each line along `axis`."""
    scale = x.abs().amax(axis, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round().to(torch.int8).numpy(), scale.squeeze(axis).numpy().astype(np.float32)


def arrays(child: Child, order: np.ndarray) -> Arrays:
    """Everything the builder needs; order (LAYERS, FFN) uint16, routers as float16."""
    layers: list[Layer] = [m.cpu() for m in child.layers]
    out: Arrays = {
        "order": order,
        "router": np.stack([(m.router / m.scale / (1 + m.ffn_norm.change)).detach().numpy() for m in layers]).astype(np.float16),
        "gain": np.stack([m.gain.detach().numpy() for m in layers]),
        "attn_norm": np.stack([m.attn_norm.weight().detach().numpy() for m in layers]),
        "ffn_norm": np.stack([m.ffn_norm.weight().detach().numpy() for m in layers]),
        "output_norm": child.output_norm.weight().detach().cpu().numpy(),
    }
    for side in RANKS:
        factors = [balance(m.matrices[side]) for m in layers]
        for name, axis, which in (("b", 1, 0), ("a", 0, 1)):
            pairs = [to_int8(f[which], axis) for f in factors]
            out[f"{side}_{name}"] = np.stack([v for v, _ in pairs])
            out[f"{side}_{name}_scale"] = np.stack([s for _, s in pairs])
    return out


def write(child: Child, order: np.ndarray, path: Path) -> None:
    """Write the npz (compressed; a few MB)."""
    np.savez_compressed(path, **arrays(child, order))  # type: ignore[arg-type]
