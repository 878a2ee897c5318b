"""How fast this machine multiplies: a short run of the engine's own kernels on made-up weights. Knows no model.

Weights of dense layers lie as llama.cpp lays them out when it loads them (repacked, where it has a faster layout), those of
experts as in the file. One token is bound by how fast weights come from memory, so its weights are many; a batch by the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass
from typing import Any

from cacheroute.files import MIB
from cacheroute.install import patched_llama_cpp

WORKING_SET = 128 * MIB  # of the weights of one token: more than most caches hold
_WIDE, _NARROW = 2048, 768  # a weight matrix of 2048 x 2048, an expert's of 768 x 2048: those of Qwen3-30B-A3B
USED = 8  # experts of a token
BATCH, EXPERTS_IN_BATCH = 128, 32  # tokens; experts, so that each gets as many as in a prompt of some hundred tokens
_LEAST_SECONDS, _LEAST_RUNS = 0.02, 2
_NODES = 200
_HEAD_WIDTH, _HEADS, _QUERIES, _KEYS = 128, 4, 256, 1024  # of attention
_PATTERN = 0x2C  # 0x2c2c is 0.065 as F16 and no scale of a block becomes a subnormal number, which would be slow
_BUFFER_AT = 8  # of struct ggml_tensor, in ggml.h
_I32 = 26
# enum ggml_type of ggml.h, by the names that GGUF headers have; the test compares them with the gguf package's
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13,
    "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18, "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23,
    "iq1_m": 29, "bf16": 30, "tq1_0": 34, "tq2_0": 35, "mxfp4": 39,
}  # fmt: skip
_F32 = TYPES["f32"]


@dataclass(frozen=True)
class TypeSpeed:
    """Of one type of weights: bytes of weights a second for one token, weights x tokens a second for a batch."""

    bytes_per_s: float
    batch_per_s: float


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@functools.cache
def _library() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """(ggml-base, ggml-cpu) with typed functions."""
    base, cpu = patched_llama_cpp.shared_library("ggml-base"), patched_llama_cpp.cpu_library()
    p = c_void_p
    for lib, symbol, result, arguments in (
        (base, "ggml_init", p, [_InitParams]),
        (base, "ggml_free", None, [p]),
        (base, "ggml_tensor_overhead", c_size_t, []),
        (base, "ggml_graph_overhead_custom", c_size_t, [c_size_t, c_bool]),
        (base, "ggml_nbytes", c_size_t, [p]),
        (base, "ggml_new_tensor_2d", p, [p, c_int, c_int64, c_int64]),
        (base, "ggml_new_tensor_3d", p, [p, c_int, c_int64, c_int64, c_int64]),
        (base, "ggml_mul_mat", p, [p, p, p]),
        (base, "ggml_mul_mat_id", p, [p, p, p, p]),
        (base, "ggml_add", p, [p, p, p]),
        (base, "ggml_rms_norm", p, [p, p, ctypes.c_float]),
        (base, "ggml_flash_attn_ext", p, [p, p, p, p, p, ctypes.c_float, ctypes.c_float, ctypes.c_float]),
        (base, "ggml_new_graph_custom", p, [p, c_size_t, c_bool]),
        (base, "ggml_build_forward_expand", None, [p, p]),
        (base, "ggml_backend_reg_dev_get", p, [p, c_size_t]),
        (base, "ggml_backend_reg_get_proc_address", p, [p, c_char_p]),
        (base, "ggml_backend_dev_supports_op", c_bool, [p, p]),
        (base, "ggml_backend_buft_alloc_buffer", p, [p, c_size_t]),
        (base, "ggml_backend_buft_get_alloc_size", c_size_t, [p, p]),
        (base, "ggml_backend_buffer_get_base", p, [p]),
        (base, "ggml_backend_buffer_free", None, [p]),
        (base, "ggml_backend_tensor_alloc", c_int, [p, p, p]),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", p, [p, p]),
        (base, "ggml_backend_tensor_set", None, [p, p, c_size_t, c_size_t]),
        (base, "ggml_backend_tensor_memset", None, [p, c_uint8, c_size_t, c_size_t]),
        (base, "ggml_backend_graph_compute", c_int, [p, p]),
        (base, "ggml_backend_free", None, [p]),
        (base, "ggml_backend_cpu_buffer_type", p, []),
        (cpu, "ggml_backend_cpu_reg", p, []),
        (cpu, "ggml_backend_cpu_init", p, []),
        (cpu, "ggml_backend_cpu_set_n_threads", None, [p, c_int]),
    ):
        function = getattr(lib, symbol)
        function.restype, function.argtypes = result, arguments
    return base, cpu


class Kernels:
    """The engine's kernels with so many threads. Used in a `with`; every measurement takes some 20 to 100 ms."""

    def __init__(self, n_threads: int) -> None:
        self._base, self._cpu = _library()
        reg = self._cpu.ggml_backend_cpu_reg()
        self._device = self._base.ggml_backend_reg_dev_get(reg, 0)
        self._plain = self._base.ggml_backend_cpu_buffer_type()
        self._extra = self._extra_buffer_types(reg)
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, n_threads)

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.ggml_backend_free(self._backend)

    def _extra_buffer_types(self, reg: Any) -> list[Any]:
        """Those in which llama.cpp repacks weights, in the order in which it tries them."""
        address = self._base.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        listed = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self._device)
        found: list[Any] = []
        while listed and listed[len(found)]:
            found.append(listed[len(found)])
        return found

    def dense(self, kind: str) -> TypeSpeed:
        """Of matrices of that type, laid out as dense weights are."""
        number = TYPES[kind]
        with self._context() as context:
            weight = self._matrix(context, number)
            tokens = self._base.ggml_new_tensor_2d(context, _F32, _WIDE, 512)
            buft = self._buffer_type(weight, self._base.ggml_mul_mat(context, weight, tokens))
            size = self._base.ggml_backend_buft_get_alloc_size(buft, weight)
            nbytes = self._base.ggml_nbytes(weight)
        n = max(WORKING_SET // size, 2)
        seconds = self._dense_seconds(number, buft, n, 1)
        batch = self._dense_seconds(number, buft, 2, BATCH)
        return TypeSpeed(n * nbytes / seconds, 2 * _WIDE * _WIDE * BATCH / batch)

    def _dense_seconds(self, number: int, buft: Any, n: int, n_tokens: int) -> float:
        base = self._base
        with self._context() as context, self._graph(context, n) as graph:
            weights = [self._matrix(context, number) for _ in range(n)]
            with self._placed(weights, buft):
                x = base.ggml_new_tensor_2d(context, _F32, _WIDE, n_tokens)
                for weight in weights:
                    base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, weight, x))
                return self._seconds(context, graph, [x])

    def experts(self, kind: str, *, repacked: bool = False) -> TypeSpeed:
        """Of experts of that type, laid out as in the file, or `repacked` as in a model that is loaded whole."""
        number, base = TYPES[kind], self._base
        buft = self._plain
        with self._context() as context:
            weight = base.ggml_new_tensor_3d(context, number, _WIDE, _NARROW, USED)
            one = base.ggml_nbytes(weight) // USED
            if repacked:
                tokens = base.ggml_new_tensor_3d(context, _F32, _WIDE, USED, 512)
                chosen = base.ggml_new_tensor_2d(context, _I32, USED, 512)
                buft = self._buffer_type(weight, base.ggml_mul_mat_id(context, weight, tokens, chosen))
        n = max(WORKING_SET // one // USED, 2)
        single = [[range(i * USED, (i + 1) * USED)] for i in range(n)]
        seconds = self._experts_seconds(number, buft, n * USED, single)
        batch = [[(t * USED + k) % EXPERTS_IN_BATCH for k in range(USED)] for t in range(BATCH)]
        of_batch = self._experts_seconds(number, buft, EXPERTS_IN_BATCH, [batch])
        return TypeSpeed(n * USED * one / seconds, _WIDE * _NARROW * USED * BATCH / of_batch)

    def _experts_seconds(self, number: int, buft: Any, n_expert: int, nodes: Sequence[Sequence[Sequence[int]]]) -> float:
        """`nodes`: for each multiplication the experts of each of its tokens."""
        base = self._base
        with self._context() as context, self._graph(context, len(nodes)) as graph:
            weight = base.ggml_new_tensor_3d(context, number, _WIDE, _NARROW, n_expert)
            with self._placed([weight], buft):
                x = base.ggml_new_tensor_3d(context, _F32, _WIDE, 1, len(nodes[0]))
                ids = [base.ggml_new_tensor_2d(context, _I32, USED, len(tokens)) for tokens in nodes]
                for chosen in ids:
                    base.ggml_build_forward_expand(graph, base.ggml_mul_mat_id(context, weight, x, chosen))
                values = [[e for token in tokens for e in token] for tokens in nodes]
                return self._seconds(context, graph, [x], dict(zip(ids, values, strict=True)))

    def node_seconds(self) -> float:
        """Of one of the small operations between the multiplications, for one token."""
        base = self._base
        with self._context() as context, self._graph(context, _NODES) as graph:
            x = base.ggml_new_tensor_2d(context, _F32, _WIDE, 1)
            y = x
            for _ in range(_NODES // 2):
                y = base.ggml_add(context, base.ggml_rms_norm(context, y, 1e-5), x)
            base.ggml_build_forward_expand(graph, y)
            return self._seconds(context, graph, [x]) / _NODES

    def attention_seconds(self) -> float:
        """Of one pair of tokens in one head of a prompt, for each number of the head, by flash attention."""
        base = self._base
        with self._context() as context, self._graph(context, 1) as graph:
            query = base.ggml_new_tensor_3d(context, _F32, _HEAD_WIDTH, _QUERIES, _HEADS)
            key, value = (base.ggml_new_tensor_3d(context, TYPES["f16"], _HEAD_WIDTH, _KEYS, _HEADS) for _ in range(2))
            attended = base.ggml_flash_attn_ext(context, query, key, value, None, _HEAD_WIDTH**-0.5, 0.0, 0.0)
            base.ggml_build_forward_expand(graph, attended)
            return self._seconds(context, graph, [query, key, value]) / (_QUERIES * _KEYS * _HEADS * _HEAD_WIDTH)

    @contextlib.contextmanager
    def _context(self) -> Iterator[Any]:
        """A ggml_context that holds tensors without their data."""
        nbytes = 4096 * self._base.ggml_tensor_overhead() + self._base.ggml_graph_overhead_custom(4096, False)
        context = self._base.ggml_init(_InitParams(nbytes, None, True))
        try:
            yield context
        finally:
            self._base.ggml_free(context)

    @contextlib.contextmanager
    def _graph(self, context: Any, n_nodes: int) -> Iterator[Any]:
        yield self._base.ggml_new_graph_custom(context, 2 * n_nodes + 16, False)

    def _matrix(self, context: Any, number: int) -> Any:
        return self._base.ggml_new_tensor_2d(context, number, _WIDE, _WIDE)

    def _buffer_type(self, weight: Any, product: Any) -> Any:
        """Where llama.cpp would put `weight`, by a `product` with it (select_weight_buft in its llama-model-loader.cpp)."""
        base = self._base
        place = ctypes.cast(weight + _BUFFER_AT, POINTER(c_void_p))
        for buft in self._extra:
            place[0] = base.ggml_backend_buft_alloc_buffer(buft, 0)
            supported = base.ggml_backend_dev_supports_op(self._device, product)
            base.ggml_backend_buffer_free(place[0])
            place[0] = None
            if supported:
                return buft
        return self._plain

    @contextlib.contextmanager
    def _placed(self, weights: Sequence[Any], buft: Any) -> Iterator[None]:
        """Gives the tensors their memory, side by side, filled with a pattern that is taken for any layout."""
        base = self._base
        sizes = [-(-base.ggml_backend_buft_get_alloc_size(buft, w) // 64) * 64 for w in weights]
        buffer = base.ggml_backend_buft_alloc_buffer(buft, sum(sizes))
        if not buffer:
            raise MemoryError
        try:
            at = base.ggml_backend_buffer_get_base(buffer)
            ctypes.memset(at, _PATTERN, sum(sizes))
            for weight, size in zip(weights, sizes, strict=True):
                base.ggml_backend_tensor_alloc(buffer, weight, at)
                at += size
            yield
        finally:
            base.ggml_backend_buffer_free(buffer)

    def _seconds(self, context: Any, graph: Any, inputs: Sequence[Any], ids: dict[Any, list[int]] | None = None) -> float:
        """The least of several runs of a graph: what others take of the machine meanwhile is left out."""
        base = self._base
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, self._plain)
        if not buffer:
            raise MemoryError
        try:
            for tensor in inputs:
                base.ggml_backend_tensor_memset(tensor, _PATTERN, 0, base.ggml_nbytes(tensor))
            for tensor, values in (ids or {}).items():
                data = (ctypes.c_int32 * len(values))(*values)
                base.ggml_backend_tensor_set(tensor, data, 0, ctypes.sizeof(data))
            base.ggml_backend_graph_compute(self._backend, graph)
            best, runs, began = float("inf"), 0, time.perf_counter()
            while runs < _LEAST_RUNS or time.perf_counter() - began < _LEAST_SECONDS:
                start = time.perf_counter()
                base.ggml_backend_graph_compute(self._backend, graph)
                best, runs = min(best, time.perf_counter() - start), runs + 1
            return best
        finally:
            base.ggml_backend_buffer_free(buffer)
