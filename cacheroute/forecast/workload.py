"""What a token of a model multiplies: matrices by type, in bytes and in weights. From a header, or from the catalogue's numbers.

Knows no machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cacheroute.forecast.speed import Types
from cacheroute.model import checks, context_memory
from cacheroute.model.catalogue import BLOCKS, ModelEntry
from cacheroute.model.experts import EMBEDDING, ExpertLayout
from cacheroute.model.gguf_file import GgufFile, TensorInfo

_F16 = 2


@dataclass(frozen=True)
class Amount:
    """Matrices of one type: their bytes, and their weights."""

    nbytes: int
    weights: int

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.nbytes + other.nbytes, self.weights + other.weights)


Amounts = Mapping[str, Amount]


@dataclass(frozen=True)
class Workload:
    """One token's. `dense`: the matrices of all layers but experts; `shared`: shared experts, which run beside the reads;
    `output`: the one that makes the vocabulary's scores; `expert`: of one routed expert in all layers.

    read_bytes: of one expert in all layers, as it is read from the device, whole pages. heads, head_width: of attention, in
    `kv_layers` of all `blocks`; kv_bytes: kept of one token. assumed: what the source does not tell.
    """

    name: str
    n_expert: int
    n_used: int
    n_layers: int
    blocks: int
    dense: Amounts
    shared: Amounts
    output: Amounts
    expert: Amounts
    read_bytes: int
    heads: int
    head_width: int
    kv_layers: int
    kv_bytes: int
    assumed: tuple[str, ...] = field(default=())

    def types(self, *, whole: bool) -> Types:
        """Those whose speed is needed, F16 for keys and values. `whole`: of a model that may be loaded with all its experts."""
        experts = frozenset(self.expert)
        return Types(frozenset({"f16", *self.dense, *self.shared, *self.output}), experts, experts if whole else frozenset())


def of_header(header: GgufFile, layout: ExpertLayout) -> Workload:
    """Of a model by its header, where everything stands."""
    dense: list[TensorInfo] = []
    shared: list[TensorInfo] = []
    blocks = _number(header, "block_count", len(layout.layers)) - _number(header, "nextn_predict_layers", 0)
    names = {t.name for t in header.tensors}
    output = "output.weight" if "output.weight" in names else EMBEDDING
    expert_names = {t.name for layer in layout.layers for t in layer.tensors}
    for t in header.tensors:
        if len(t.shape) < 2 or t.name in (output, EMBEDDING) or t.name in expert_names or not t.name.endswith(".weight"):
            continue
        block = t.name.split(".")[1] if t.name.startswith("blk.") else "0"
        if checks.EXPERT_TENSOR.match(t.name) or "embd" in t.name or not block.isdigit() or int(block) >= blocks:
            continue
        (shared if "_shexp" in t.name else dense).append(t)
    tensors = {t.name: t for t in header.tensors}
    heads = max(_number(header, "attention.head_count", 1), 1)
    return Workload(
        name=layout.model or layout.paths[0].stem,
        n_expert=layout.n_expert,
        n_used=layout.n_used,
        n_layers=len(layout.layers),
        blocks=blocks,
        dense=_amounts(dense),
        shared=_amounts(shared),
        output=_amounts([tensors[output]] if output in tensors else []),
        expert=_summed(
            (t.type, Amount(t.expert_bytes, _weights(tensors[t.name]) // layout.n_expert))
            for layer in layout.layers
            for t in layer.tensors
        ),
        read_bytes=layout.resident_bytes,
        heads=heads,
        head_width=_number(header, "attention.key_length", _number(header, "embedding_length", 0) // heads),
        kv_layers=blocks // max(_number(header, "full_attention_interval", 1), 1),
        kv_bytes=context_memory.least_bytes(header, 1) - context_memory.least_bytes(header, 0),
    )


def of_entry(entry: ModelEntry) -> Workload:
    """Of a model of the catalogue that is not on this disk.

    Its dense matrices are taken to be of the type that most of its experts have, the output to be a sixth of them, and keys and
    values to be half as wide as the hidden state.
    """
    weights = entry.n_embd * entry.n_ff
    expert = {
        kind.lower(): Amount(n * weights * BLOCKS[kind][1] // BLOCKS[kind][0], n * weights)
        for kind, n in entry.expert_types.items()
    }
    kind = max(entry.expert_types, key=lambda k: entry.expert_types[k])
    dense = entry.dense_bytes
    shared = int(entry.shared * entry.expert_bytes)
    parts = {"output": dense // 6, "shared": min(shared, dense // 2)}
    parts["dense"] = dense - sum(parts.values()) - dense // 6  # as large again: the rows of the embeddings
    of = {name: {kind.lower(): Amount(n, n * BLOCKS[kind][0] // BLOCKS[kind][1])} for name, n in parts.items()}
    return Workload(
        name=entry.title,
        n_expert=entry.experts,
        n_used=entry.used,
        n_layers=entry.layers,
        blocks=entry.layers,
        dense=of["dense"],
        shared=of["shared"],
        output=of["output"],
        expert=expert,
        read_bytes=entry.expert_bytes,
        heads=max(entry.n_embd // 64, 1),
        head_width=64,
        kv_layers=entry.layers,
        kv_bytes=_F16 * entry.layers * entry.n_embd // 2,
        assumed=("the types of the dense weights", "the width of keys and values"),
    )


def _number(header: GgufFile, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**31 else default


def _weights(t: TensorInfo) -> int:
    n = 1
    for extent in t.shape:
        n *= extent
    return n


def _amounts(tensors: Iterable[TensorInfo]) -> Amounts:
    return _summed((t.type, Amount(t.nbytes, _weights(t))) for t in tensors)


def _summed(parts: Iterable[tuple[str, Amount]]) -> Amounts:
    found: dict[str, Amount] = {}
    for kind, amount in parts:
        kind = kind.lower()
        found[kind] = found.get(kind, Amount(0, 0)) + amount
    return found
