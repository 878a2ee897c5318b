"""What the next layer's router would say of a layer's hidden state: needs the model, unhooked, and its own tokens.

The state is the one that a layer's router sees (after attention, before its experts), normed for the next layer. llama.cpp shows
it to an evaluation callback (`ffn_norm-N`); routers and norms are read from the file.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from cacheroute.install import patched_llama_cpp

Floats = npt.NDArray[np.float64]


def scores(path: Path, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> tuple[Floats, Floats]:
    """Of each token of `sequences`, [tokens, layers, E]: the scores of every layer's own router, and those that the layer's state
    gives with the router of the layer after it (zeros in the last one)."""
    weights = {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float32)
        for t in GGUFReader(str(path)).tensors
        if re.fullmatch(r"blk\.\d+\.(ffn_norm|ffn_gate_inp)\.weight", t.name)
    }
    norm = [weights[f"blk.{i}.ffn_norm.weight"] for i in layers]
    router = [weights[f"blk.{i}.ffn_gate_inp.weight"] for i in layers]
    own, after = [], []
    for states in _states(path, sequences, layers):
        own.append(np.stack([x @ w.T for x, w in zip(states, router, strict=True)], axis=1))
        following = [x / norm[i] * norm[i + 1] @ router[i + 1].T for i, x in enumerate(states[:-1])]
        after.append(np.stack([*following, np.zeros_like(own[-1][:, 0])], axis=1))
    return np.concatenate(own).astype(float), np.concatenate(after).astype(float)


def tokens(path: Path, text: str) -> list[int]:
    """As `cacheroute trace` cuts a text into tokens."""
    found: list[int] = (
        patched_llama_cpp.module().Llama(str(path), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=True)
    )
    return found


def _states(path: Path, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[list[npt.NDArray[np.float32]]]:
    """[layers][tokens, width] of each sequence."""
    llama = patched_llama_cpp.module()
    from llama_cpp import _ggml, _internals

    ggml = _ggml.libggml
    ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    ggml.ggml_nbytes.restype, ggml.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    names = {f"ffn_norm-{i}".encode(): i for i in layers}
    seen: dict[int, npt.NDArray[np.float32]] = {}

    def look(tensor: Any, ask: bool, _: Any) -> bool:
        layer = names.get(ggml.ggml_get_name(tensor))
        if ask:
            return layer is not None
        if layer is not None:
            size = ggml.ggml_nbytes(tensor)
            seen[layer] = np.empty(size // 4, np.float32)
            ggml.ggml_backend_tensor_get(tensor, seen[layer].ctypes.data, 0, size)
        return True

    callback = llama.llama_cpp.ggml_backend_sched_eval_callback(look)
    longest = max(len(s) for s in sequences)
    # all tokens are wanted at the end: the last layer then computes all of them
    llm = llama.Llama(str(path), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, verbose=False)
    llm.context_params.cb_eval = callback
    llm._ctx = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
    found = []
    for sequence in sequences:
        llm.reset()
        llm.eval(list(sequence))
        found.append([seen[i].reshape(len(sequence), -1) for i in layers])
    llm.close()
    return found
