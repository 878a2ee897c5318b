"""ctypes view of native/cacheroute.h, one to one. Ownership and threads are documented there."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from cacheroute.errors import CacherouteError
from cacheroute.files import PACKAGE
from cacheroute.native.counters import CCounters, Counters


class Routing(ctypes.Structure):
    """struct cr_routing"""

    _fields_ = [
        ("strategy", c_int32),
        ("k", c_int32),
        ("m", c_int32),
        ("j", c_int32),
        ("p", c_double),
        ("lambda_", c_double),
        ("f", c_double),
        ("max_loss", c_double),
        ("experts", c_int32),
        ("prompt_last", c_int32),
        ("prompt_cover", c_double),
    ]


class Shape(ctypes.Structure):
    """struct cr_shape"""

    _fields_ = [(n, c_int32) for n in ("n_layers", "n_expert", "n_used", "capacity", "eviction")]


class RouterWeights(ctypes.Structure):
    """struct cr_router_weights"""

    _fields_ = [(n, c_void_p) for n in ("weight", "bias", "norm", "selection_bias")]


class Tensor(ctypes.Structure):
    """struct cr_tensor"""

    _fields_ = [("layer", c_int32), ("file", c_int32), ("offset", c_uint64), ("expert_bytes", c_uint64), ("address", c_void_p)]


class Progress(ctypes.Structure):
    """struct cr_progress"""

    _fields_ = [(n, c_uint64) for n in ("begun", "done", "needed_bytes", "read_bytes", "layer_bytes")]


ABI_VERSION = 9  # CR_ABI_VERSION
UNKNOWN_BYTES = 2**64 - 1  # of system.h

DIRECT_READS, DROPS_CACHED, MINCORE = 1, 2, 4  # bits of cr_system()

_I32P, _F64P = POINTER(c_int32), POINTER(c_double)

# cr_policy: user, layer, z, mass, resident, ids
POLICY = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, _F64P, _F64P, POINTER(c_uint8), _I32P)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "cr_abi_matches": (c_int32, [c_uint32] * 7),
    "cr_system": (c_uint32, []),
    "cr_router_new": (c_void_p, [POINTER(Shape), POINTER(Routing), c_char_p, c_int32]),
    "cr_router_free": (None, [c_void_p]),
    "cr_router_step": (c_int32, [c_void_p, c_int32, _F64P, _F64P, c_int32, _I32P, c_int32, _F64P, *[_I32P] * 5]),
    "cr_router_replay": (c_int32, [c_void_p, c_int32, c_int64, *[c_void_p] * 7]),
    "cr_router_set_policy": (None, [c_void_p, POLICY, c_void_p]),
    "cr_router_resident": (None, [c_void_p, c_int32, POINTER(c_uint8)]),
    "cr_router_mean_range": (c_double, [c_void_p, c_int32]),
    "cr_router_counters": (None, [c_void_p, c_int32, c_int32, POINTER(CCounters)]),
    "cr_router_reset": (None, [c_void_p]),
    "cr_store_new": (c_void_p, [POINTER(c_char_p), c_int32, POINTER(Tensor), *[c_int32] * 4, c_char_p, c_int32]),
    "cr_store_free": (None, [c_void_p]),
    "cr_store_exchange": (c_int32, [c_void_p, c_int32, _I32P, c_int32, _I32P, c_int32, c_char_p, c_int32]),
    "cr_store_find": (c_void_p, [c_void_p, c_void_p]),
    "cr_store_clear": (None, [c_void_p]),
    "cr_store_set_pace": (None, [c_void_p, c_double]),
    "cr_store_resident_bytes": (c_uint64, [c_void_p]),
    "cr_store_measure_resident": (c_uint64, [c_void_p]),
    "cr_store_read_bytes": (c_uint64, [c_void_p]),
    "cr_guard_new": (c_void_p, [c_void_p, c_uint64]),
    "cr_guard_hit": (c_int32, [c_void_p]),
    "cr_guard_free": (None, [c_void_p]),
    "cr_interrupt_new": (c_void_p, [*[c_void_p] * 4, c_uint64]),
    "cr_interrupt_free": (None, [c_void_p]),
    "cr_interrupt_poll": (c_int32, [c_void_p]),
    "cr_interrupt_raise": (None, [c_void_p]),
    "cr_interrupt_seen": (c_int32, [c_void_p]),
    "cr_interrupt_take": (c_int32, [c_void_p]),
    "cr_hook_new": (c_void_p, [POINTER(Shape), POINTER(Routing), _I32P, c_int32, c_void_p, c_char_p, c_int32]),
    "cr_hook_free": (None, [c_void_p]),
    "cr_hook_address": (c_void_p, [c_void_p]),
    "cr_hook_set_phase": (None, [c_void_p, c_int32]),
    "cr_hook_set_pace": (None, [c_void_p, c_double]),
    "cr_hook_finish": (None, [c_void_p, c_int32]),
    "cr_hook_reset": (None, [c_void_p]),
    "cr_hook_save": (c_void_p, [c_void_p]),
    "cr_hook_resume": (c_int32, [c_void_p, c_void_p]),
    "cr_checkpoint_free": (None, [c_void_p]),
    "cr_checkpoint_bytes": (c_uint64, [c_void_p, c_void_p, c_uint64]),
    "cr_checkpoint_from": (c_void_p, [c_void_p, c_uint64, c_char_p, c_int32]),
    "cr_hook_set_policy": (None, [c_void_p, POLICY, c_void_p]),
    "cr_hook_hold_all": (c_int32, [c_void_p]),
    "cr_hook_set_capacity": (None, [c_void_p, c_int32]),
    "cr_hook_settle_capacity": (None, [c_void_p]),
    "cr_hook_warm": (None, [c_void_p, c_int32, _I32P, c_int32]),
    "cr_hook_begin": (None, [c_void_p, c_int64]),
    "cr_hook_begin_prompt": (None, [c_void_p, c_int64]),
    "cr_hook_progress": (None, [c_void_p, POINTER(Progress)]),
    "cr_hook_set_interrupt": (None, [c_void_p, c_void_p]),
    "cr_hook_force": (None, [c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p]),
    "cr_hook_prefetch": (None, [c_void_p, c_int32, c_int32, POINTER(RouterWeights)]),
    "cr_hook_read_ahead": (None, [c_void_p, c_uint64, c_int32, POINTER(RouterWeights)]),
    "cr_hook_trace": (None, [c_void_p, c_int32]),
    "cr_hook_trace_take": (c_uint64, [c_void_p, c_void_p, c_uint64]),
    "cr_hook_counters": (None, [c_void_p, c_int32, c_int32, POINTER(CCounters)]),
    "cr_hook_resident": (None, [c_void_p, c_int32, POINTER(c_uint8)]),
    "cr_hook_resident_bytes": (c_uint64, [c_void_p]),
    "cr_hook_peak_bytes": (c_uint64, [c_void_p]),
    "cr_hook_measure_resident": (c_uint64, [c_void_p]),
    "cr_hook_error": (c_char_p, [c_void_p]),
}


def _load() -> ctypes.CDLL:
    # An editable install keeps the library in site-packages and the Python files in the checkout.
    folders = [PACKAGE, Path(sysconfig.get_path("platlib")) / "cacheroute"]
    paths = [folder / "lib" / f"libcacheroute{suffix}" for folder in folders for suffix in (".so", ".dylib")]
    if "CACHEROUTE_LIBRARY" in os.environ:  # scripts/sanitize: a build with a sanitizer, instead of the installed one
        paths = [Path(os.environ["CACHEROUTE_LIBRARY"])]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise CacherouteError("The native library of cacheroute is missing; install cacheroute again with pip.")
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    """The library, its functions typed. Raises CacherouteError when it was not built from this cacheroute.h."""
    loaded = ctypes.CDLL(str(path))
    structs = (Routing, Shape, RouterWeights, CCounters, Tensor, Progress)
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
        matches = loaded.cr_abi_matches(ABI_VERSION, *(ctypes.sizeof(s) for s in structs))
    except AttributeError:  # older than a function that is needed
        matches = 0
    if not matches:
        raise CacherouteError(f"{path} was built from another version of cacheroute; install cacheroute again with pip.")
    return loaded


lib = _load()


def checked(make: Any, *arguments: Any) -> int:
    """Calls a cr_*_new and returns the handle. Raises CacherouteError with its sentence when it fails."""
    error = ctypes.create_string_buffer(512)
    handle = make(*arguments, error, len(error))
    if not handle:
        raise CacherouteError(error.value.decode("utf-8", "replace") + ".")
    return int(handle)


def exchange(store: int, layer: int, load: Sequence[int] = (), evict: Sequence[int] = ()) -> None:
    """cr_store_exchange. Raises CacherouteError when a read fails."""
    error = ctypes.create_string_buffer(512)
    loaded, evicted = ((c_int32 * len(ids))(*ids) for ids in (load, evict))
    if lib.cr_store_exchange(store, layer, loaded, len(load), evicted, len(evict), error, len(error)):
        raise CacherouteError(error.value.decode("utf-8", "replace") + ".")


def counters(call: Any, handle: int, layer: int, *, prefill: bool) -> Counters:
    """The result of cr_router_counters or cr_hook_counters for one layer, or for all together (-1)."""
    found = CCounters()
    call(handle, layer, prefill, found)
    return found.value
