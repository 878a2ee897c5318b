"""What is installed, as `--version` tells it. Reads small files, and loads one small library of the engine, never llama.cpp."""

from __future__ import annotations

import ctypes
import platform

from cacheroute import files
from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build, engine_source, patched_llama_cpp

# What ggml-cpu.h asks for -> what llama.cpp calls it. AVX and SSE3 go without saying where AVX2 is.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "bmi2": "BMI2",
    "avx_vnni": "AVX_VNNI",
    "avx512": "AVX512",
    "avx512_vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "neon": "NEON",
    "fp16_va": "FP16_VA",
    "dotprod": "DOTPROD",
    "matmul_int8": "MATMUL_INT8",
    "sve": "SVE",
    "sme": "SME",
    "riscv_v": "RISCV_V",
}


def lines() -> list[str]:
    """cacheroute, the engine and its build, llama.cpp and the patches, and the processor features that it was compiled for.

    Works without an engine, and says then what to do.
    """
    state = engine_build.installed_state()
    try:
        patches = f"{len(engine_source.patch_files())} patches"
    except CacherouteError as e:
        patches = str(e)
    llama_cpp = f"llama.cpp {engine_source.LLAMA_CPP}, {patches}"
    if state.advice:
        needed = f"needed: llama-cpp-python {engine_build.LOCAL_VERSION}, {llama_cpp}"
        return [f"cacheroute {files.VERSION}", f"engine: {state.advice}", needed]
    return [
        f"cacheroute {files.VERSION}",
        f"engine: llama-cpp-python {state.version}, build {engine_build.installed_key() or 'unknown'}",
        llama_cpp,
        f"processor: {platform.machine()}, compiled for {_compiled_for()}",
    ]


def _compiled_for() -> str:
    try:
        library = patched_llama_cpp.cpu_library()
    except CacherouteError as e:
        return f"unknown ({str(e).rstrip('.')})"
    return ", ".join(compiled_features(library)) or "any of its kind"


def compiled_features(library: ctypes.CDLL) -> list[str]:
    """What libggml-cpu says of itself. A function that this version of it lacks is no feature."""
    found = []
    for function, name in _FEATURES.items():
        ask = getattr(library, f"ggml_cpu_has_{function}", None)
        if ask is not None and ask():
            found.append(name)
    return found
