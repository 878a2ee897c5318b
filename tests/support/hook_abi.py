"""ctypes view of the hook that patches/ adds to llama.cpp, one to one: for hooks in Python, and to call as llama.cpp does."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class CEvent(ctypes.Structure):
    """struct llama_expert_event of patches/0001"""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("il", "gating", "n_expert", "n_used", "n_tokens")),
        *((n, ctypes.POINTER(ctypes.c_float)) for n in ("scores", "probs")),
        ("ids", ctypes.POINTER(ctypes.c_int32)),
        ("weights", ctypes.POINTER(ctypes.c_float)),
        ("hidden", ctypes.POINTER(ctypes.c_float)),
        ("n_embd", ctypes.c_int32),
    ]


CCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CEvent))
FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool)


class CSource(ctypes.Structure):
    """struct ggml_expert_source of patches/0005"""

    _fields_ = [("find", FIND), ("user_data", ctypes.c_void_p)]


class CHook(ctypes.Structure):
    """struct llama_expert_hook of patches/0001"""

    _fields_ = [("select", CCallback), ("reweight", CCallback), ("user_data", ctypes.c_void_p), ("source", CSource)]


def event(
    layer: int, gating: int, scores: Floats, probs: Floats, ids: npt.NDArray[np.int32], hidden: Floats | None = None
) -> CEvent:
    """What llama.cpp gives a hook for a batch: scores and probs [tokens, E], ids [tokens, K] to fill in, and with one token its
    hidden state. Contiguous arrays, which must outlive the event."""

    def floats(values: Floats | None) -> ctypes._Pointer[ctypes.c_float] | None:
        return None if values is None else values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    (n_tokens, n_expert), n_used = scores.shape, ids.shape[1]
    pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    n_embd = 0 if hidden is None else hidden.size
    return CEvent(layer, gating, n_expert, n_used, n_tokens, floats(scores), floats(probs), pointer, None, floats(hidden), n_embd)
