"""A mixture-of-experts model by its GGUF header, and what each budget would cost. Reads no tensor data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cacheroute.model import experts, gguf_file
from cacheroute.model.gguf_file import GgufFile, TensorInfo

# llama.cpp's enum llama_expert_gating_func_type (src/llama-hparams.h), the value of `ARCH.expert_gating_func`
_GATING = {1: "softmax", 2: "sigmoid", 3: "softmax-weight", 4: "sqrt-softplus"}

# What llama.cpp's src/models/*.cpp pass to build_moe_ffn where the file has no such key.
_GATING_OF_ARCHITECTURE = {
    "softmax-weight": {"gpt-oss"},
    "sigmoid": {"afmoe", "cohere2moe", "glm-dsa", "glm4moe", "llama4", "mimo2", "nemotron_h_moe", "step35"},
    "softmax": {
        *("arctic", "bailingmoe", "dbrx", "deepseek", "deepseek2", "ernie4_5-moe", "gemma4", "granitehybrid", "granitemoe"),
        *("grok", "grovemoe", "hunyuan-moe", "jamba", "llada-moe", "llama", "mistral3", "olmoe", "phimoe", "qwen2moe"),
        *("qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "rnd1"),
    },
}

# Parts of a tensor's name -> its class; the first that fits counts.
_CLASSES = (
    ("ffn_down_exps.weight", "experts, down"),
    ("_exps.weight", "experts, gate and up"),
    ("_exps.", "expert biases and scales"),
    ("_chexps", "experts"),
    ("shexp", "shared experts"),
    ("ffn_gate_inp", "router"),
    ("exp_probs_b", "router"),
    ("norm", "norms"),
    ("nextn", "prediction layers"),
    ("attn", "attention"),
    ("ssm", "state space"),
    ("ffn", "dense FFN"),
    ("token_embd", "embedding"),
    ("output", "output"),
)


@dataclass(frozen=True)
class TensorClass:
    """Tensors of one class: bytes, and how many tensors there are of each type."""

    name: str
    nbytes: int
    types: dict[str, int]


@dataclass(frozen=True)
class BudgetRow:
    """One budget: experts per layer, bytes resident in all layers, and the most bytes that one token may read (all K miss)."""

    budget: str
    experts: int
    resident_bytes: int
    worst_read_bytes_per_token: int


@dataclass(frozen=True)
class Report:
    """A model. `layers` are those with routed experts, `blocks` all; bytes of an expert: the mean layer's, and in all layers.

    `expert_sizes`: (bytes of one expert, layers where it has so many), most layers first: mixes give some layers more bits.
    """

    path: Path
    shards: int
    name: str
    architecture: str
    blocks: int
    layers: int
    prediction_layers: int
    experts: int
    used: int
    shared: float
    expert_bytes: int
    expert_sizes: tuple[tuple[int, int], ...]
    expert_bytes_all_layers: int
    all_expert_bytes: int
    dense_bytes: int
    embedding_bytes: int
    total_bytes: int
    gating: str
    selection_bias: bool
    groups: int
    groups_used: int
    context: int
    tensors: tuple[TensorClass, ...]
    budgets: tuple[BudgetRow, ...]


def inspect(path: Path) -> Report:
    """Raises UsageError for a file that is no GGUF, incomplete, or has no experts that the hook can reach."""
    gguf = gguf_file.read(path)
    layout = experts.layout(gguf)
    blocks = _number(gguf, "block_count")
    return Report(
        path=path,
        shards=len(gguf.paths),
        name=str(gguf.metadata.get("general.name", path.stem)),
        architecture=gguf.architecture,
        blocks=blocks,
        layers=len(layout.layers),
        prediction_layers=_number(gguf, "nextn_predict_layers"),
        experts=layout.n_expert,
        used=layout.n_used,
        shared=_shared(gguf),
        expert_bytes=layout.expert_bytes // len(layout.layers),
        expert_sizes=tuple(Counter(layer.expert_bytes for layer in layout.layers).most_common()),
        expert_bytes_all_layers=layout.expert_bytes,
        all_expert_bytes=layout.all_expert_bytes,
        dense_bytes=layout.dense_bytes,
        embedding_bytes=layout.embedding_bytes,
        total_bytes=gguf.nbytes,
        gating=_gating(gguf),
        selection_bias=any("exp_probs_b" in t.name for t in gguf.tensors),
        groups=_number(gguf, "expert_group_count"),
        groups_used=_number(gguf, "expert_group_used_count"),
        context=_number(gguf, "context_length"),
        tensors=_classes(gguf.tensors),
        budgets=_budgets(layout),
    )


def _number(gguf: GgufFile, key: str) -> int:
    value = gguf.metadata.get(f"{gguf.architecture}.{key}", 0)
    return int(value) if isinstance(value, (int, float)) else 0


def _gating(gguf: GgufFile) -> str:
    stated = _GATING.get(_number(gguf, "expert_gating_func"))
    usual = (kind for kind, names in _GATING_OF_ARCHITECTURE.items() if gguf.architecture in names)
    return stated or next(usual, "unknown")


def _shared(gguf: GgufFile) -> float:
    """Shared experts: as the file counts them, else the width of the shared FFN in widths of a routed expert."""
    stated = _number(gguf, "expert_shared_count")
    if stated:
        return stated
    # rows of the down projections: the width of one routed expert, and of what always runs
    width = {t.name.split(".")[-2]: t.shape[0] for t in gguf.tensors if ".ffn_down_" in t.name}
    return width.get("ffn_down_shexp", 0) / width["ffn_down_exps"]


def _classes(tensors: tuple[TensorInfo, ...]) -> tuple[TensorClass, ...]:
    nbytes: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}
    for t in tensors:
        name = next((label for part, label in _CLASSES if part in t.name), "other")
        nbytes[name] += t.nbytes
        types.setdefault(name, Counter())[t.type.upper()] += 1
    return tuple(TensorClass(name, n, dict(types[name].most_common())) for name, n in nbytes.most_common())


def _budgets(layout: experts.ExpertLayout) -> tuple[BudgetRow, ...]:
    """The least budget, quarters of E, and all; quarters below K are left out. With all resident nothing is read."""
    e, k = layout.n_expert, layout.n_used
    wanted = [("least", k), *((f"{share}%", e * share // 100) for share in (25, 50, 75)), ("all", e)]
    return tuple(
        BudgetRow(budget, c, c * layout.resident_bytes, 0 if c == e else min(k, e) * layout.expert_bytes)
        for budget, c in wanted
        if c > k or budget in ("least", "all")
    )
