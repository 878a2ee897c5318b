"""ctypes view of the hook that patches/ adds to llama.cpp, one to one: for hooks in Python, and to call as llama.cpp does."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 4  # LLAMA_EXPERT_HOOK_VERSION
_FLOATS, _INTS = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int32)


class CEvent(ctypes.Structure):
    """struct llama_expert_event of patches/0001"""

    _fields_ = [
        *((n, ctypes.c_int32) for n in ("il", "gating", "n_expert", "n_used", "n_tokens", "n_embd")),
        *((n, _FLOATS) for n in ("scores", "probs", "hidden")),
        ("ids", _INTS),
        ("weights", _FLOATS),
    ]


CCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(CEvent))
FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool)


class CSource(ctypes.Structure):
    """struct ggml_expert_source of patches/0005"""

    _fields_ = [("find", FIND), ("user_data", ctypes.c_void_p)]


class CHook(ctypes.Structure):
    """struct llama_expert_hook of patches/0001"""

    _fields_ = [
        *((n, ctypes.c_uint32) for n in ("version", "hook_bytes", "event_bytes")),
        *((n, CCallback) for n in ("select", "reweight")),
        ("user_data", ctypes.c_void_p),
        ("source", CSource),
    ]

    @staticmethod
    def of(select: Any, reweight: Any, user_data: int | None = None, source: CSource | None = None) -> CHook:
        sizes = (ctypes.sizeof(CHook), ctypes.sizeof(CEvent))
        return CHook(VERSION, *sizes, select, reweight, user_data, source or CSource())


def select(
    hook: int,
    layer: int,
    scores: npt.NDArray[np.float32],
    n_used: int,
    *,
    probs: npt.NDArray[np.float32] | None = None,
    gating: int = 1,
    hidden: npt.ArrayLike = (),
    model_ids: npt.NDArray[np.int32] | None = None,
    prescribed: bool = False,
) -> npt.NDArray[np.int32]:
    """Calls a hook, given its address, for the tokens of `scores` [n_tokens, E]; returns the ids [n_tokens, n_used] that run.

    `hidden`: [n_embd] of the one token, or [n_tokens, n_embd].
    `probs` None: the scores themselves. `model_ids` None: the n_used best scores, ties to the lower index. `prescribed`:
    without scores, as llama.cpp calls where the model itself prescribes the ids.
    """
    scores = np.ascontiguousarray(scores, np.float32)
    probs = scores if probs is None else np.ascontiguousarray(probs, np.float32)
    state = np.array(hidden, np.float32)
    n_embd = state.shape[-1]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :n_used] if model_ids is None else model_ids
    ids = np.ascontiguousarray(best, np.int32)
    event = CEvent(
        layer, gating, scores.shape[1], n_used, len(scores), n_embd, None if prescribed else scores.ctypes.data_as(_FLOATS),
        probs.ctypes.data_as(_FLOATS), state.ctypes.data_as(_FLOATS), ids.ctypes.data_as(_INTS), None,
    )  # fmt: skip
    native = CHook.from_address(hook)
    native.select(native.user_data, ctypes.byref(event))
    return ids
