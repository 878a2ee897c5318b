"""Where the experts of a model are: layers, counts, byte ranges. From the GGUF header only."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cacheroute.errors import UsageError
from cacheroute.model import checks
from cacheroute.model.gguf_file import GgufFile

# In the order in which a token uses them, whatever that of the file is: separate gate, up, down or merged gate_up, down.
_USE = {"gate": 0, "gate_up": 0, "up": 1, "down": 2}
_OLD_EXPERT_TENSOR = re.compile(r"^blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight$")

EMBEDDING = "token_embd.weight"

# Architectures of this llama.cpp that the hook cannot serve, and why.
_UNSUPPORTED = {
    "granite-switch": "it chooses its experts outside build_moe_ffn, where no hook reaches",
    "grovemoe": "it chooses from two banks of experts in one layer",
}


class NotRoutableError(UsageError):
    """A model in order that has no experts, or none that can be routed."""


@dataclass(frozen=True)
class ExpertTensor:
    """The experts of one tensor: `n_expert` ranges of `expert_bytes`, the first at `offset` of shard `file`.

    `slot_bytes`: whole pages, enough for any of them wherever it begins in its first page; 0 where pages are not known.
    """

    name: str
    type: str
    file: int
    offset: int
    expert_bytes: int
    slot_bytes: int = 0


@dataclass(frozen=True)
class RouterTensors:
    """Names of a router's tensors, all F32; "" for what the layer does not have. `width`: of the hidden state."""

    weight: str
    bias: str
    norm: str
    selection_bias: str
    width: int


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer; `index` is llama.cpp's layer number, `router` None where it is not in F32."""

    index: int
    tensors: tuple[ExpertTensor, ...]
    router: RouterTensors | None = None

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of this layer, all its tensors."""
        return sum(t.expert_bytes for t in self.tensors)

    @property
    def resident_bytes(self) -> int:
        """The most that one expert of this layer takes in memory, in whole pages."""
        return sum(t.slot_bytes or t.expert_bytes for t in self.tensors)


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a model: E `n_expert` and K `n_used` per layer, of `layers`; `model` is its name, "" if it has none.

    `dense_bytes` are always in memory. `embedding_bytes` are those of the token embeddings where these stay in the file
    (patches/0002): a token reads its row of them. `dense_ranges`: file, offset and bytes of the other tensors, in the order of
    the file; what follows each other is one range.
    """

    paths: tuple[Path, ...]
    architecture: str
    n_expert: int
    n_used: int
    layers: tuple[ExpertLayer, ...]
    model: str = ""
    dense_bytes: int = 0
    embedding_bytes: int = 0
    dense_ranges: tuple[tuple[int, int, int], ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """llama.cpp's numbers of the layers."""
        return tuple(layer.index for layer in self.layers)

    @property
    def predictable(self) -> bool:
        """Whether a layer before another has what predicts its scores (native/prediction.h)."""
        return any(layer.router for layer in self.layers[1:])

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in every layer: what one more expert per layer costs."""
        return sum(layer.expert_bytes for layer in self.layers)

    @property
    def resident_bytes(self) -> int:
        """The most that one expert in every layer takes in memory, in whole pages: what one more costs of a budget."""
        return sum(layer.resident_bytes for layer in self.layers)

    @property
    def layer_bytes(self) -> int:
        """The most that one expert of one layer takes in memory, in whole pages."""
        return max(layer.resident_bytes for layer in self.layers)

    def prompt_reserve(self, capacity: int) -> int:
        """The most by which the experts of a layer that computes a prompt, all of them, exceed `capacity`: bytes."""
        return self.layer_bytes * (self.n_expert - capacity)

    @property
    def all_expert_bytes(self) -> int:
        return self.expert_bytes * self.n_expert


def layout(gguf: GgufFile) -> ExpertLayout:
    """Raises NotRoutableError for a model without experts that the hook can reach, UsageError for one that cannot be loaded."""
    arch, path = gguf.architecture, gguf.paths[0]
    _check_routable(gguf)
    checks.check(gguf)
    n_expert = int(gguf.metadata[f"{arch}.expert_count"])
    n_used = gguf.metadata.get(f"{arch}.expert_used_count")
    if not isinstance(n_used, int):
        raise NotRoutableError(f"{path} does not give one number of experts used by all layers; this is not supported.")
    found: dict[int, list[tuple[int, ExpertTensor]]] = {}
    for t in gguf.tensors:
        match = checks.EXPERT_TENSOR.match(t.name)
        if match and int(match[1]) < _blocks_that_run(gguf):
            size = t.nbytes // n_expert
            tensor = ExpertTensor(t.name, t.type, t.file, t.offset, size, _slot_bytes(t.offset, size, n_expert))
            found.setdefault(int(match[1]), []).append((_USE[match[2]], tensor))
    if not found:
        raise UsageError(f"{path} cannot be loaded: none of its {_blocks_that_run(gguf)} blocks that run has experts.")
    floats = {t.name: t.shape[0] for t in gguf.tensors if t.type == "f32"}
    layers = tuple(
        ExpertLayer(i, tuple(t for _, t in sorted(ts, key=lambda pair: pair[0])), _router(i, floats))
        for i, ts in sorted(found.items())
    )
    sizes = {t.name: t.nbytes for t in gguf.tensors}
    embedding = sizes.get(EMBEDDING, 0) if "output.weight" in sizes else 0  # else it is the output, too, and read whole
    dense = gguf.nbytes - n_expert * sum(layer.expert_bytes for layer in layers) - embedding
    name = str(gguf.metadata.get("general.name", ""))
    mapped = {t.name for layer in layers for t in layer.tensors} | ({EMBEDDING} if embedding else set())
    ranges = _joined((t.file, t.offset, t.nbytes) for t in gguf.tensors if t.name not in mapped)
    return ExpertLayout(gguf.paths, arch, n_expert, n_used, layers, name, dense, embedding, ranges)


def _joined(ranges: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Ranges of files in order; those with less than a page between them as one."""
    joined: list[tuple[int, int, int]] = []
    for file, offset, nbytes in sorted(ranges):
        if joined and joined[-1][0] == file and offset - sum(joined[-1][1:]) < mmap.PAGESIZE:
            start = joined.pop()[1]
            joined.append((file, start, offset + nbytes - start))
        else:
            joined.append((file, offset, nbytes))
    return tuple(joined)


def _blocks_that_run(gguf: GgufFile) -> int:
    """Layers that predict further tokens come last; llama.cpp does not run them."""
    blocks, further = (gguf.metadata.get(f"{gguf.architecture}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    return int(blocks) - int(further)


def _check_routable(gguf: GgufFile) -> None:
    arch, path = gguf.architecture, gguf.paths[0]
    if any(_OLD_EXPERT_TENSOR.match(t.name) for t in gguf.tensors):
        raise NotRoutableError(f"{path} keeps each expert in a tensor of its own, a format of 2023; convert the model again.")
    if not any(checks.EXPERT_TENSOR.match(t.name) for t in gguf.tensors) and not gguf.metadata.get(f"{arch}.expert_count"):
        raise NotRoutableError(f"{path} is a dense model ({arch}): it has no experts, so there is nothing to route.")
    if arch in _UNSUPPORTED:
        raise NotRoutableError(f"{path}: the architecture {arch} is not supported, {_UNSUPPORTED[arch]}.")


def _slot_bytes(offset: int, size: int, n: int) -> int:
    """Whole pages that hold any of n ranges of `size` bytes, the first at `offset`."""
    page = mmap.PAGESIZE
    heads = {(offset + e * size) % page for e in range(min(n, page // math.gcd(size, page)))}
    return -(-(max(heads) + size) // page) * page


def _router(index: int, floats: dict[str, int]) -> RouterTensors | None:
    """The router of a layer; `floats` are the F32 tensors with the first of their dimensions."""

    def named(*parts: str) -> str:
        return next((name for part in parts if (name := f"blk.{index}.{part}") in floats), "")

    weight = named("ffn_gate_inp.weight")
    if not weight:
        return None
    norm = named("ffn_norm.weight", "post_attention_norm.weight")  # gpt-oss and others have the second only
    return RouterTensors(weight, named("ffn_gate_inp.bias"), norm, named("exp_probs_b.bias"), floats[weight])
