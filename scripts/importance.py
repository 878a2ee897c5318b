"""How much each input of a model's matrices matters on a text: the importance matrix that llama.cpp's quantiser takes.

It is the mean square of what a column of a matrix is multiplied with, for each expert apart, computed as llama.cpp's
tools/imatrix does it: with the callback that its scheduler makes for each node of the graph. Knows nothing of types and files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cacheroute.engine import log
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.evals import text as texts
from cacheroute.install import patched_llama_cpp

CHUNK = 512
"""Tokens that are computed together, as llama-imatrix has it."""


@dataclass
class Importance:
    """What texts say about a model's matrices, by their names in the GGUF.

    sums: squared inputs, summed over tokens, float64 [matrices, columns]; an expert is a matrix of its tensor.
    counts: the tokens that each matrix was multiplied with [matrices].
    """

    texts: str
    n_chunks: int = 0
    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def means(self, name: str) -> npt.NDArray[np.float32]:
        """Mean squares [matrices, columns]; 1 in all columns of an expert that no token chose, as in llama.cpp."""
        counts = self.counts[name][:, None]
        return np.where(counts, self.sums[name] / np.maximum(counts, 1), 1.0).astype(np.float32)

    @property
    def experts(self) -> tuple[int, int]:
        """(experts that no token chose, experts) of all layers."""
        counts = [c for name, c in self.counts.items() if name.endswith("ffn_down_exps.weight")]
        return sum(int((c == 0).sum()) for c in counts), sum(c.size for c in counts)


class _Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h)."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]

_F32 = 0  # enum ggml_type


class _Collector:
    """The callback. What fails in it is kept in `error`: C would lose it."""

    def __init__(self, found: Importance) -> None:
        self.found = found
        self.error: BaseException | None = None
        self._checked = False
        self._lib = patched_llama_cpp.shared_library("ggml-base")
        for symbol, result, argument in (
            ("ggml_op_name", ctypes.c_char_p, ctypes.c_int),
            ("ggml_get_name", ctypes.c_void_p, ctypes.c_void_p),
            ("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p),
            ("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p),
        ):
            function = getattr(self._lib, symbol)
            function.restype, function.argtypes = result, [argument]

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        """`ask`: whether this node is wanted, before it is computed; else it has been, and its inputs are still there."""
        if self.error is not None:
            return False
        try:
            node = _Tensor.from_address(address)
            if ask:
                return self._wanted(address, node)
            self._add(node)
            return True
        except BaseException as e:
            self.error = e
            return False

    def _wanted(self, address: int, node: _Tensor) -> bool:
        if not self._checked:
            self._checked = True
            name_at = address + _Tensor.name.offset
            if (self._lib.ggml_get_name(address), self._lib.ggml_get_data(address) or 0) != (name_at, node.data or 0):
                raise CacherouteError("This engine's struct ggml_tensor is another one; scripts/importance.py has to follow it.")
        if self._lib.ggml_op_name(node.op) not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return False
        name: bytes = node.src[0].contents.name
        return name.startswith(b"blk.") and name.endswith(b".weight") and node.src[1].contents.type == _F32

    def _add(self, node: _Tensor) -> None:
        weights, name = node.src[0].contents, node.src[0].contents.name.decode()
        columns, matrices = weights.ne[0], weights.ne[2]
        sums = self.found.sums.setdefault(name, np.zeros((matrices, columns)))
        counts = self.found.counts.setdefault(name, np.zeros(matrices, np.int64))
        x = self._array(node.src[1], np.float32)
        if self._lib.ggml_op_name(node.op) == b"MUL_MAT":
            sums += np.square(x).sum(2).reshape(-1, matrices, columns).sum(0)  # matrices: the heads of MLA
            counts += x.size // columns // matrices
            return
        x, ids = x[0], self._array(node.src[2], np.int32)[0, 0]  # [tokens, 1 or chosen, columns], [tokens, chosen]
        for expert in np.unique(ids):
            token, place = np.nonzero(ids == expert)
            sums[expert] += np.square(x[token, place % x.shape[1]]).sum(0)
            counts[expert] += len(token)

    def _array(self, tensor: Any, dtype: Any) -> npt.NDArray[Any]:
        """A view of its data, slowest dimension first."""
        t = tensor.contents
        data = (ctypes.c_char * self._lib.ggml_nbytes(ctypes.addressof(t))).from_address(t.data)
        view: npt.NDArray[Any] = np.ndarray(tuple(t.ne)[::-1], dtype, data, strides=tuple(t.nb)[::-1])
        return view


def collect(path: Path, named: Sequence[tuple[str, str]], n_tokens: int, n_threads: int) -> Importance:
    """What texts, given as (name, text), say about the matrices of a model.

    `n_tokens` are computed, rounded up to whole chunks, as many of each text and from all parts of it; fewer where the texts have
    not so many. The model is mapped, so it may be larger than the memory. Raises UsageError for a text of less than a chunk,
    CacherouteError for a model that cannot be loaded or does not compute finite numbers.
    """
    api = patched_llama_cpp.module().llama_cpp
    from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel

    found = Importance(", ".join(name for name, _ in named))
    collector = _Collector(found)
    api.llama_backend_init()
    of_model, of_context = api.llama_model_default_params(), api.llama_context_default_params()
    of_model.load_mode, of_model.n_gpu_layers, of_model.use_extra_bufts = api.LLAMA_LOAD_MODE_MMAP, 0, False
    of_context.n_ctx = of_context.n_batch = of_context.n_ubatch = CHUNK
    of_context.n_threads = of_context.n_threads_batch = n_threads
    of_context.op_offload = False
    of_context.cb_eval = api.ggml_backend_sched_eval_callback(collector)
    with log.errors(verbose=False) as said:
        try:
            model = LlamaModel(path_model=str(path), params=of_model, verbose=False)
            context = LlamaContext(model=model, params=of_context, verbose=False)
        except ValueError as e:
            raise CacherouteError(f"{path} cannot be loaded ({log.reason(said) or e}).") from None
        batch = LlamaBatch(n_tokens=CHUNK, embd=0, n_seq_max=1, verbose=False)
        for chunk in _chunks(model, named, n_tokens):
            context.kv_cache_clear()
            batch.set_batch(chunk, 0, logits_all=True)  # of tokens without output the last layer would see nothing
            context.decode(batch)
            if collector.error is not None:
                raise collector.error
            found.n_chunks += 1
        batch.close()
        model.close()
    for name, sums in found.sums.items():
        if not np.isfinite(sums).all():
            raise CacherouteError(f"{path} computes numbers that are not finite (the input of {name}); it is damaged.")
    return found


def _chunks(model: Any, named: Sequence[tuple[str, str]], n_tokens: int) -> list[Sequence[int]]:
    wanted = -(-n_tokens // (CHUNK * len(named)))
    bos = model.token_bos() if model.add_bos_token() else None
    chosen: list[Sequence[int]] = []
    for name, text in named:
        tokens = model.tokenize(text.encode(), add_bos=False, special=False)
        if len(tokens) < CHUNK:
            raise UsageError(
                f"{name} has {len(tokens)} tokens, and an importance matrix needs {CHUNK} or more; give a longer text."
            )
        chunks = texts.cut(tokens, CHUNK, bos=bos)
        chosen += [chunks[i].tokens for i in np.linspace(0, len(chunks) - 1, min(wanted, len(chunks))).astype(int)]
    return chosen
