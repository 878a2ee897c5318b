"""What llama.cpp cannot load, recognised from the header: it would abort the process, or refuse without naming the cause.

Its limits are those of src/llama-model.cpp, load_hparams, and of ggml's operators. What it checks itself with an error that
names the tensor (the shape of each one) is left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from cacheroute.errors import UsageError
from cacheroute.model.gguf_file import GgufFile, TensorInfo

EXPERT_TENSOR = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight$")

_MOST_BLOCKS = 512  # LLAMA_MAX_LAYERS
_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_MAPPED_ALIGNMENT = 32  # TENSOR_ALIGNMENT: where a buffer of mapped tensors may begin
_MOST_OF_ANYTHING = 2**30
_LAST_GATING = 4  # enum llama_expert_gating_func_type
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

# Whose heads are rotated as a whole, and as wide as their tensors say (src/models/*.cpp assert it)
_PLAIN_HEADS = (
    *("arctic", "dbrx", "deepseek", "dots1", "ernie4_5-moe", "granitemoe", "grok", "hunyuan-moe", "llada-moe", "llama"),
    *("olmoe", "qwen2moe", "qwen3moe", "qwen3vlmoe", "rnd1"),
)

_PARTLY_ROTATED = ("gpt-oss",)  # the same, but for the rotation

# Keys of an architecture whose type llama.cpp insists on; where a number for each layer will do, an array may stand.
_COUNTS = (
    *("context_length", "embedding_length", "block_count", "nextn_predict_layers", "leading_dense_block_count"),
    *("feed_forward_length", "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_count"),
    *("expert_shared_feed_forward_length", "expert_group_count", "expert_group_used_count", "expert_gating_func"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.key_length_mla", "attention.value_length_mla", "attention.q_lora_rank", "attention.kv_lora_rank"),
    *("rope.dimension_count", "rope.scaling.original_context_length", "vocab_size"),
)
_PER_LAYER = (
    *("feed_forward_length", "expert_used_count", "expert_feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "expert_shared_count"),
)
_NOT_ZERO = (
    *("context_length", "embedding_length", "block_count", "expert_count", "expert_used_count", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.key_length_mla"),
    *("attention.value_length_mla", "expert_feed_forward_length"),
)
_NUMBERS = (
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale"),
    *("attention.scale", "attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping"),
)
_HEAD_KEYS = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    "rope.dimension_count",
)
_NOT_NEGATIVE = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_TEXTS = ("general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")


def check(gguf: GgufFile) -> None:
    """Raises UsageError, with the name of the key or tensor, for a model that llama.cpp would abort on or refuse."""
    for problem in _problems(gguf):
        raise UsageError(f"{gguf.paths[0]} cannot be loaded: {problem}.")


def _problems(gguf: GgufFile) -> Iterator[str]:
    """The first of them counts: later ones rest on what the earlier ones have checked."""
    if "general.architecture" not in gguf.metadata:
        yield "it has no key general.architecture"
    yield from _wrong_types(gguf)
    yield from _impossible_numbers(gguf)
    yield from _vocabulary(gguf)
    yield from _tensors(gguf)
    yield from _heads(gguf)
    yield from _latent_heads(gguf)
    yield from _alignment(gguf)


def _wrong_types(gguf: GgufFile) -> Iterator[str]:
    arch = gguf.architecture
    wanted = {f"{arch}.{key}": "u32" for key in _COUNTS} | {f"{arch}.{key}": "f32" for key in _NUMBERS}
    wanted |= dict.fromkeys((*_TEXTS, f"{arch}.rope.scaling.type"), "str") | {f"{arch}.expert_weights_norm": "bool"}
    per_layer = {f"{arch}.{key}" for key in _PER_LAYER}
    names = {"u32": "a whole number (u32)", "f32": "a number (f32)", "str": "a text", "bool": "true or false"}
    for key, kind in gguf.kinds.items():
        if key not in wanted or kind == wanted[key]:
            continue
        if key in per_layer and kind in ("[u32]", "[i32]"):
            continue
        yield f"the key {key} is of type {kind} and has to be {names[wanted[key]]}"


def _impossible_numbers(gguf: GgufFile) -> Iterator[str]:
    arch = gguf.architecture

    def number(key: str) -> int:
        value = gguf.metadata.get(f"{arch}.{key}", 0)
        return int(value) if isinstance(value, int) else 0

    for key in _NOT_ZERO:
        name = f"{arch}.{key}"
        zero = name in gguf.metadata and number(key) == 0
        if zero or (name in gguf.lists and not any(gguf.lists[name])):
            yield f"the key {name} is 0"
    for key, value in gguf.metadata.items():
        if key.startswith(f"{arch}.") and isinstance(value, float):
            short = key.removeprefix(f"{arch}.")
            if math.isnan(value) or (short in _NUMBERS and math.isinf(value)):
                yield f"the key {key} is {value}, which is no number"
            if short in _NOT_NEGATIVE and value < 0:
                yield f"the key {key} is {value:g} and must not be negative"
    for key in (*_COUNTS, "attention.sliding_window"):
        if number(key) > _MOST_OF_ANYTHING:
            yield f"the key {arch}.{key} is {number(key)}, which no model has"
    blocks = number("block_count")
    if blocks > _MOST_BLOCKS:
        yield f"the key {arch}.block_count is {blocks} and llama.cpp loads at most {_MOST_BLOCKS} blocks"
    if number("nextn_predict_layers") > blocks:
        yield f"the key {arch}.nextn_predict_layers is {number('nextn_predict_layers')}, more than the {blocks} blocks"
    yield from _impossible_experts(arch, number)
    heads, of_keys = number("attention.head_count"), number("attention.head_count_kv")
    if heads and of_keys and heads % of_keys:
        yield f"the key {arch}.attention.head_count is {heads}, no multiple of the {of_keys} of head_count_kv"
    scaling = gguf.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        yield f"the key {arch}.rope.scaling.type is {scaling!r} and llama.cpp knows {', '.join(_ROPE_SCALINGS)}"
    if number("expert_gating_func") > _LAST_GATING:
        yield f"the key {arch}.expert_gating_func is {number('expert_gating_func')} and llama.cpp knows 1 to {_LAST_GATING}"
    for key in _PER_LAYER:
        n = gguf.lengths.get(f"{arch}.{key}", blocks)
        if n != blocks:
            yield f"the key {arch}.{key} has {n} numbers for {blocks} blocks"


def _impossible_experts(arch: str, number: Callable[[str], int]) -> Iterator[str]:
    experts, used = number("expert_count"), number("expert_used_count")
    groups, groups_used = number("expert_group_count"), number("expert_group_used_count")
    if experts > _MOST_EXPERTS:
        yield f"the key {arch}.expert_count is {experts} and llama.cpp loads at most {_MOST_EXPERTS} experts"
    if used > experts:
        yield f"the key {arch}.expert_used_count is {used}, more than the {experts} of expert_count"
    if experts and groups >= experts:
        yield f"the key {arch}.expert_group_count is {groups}, not fewer than the {experts} experts"
    if groups > 1:
        if experts % groups:
            yield f"the key {arch}.expert_group_count is {groups}, which does not divide the {experts} experts"
        if not 0 < groups_used < groups:
            yield f"the key {arch}.expert_group_used_count is {groups_used} and has to be 1 to {groups - 1}"


def _vocabulary(gguf: GgufFile) -> Iterator[str]:
    prefix = "tokenizer.ggml."
    wanted = {"tokens": ("[str]",), "merges": ("[str]",), "scores": ("[f32]", "[i32]"), "token_type": ("[i32]",)}
    for key, kinds in wanted.items():
        kind = gguf.kinds.get(prefix + key, kinds[0])
        if kind not in kinds:
            yield f"the key {prefix}{key} is of type {kind} and has to be {kinds[0]}"
    tokens = gguf.lengths.get(prefix + "tokens", 0)
    if prefix + "tokens" in gguf.kinds and not tokens:
        yield f"the key {prefix}tokens is empty"
    for key in ("scores", "token_type"):
        n = gguf.lengths.get(prefix + key, tokens)
        if n < tokens:
            yield f"the key {prefix}{key} has {n} entries for {tokens} tokens"
    if gguf.duplicate_token is not None:
        yield f"the key {prefix}tokens has {gguf.duplicate_token!r} twice"


def _tensors(gguf: GgufFile) -> Iterator[str]:
    for tensor in gguf.tensors:
        if 0 in tensor.shape:
            yield f"the tensor {tensor.name} has no elements ({' x '.join(map(str, tensor.shape))})"
    yield from _expert_tensors(gguf)


def _expert_tensors(gguf: GgufFile) -> Iterator[str]:
    """Each layer has all of its expert tensors, and they have as many experts as the file says and fit together."""
    n_expert = int(gguf.metadata.get(f"{gguf.architecture}.expert_count", 0))
    layers: dict[int, dict[str, TensorInfo]] = {}
    routers = {int(m[1]) for t in gguf.tensors if (m := re.match(r"^blk\.(\d{1,9})\.ffn_gate_inp\.weight$", t.name))}
    for tensor in gguf.tensors:
        match = EXPERT_TENSOR.match(tensor.name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
            held = _shape(tensor)[2]
            if held != n_expert:
                yield f"the tensor {tensor.name} holds {held} experts and the key expert_count says {n_expert}"
    gated = any("gate" in parts for parts in layers.values())
    for index, parts in sorted(layers.items()):
        missing = {"down"} - parts.keys()
        if "gate_up" not in parts:
            missing |= ({"up", "gate"} if gated else {"up"}) - parts.keys()
        for part in sorted(missing):
            yield f"the tensor blk.{index}.ffn_{part}_exps.weight is missing"
        down, up = _shape(parts["down"]), _shape(parts.get("up") or parts["gate_up"])
        width = down[0] * (1 if "up" in parts else 2)
        if (up[0], up[1]) != (down[1], width):
            yield f"the expert tensors of blk.{index} do not fit each other: {up[0]} x {up[1]} up and {down[0]} x {down[1]} down"
    for index in sorted(routers - layers.keys()):
        if layers and not any(t.name.startswith(f"blk.{index}.ffn_gate.") for t in gguf.tensors):
            yield f"the tensors blk.{index}.ffn_*_exps.weight are missing"


def _latent_heads(gguf: GgufFile) -> Iterator[str]:
    """DeepSeek's, whose keys and values are compressed together; with `key_length_mla` all heads share one."""
    arch = gguf.architecture
    values = {key: gguf.metadata.get(f"{arch}.{key}") for key in (*_HEAD_KEYS, "attention.kv_lora_rank")}
    heads, _, key, value, rotated, rank = values.values()
    if arch != "deepseek2" or rank is None or any(f"{arch}.{name}" in gguf.lists for name in values):
        return
    for name, found in values.items():
        if not isinstance(found, int):
            yield f"it has no key {arch}.{name}"
    assert isinstance(heads, int) and isinstance(key, int) and isinstance(value, int)
    assert isinstance(rank, int) and isinstance(rotated, int)
    shared = f"{arch}.attention.key_length_mla" in gguf.metadata
    right = {"head_count_kv": 1, "key_length": rank + rotated, "value_length": rank} if shared else {"head_count_kv": heads}
    for name, wanted in right.items():
        if values[f"attention.{name}"] != wanted:
            yield f"the key {arch}.attention.{name} is {values[f'attention.{name}']} and has to be {wanted}"
    widths = {"attn_kv_a_mqa": rank + rotated} | ({} if shared else {"attn_kv_b": heads * (key - rotated + value)})
    yield from _wrong_widths(gguf, widths)


def _heads(gguf: GgufFile) -> Iterator[str]:
    """Widths of heads, where they are the same in all layers."""
    arch = gguf.architecture
    values = {key: gguf.metadata.get(f"{arch}.{key}") for key in (*_HEAD_KEYS, "embedding_length")}
    heads, embedding = values["attention.head_count"], values["embedding_length"]
    if arch not in (*_PLAIN_HEADS, *_PARTLY_ROTATED) or not isinstance(heads, int) or not isinstance(embedding, int):
        return
    usual = embedding // heads
    widths = {part: values[f"attention.{part}_length"] for part in ("key", "value")}
    key, value = (usual if width is None else int(width) for width in widths.values())
    groups = values["attention.head_count_kv"]
    rotated = values["rope.dimension_count"]
    if rotated is not None and rotated != key and arch not in _PARTLY_ROTATED:
        yield f"the key {arch}.rope.dimension_count is {rotated} and has to be the {key} of a head"
    if value != key:
        yield f"the key {arch}.attention.value_length is {value} and has to be the {key} of attention.key_length"
    wanted = {"attn_q": heads * key, "attn_output": heads * key}
    if isinstance(groups, int) or (groups is None and f"{arch}.attention.head_count_kv" not in gguf.kinds):
        n = heads if groups is None else int(groups)
        wanted |= {"attn_k": n * key, "attn_v": n * key}
    yield from _wrong_widths(gguf, wanted)


def _wrong_widths(gguf: GgufFile, wanted: dict[str, int]) -> Iterator[str]:
    """`wanted`: names of matrices of a block -> how wide the heads are together, on their side of it."""
    for tensor in gguf.tensors:
        match = re.match(r"^blk\.\d+\.(\w+)\.weight$", tensor.name)
        name = match[1] if match else ""
        if name in wanted:
            width = _shape(tensor)[0 if name == "attn_output" else 1]
            if width != wanted[name]:
                keys = f"{gguf.architecture}.attention.* and rope.dimension_count"
                yield f"the tensor {tensor.name} is {width} wide and its heads together {wanted[name]}, by the keys {keys}"


def _shape(tensor: TensorInfo) -> tuple[int, ...]:
    """With the dimensions of 1 that TensorInfo leaves out."""
    return (*tensor.shape, 1, 1, 1)[:4]


def _alignment(gguf: GgufFile) -> Iterator[str]:
    """Experts are mapped where they are in the file, and a mapped buffer begins at a multiple of 32 bytes."""
    first: dict[int, TensorInfo] = {}
    for tensor in gguf.tensors:
        if "_exps.weight" in tensor.name and tensor.offset < first.get(tensor.file, tensor).offset + 1:
            first[tensor.file] = tensor
    for tensor in first.values():
        if tensor.offset % _MAPPED_ALIGNMENT:
            yield (
                f"general.alignment is {gguf.metadata.get('general.alignment')}, so {tensor.name} begins at byte "
                f"{tensor.offset}, and experts can be mapped from multiples of {_MAPPED_ALIGNMENT} only: write it again with that"
            )
