"""While experts are read, llama.cpp computes what does not need them: the order of its nodes with a hook (patches/0007)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp import _ggml, _internals

from cacheroute import Llama
from support import tiny_models

_lib = _ggml.libggml
for function in (_lib.ggml_get_name, _lib.ggml_op_desc):
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]


def order(path: Path, routing: str | None) -> list[tuple[str, str]]:
    """Operation and name of the nodes of one decoded token, as they are computed."""
    nodes: list[tuple[str, str]] = []

    def look(tensor: Any, ask: bool, _: Any) -> bool:
        if ask:
            nodes.append((_lib.ggml_op_desc(tensor).decode(), _lib.ggml_get_name(tensor).decode()))
        return False

    callback = llama_cpp.ggml_backend_sched_eval_callback(look)
    llm = Llama(str(path), routing=routing, budget="all", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    llm.context_params.cb_eval = callback
    context = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
    if llm._hook:
        llm._hook.attach(context.ctx, llm._interrupt)
    try:
        assert llama_cpp.llama_decode(context.ctx, llama_cpp.llama_batch_get_one((ctypes.c_int32 * 1)(5), 1)) == 0
    finally:
        context.close()
        llm.close()
    return nodes


@pytest.mark.parametrize("arch", [a for a in tiny_models.ARCHS if tiny_models.shape_of(a).n_shared])
def test_a_shared_expert_runs_between_the_choice_and_the_first_matmul_on_experts(arch: str, tmp_path: Path) -> None:
    path, shape = tiny_models.write(arch, tmp_path / "m.gguf"), tiny_models.shape_of(arch)
    for routing in ("original", None):
        nodes = order(path, routing)
        names = [name for _, name in nodes]
        for il in range(shape.n_dense, shape.n_layer):
            choice, shared = (
                names.index(f"ffn_moe_topk-{il}" if routing else f"ffn_moe_argsort-{il}"),
                names.index(f"ffn_shexp-{il}"),
            )
            first = next(i for i in range(choice, len(nodes)) if nodes[i][0] == "MUL_MAT_ID")
            assert choice < shared < first if routing else shared > first  # upstream's own order hides no read


@pytest.mark.parametrize("arch", [a for a in tiny_models.ARCHS if not tiny_models.shape_of(a).n_shared])
def test_without_one_the_order_is_that_of_upstream(arch: str, tmp_path: Path) -> None:
    path = tiny_models.write(arch, tmp_path / "m.gguf")
    hooked, unhooked = ([operation for operation, _ in order(path, routing)] for routing in ("original", None))
    assert [operation for operation in hooked if operation != "CUSTOM"] == unhooked
