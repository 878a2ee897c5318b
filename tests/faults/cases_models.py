"""Faults of models: headers and tensors that llama.cpp would abort on, cut files and shards that do not belong together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.runner import Case, Outcome, Place, in_process
from support import gguf_bytes
from support.gguf_bytes import ARR, F32, I32, STR, U16, U32, U64, Gguf

ARCH = "qwen3moe."
TOKENS = "tokenizer.ggml.tokens"

Change = Callable[[Gguf], object]


def _model(name: str, change: Change, sentence: str, code: int = 2) -> Case:
    """The tiny model with something changed, inspected and generated from: both say the same."""

    def command(place: Place) -> Outcome:
        gguf = gguf_bytes.read(place.tiny.read_bytes())
        change(gguf)
        path = gguf.write(place.folder / "m.gguf")
        told = in_process(["inspect", str(path)])
        again = in_process(["generate", "-m", str(path), "--raw", "-p", "a", "-n", "1"])
        assert (again.code, again.stderr) == (told.code, told.stderr), again
        return told

    return Case(name, command, code, sentence)


def _set(key: str, kind: int, value: Any) -> Change:
    def change(gguf: Gguf) -> None:
        gguf.keys[key] = kind, value

    return change


def _number(name: str, key: str, kind: int, value: Any, sentence: str) -> Case:
    return _model(name, _set(ARCH + key, kind, value), f"{ARCH}{key}.*{sentence}" if sentence else f"{ARCH}{key}")


def _attribute(name: str, value: Any) -> Change:
    return lambda gguf: setattr(gguf, name, value)


def _drop(*names: str) -> Change:
    return lambda gguf: gguf.without(*names)


def _dropped_key(key: str) -> Change:
    return lambda gguf: gguf.keys.pop(key)


def _aligned(n: int) -> Change:
    """Moves all tensors as a file of that alignment has them; the experts are at no multiple of 32."""

    def change(gguf: Gguf) -> None:
        gguf.keys["general.alignment"] = U32, n
        gguf.keys["padding"] = STR, ""
        head = len(gguf.to_bytes()) - len(gguf.data)
        gguf.keys["padding"] = STR, "x" * ((n - head) % 32)

    return change


def _duplicate(gguf: Gguf) -> None:
    tokens = gguf.keys[TOKENS][1][1]
    tokens[280] = tokens[281]


def _renamed(name: str, to: str) -> Change:
    return lambda gguf: setattr(gguf.tensor(name), "name", to)


def _shape(name: str, shape: list[int]) -> Change:
    return lambda gguf: setattr(gguf.tensor(name), "shape", shape)


def _list(key: str, element: int, values: list[Any]) -> Change:
    return _set(key, ARR, (element, values))


def _hole(n: int) -> Change:
    """A key that claims more entries than it has."""

    def change(gguf: Gguf) -> None:
        gguf.keys["long"] = ARR, (U32, [7, 7, 7, 7])
        data = gguf.to_bytes()
        entries = (4).to_bytes(8, "little") + (7).to_bytes(4, "little") * 4
        vars(gguf)["to_bytes"] = lambda: data.replace(entries, n.to_bytes(8, "little") + entries[8:])

    return change


def _long_text(gguf: Gguf) -> None:
    gguf.keys["long"] = STR, "a text"
    data = gguf.to_bytes()
    vars(gguf)["to_bytes"] = lambda: data.replace(b"\6\0\0\0\0\0\0\0a text", (2**40).to_bytes(8, "little") + b"a text")


MODELS = [
    _model("a model with an alignment of 16", _aligned(16), "general.alignment is 16.*multiples of 32"),
    _model("a model with an alignment of 8", _aligned(8), "general.alignment is 8.*multiples of 32"),
    _model("a model with an alignment that is no power of two", _set("general.alignment", U32, 24), "header of .* is damaged"),
    _model("a model with an alignment of 0", _set("general.alignment", U32, 0), "header of .* is damaged"),
    _model("an alignment that is a text", _set("general.alignment", STR, "32"), "header of .* is damaged"),
    _model("a vocabulary that has a token twice", _duplicate, f"{TOKENS} has .* twice"),
    _model("a vocabulary that is empty", _list(TOKENS, STR, []), f"{TOKENS} is empty"),
    _model("a vocabulary of numbers", _list(TOKENS, I32, [1, 2]), rf"{TOKENS} is of type \[i32\]"),
    _model("a vocabulary that is one text", _set(TOKENS, STR, "a b"), f"{TOKENS} is of type str"),
    _model("too few scores for the vocabulary", _list("tokenizer.ggml.scores", F32, [0.0]), "scores has 1 entries"),
    _model("too few token types", _list("tokenizer.ggml.token_type", I32, [1, 1]), "token_type has 2 entries"),
    _model("merges that are a text", _set("tokenizer.ggml.merges", STR, "a b"), "merges is of type str"),
    _model("a tokenizer's name that is a number", _set("tokenizer.ggml.model", U32, 1), "tokenizer.ggml.model is of type u32"),
    _model("a chat template that is a number", _set("tokenizer.chat_template", U32, 1), "chat_template is of type u32"),
    _model("a name that is a number", _set("general.name", U32, 1), "general.name is of type u32"),
    _model("an architecture that is a number", _set("general.architecture", U32, 1), "dense model|architecture is of type u32"),
    _number("600 blocks", "block_count", U32, 600, "at most 512 blocks"),
    _number("no blocks", "block_count", U32, 0, "is 0"),
    _number("blocks that are a text", "block_count", STR, "2", "type str .*u32"),
    _number("blocks that are a float", "block_count", F32, 2.0, "type f32 .*u32"),
    _number("blocks of 64 bits", "block_count", U64, 2, "type u64 .*u32"),
    _number("more prediction layers than blocks", "nextn_predict_layers", U32, 3, "more than the 2 blocks"),
    _model("only prediction layers", _set(ARCH + "nextn_predict_layers", U32, 2), "none of its 0 blocks"),
    _number("an embedding of 0", "embedding_length", U32, 0, "is 0"),
    _number("a context of 0", "context_length", U32, 0, "is 0"),
    _number("no heads", "attention.head_count", U32, 0, "is 0"),
    _number("no heads of keys", "attention.head_count_kv", U32, 0, "is 0"),
    _model(
        "heads that are no multiple of those of keys", _set(ARCH + "attention.head_count_kv", U32, 3), "head_count is 4, no mul"
    ),
    _number("heads of no layer", "attention.head_count", ARR, (U32, [4]), "1 numbers for 2 blocks"),
    _number("heads of 0 in all layers", "attention.head_count", ARR, (U32, [0, 0]), "is 0"),
    _number("heads that are texts", "attention.head_count", ARR, (STR, ["4", "4"]), r"type \[str\]"),
    _number("keys of length 0", "attention.key_length", U32, 0, "is 0"),
    _number("values of length 0", "attention.value_length", U32, 0, "is 0"),
    _number("experts of width 0", "expert_feed_forward_length", U32, 0, "is 0"),
    _number("a context that is a text", "context_length", STR, "512", "type str"),
    _number("an epsilon that is no number", "attention.layer_norm_rms_epsilon", F32, float("nan"), "is nan"),
    _number("an infinite epsilon", "attention.layer_norm_rms_epsilon", F32, float("inf"), "is inf"),
    _number("a negative epsilon", "attention.layer_norm_rms_epsilon", F32, -1.0, "negative"),
    _number("an epsilon that is a whole number", "attention.layer_norm_rms_epsilon", U32, 1, "type u32 .*f32"),
    _number("a rope base that is no number", "rope.freq_base", F32, float("nan"), "is nan"),
    _number("a rotation of less than a head", "rope.dimension_count", U32, 8, "has to be the 16 of a head"),
    _model(
        "heads of another width than their tensors", _set(ARCH + "attention.head_count", U32, 2), "attn_output.weight is 64 wide"
    ),
    _number("keys of another width than values", "attention.value_length", U32, 8, "has to be the 16"),
    _number("a rope scaling that does not exist", "rope.scaling.type", STR, "wild", "'wild'.*yarn"),
    _number("a rope scaling that is a number", "rope.scaling.type", U32, 1, "type u32"),
    _number("no experts in the header but in the tensors", "expert_count", U32, 0, "is 0"),
    _number("more experts than llama.cpp takes", "expert_count", U32, 1025, "at most 1024"),
    _model("an expert count that contradicts the tensors", _set(ARCH + "expert_count", U32, 16), "holds 32 experts .*says 16"),
    _number("more experts used than there are", "expert_used_count", U32, 33, "more than the 32"),
    _number("no experts used", "expert_used_count", U32, 0, "is 0"),
    _number("experts used that are a text", "expert_used_count", STR, "4", "type str"),
    _model("another K in each layer", _list(ARCH + "expert_used_count", U32, [4, 2]), "one number of experts used"),
    _model("no number of experts used", _dropped_key(ARCH + "expert_used_count"), "one number of experts used"),
    _number("a gating that does not exist", "expert_gating_func", U32, 5, "knows 1 to 4"),
    _number("as many groups as experts", "expert_group_count", U32, 32, "not fewer than the 32"),
    _number("groups that do not divide the experts", "expert_group_count", U32, 5, "does not divide"),
    _model("groups of which none is used", _set(ARCH + "expert_group_count", U32, 4), "expert_group_used_count is 0"),
    _model("no gate of a layer", _drop("blk.1.ffn_gate_exps.weight"), r"blk\.1\.ffn_gate_exps\.weight is missing"),
    _model("no up of a layer", _drop("blk.0.ffn_up_exps.weight"), r"blk\.0\.ffn_up_exps\.weight is missing"),
    _model("no down of a layer", _drop("blk.0.ffn_down_exps.weight"), r"blk\.0\.ffn_down_exps\.weight is missing"),
    _model(
        "a layer without experts but with a router",
        _drop(*(f"blk.1.ffn_{part}_exps.weight" for part in ("down", "gate", "up"))),
        r"blk\.1\.ffn_\*_exps\.weight are missing",
    ),
    _model("experts that do not fit each other", _shape("blk.0.ffn_down_exps.weight", [64, 32, 32]), "do not fit each other"),
    _model("a tensor without elements", _shape("output_norm.weight", [0]), "header of .* is damaged|no elements"),
    _model("a dimension of 2^63", _shape("output_norm.weight", [2**63]), "header of .* is damaged"),
    _model("dimensions whose product does not fit", _shape("output_norm.weight", [2**32, 2**32, 2]), "header of .* is damaged"),
    _model("tensors that overlap", lambda g: setattr(g.tensors[2], "offset", 0), "header of .* is damaged"),
    _model("a tensor far beyond the file", lambda g: setattr(g.tensors[2], "offset", 2**62), "header of .* is damaged"),
    _model("a tensor of an unknown type", lambda g: setattr(g.tensors[2], "type", 999), "header of .* is damaged"),
    _model("two tensors of one name", lambda g: setattr(g.tensors[2], "name", g.tensors[1].name), "header of .* is damaged"),
    _model("2^31 keys", _attribute("n_keys", 2**31), "claims 2147483648 keys"),
    _model("2^31 tensors", _attribute("n_tensors", 2**31), "claims 2147483648 tensors"),
    _model("2^64 - 1 keys", _attribute("n_keys", 2**64 - 1), "claims 18446744073709551615 keys"),
    _model("an array of 2^26 entries", _hole(2**26), "key long claims 67108864 entries"),
    _model("a text of 2^40 bytes", _long_text, "claims a text of 1099511627776 bytes"),
    _model("more keys than there are", _attribute("n_keys", 2**31 - 1), "header of .* is damaged"),
    _model("a file for big-endian machines", _attribute("order", ">"), "big-endian"),
    _model("version 1", _attribute("version", 1), "of version 1 .*2 and 3"),
    _model("version 9", _attribute("version", 9), "of version 9 "),
    _model("another magic", _attribute("magic", b"GGML"), "not a GGUF file"),
    _model("an architecture that the hook cannot serve", _set("general.architecture", STR, "grovemoe"), "grovemoe"),
    _model(
        "one that chooses where no hook is",
        _set("general.architecture", STR, "granite-switch"),
        "granite-switch is not supported",
    ),
    _model("a tensor for each expert", _renamed("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate.0.weight"), "a format of 2023"),
    _model("no architecture", _dropped_key("general.architecture"), "no key general.architecture|dense model"),
    _model("a key that is no UTF-8", lambda g: g.keys.update({"k\udcff": (U32, 1)}) or g.keys.update({TOKENS: (U32, 1)}), TOKENS),
    _model("a shard count that is a text", _set("split.count", STR, "2"), "split.count is no number of shards"),
    _model("shards whose names do not say so", _set("split.count", U16, 2), "rename the shards"),
    _model("tensor data that ends early", lambda g: setattr(g, "data", g.data[:-4000]), "cut short"),
]


def _cut(n: int) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return ["inspect", str(place.file("cut.gguf", place.tiny.read_bytes()[:n]))]

    return command


def _shards(change: Callable[[list[Path]], object]) -> Callable[[Place], list[str]]:
    """A model in two shards, of which something is changed."""

    def command(place: Place) -> list[str]:
        from support import tiny_models

        first = tiny_models.write("qwen3moe", place.folder / "m.gguf", shards=2)
        change([first, first.with_name("m-00002-of-00002.gguf")])
        return ["inspect", str(first)]

    return command


def _edit(path: Path, change: Change) -> None:
    gguf = gguf_bytes.read(path.read_bytes())
    change(gguf)
    gguf.write(path)


SHARDS = [
    Case("a model that is cut within its header", _cut(300), sentence="header of .* is damaged"),
    Case("a model of 10 bytes", _cut(10), sentence="file ends after 10 bytes"),
    Case("a model of 0 bytes", _cut(0), sentence="is empty"),
    Case("a shard that is missing", _shards(lambda p: p[1].unlink()), sentence="no file .*00002-of-00002"),
    Case(
        "a shard that is cut short",
        _shards(lambda p: os.truncate(p[1], p[1].stat().st_size - 99)),
        sentence="00002-of-00002.*cut short",
    ),
    Case("the first shard twice", _shards(lambda p: p[1].write_bytes(p[0].read_bytes())), sentence="is not shard 2"),
    Case(
        "a shard of another model",
        _shards(lambda p: _edit(p[1], _set("general.architecture", STR, "olmoe"))),
        sentence="00002-of-00002.*another model: its general.architecture is olmoe",
    ),
    Case(
        "a shard of a model in three",
        _shards(lambda p: _edit(p[1], _set("split.count", U16, 3))),
        sentence="another model: its split.count is 3",
    ),
    Case(
        "a shard number that is a text",
        _shards(lambda p: _edit(p[1], _set("split.no", STR, "1"))),
        sentence="is not shard 2",
    ),
    Case(
        "a shard without some of its tensors",
        _shards(lambda p: _edit(p[1], lambda g: g.without(g.tensors[-1].name))),
        sentence="its shards have",
    ),
    Case(
        "a tensor that two shards have",
        _shards(lambda p: _edit(p[1], lambda g: setattr(g.tensors[0], "name", "token_embd.weight"))),
        sentence="token_embd.weight, which another shard has too",
    ),
    Case("a directory in place of a shard", _shards(lambda p: (p[1].unlink(), p[1].mkdir())), sentence="it is a directory"),
]


def _tokenizer(place: Place) -> list[str]:
    gguf = gguf_bytes.read(place.tiny.read_bytes())
    gguf.keys["tokenizer.ggml.model"] = STR, "bert"
    return ["generate", "-m", str(gguf.write(place.folder / "m.gguf")), "--raw", "-p", "\u00e9", "-n", "1"]


ABORTS = [
    Case("an assertion of llama.cpp that no check foresees", _tokenizer, 1, "llama.cpp gave up at .*", "{cacheroute}", more=True)
]

CASES: list[Case] = [*ABORTS, *MODELS, *SHARDS]
