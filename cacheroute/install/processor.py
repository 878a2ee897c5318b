"""What this processor can do that makes llama.cpp faster, and which flags compile for it. Knows nothing of an engine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from cacheroute.install.machine import is_android

# What /proc/cpuinfo calls a feature -> what llama.cpp calls it. Only those that make it clearly faster.
NAMES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX_VNNI",
    "amx_int8": "AMX_INT8",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
    "asimdhp": "FP16_VA",
}
NATIVE = {"GGML_NATIVE": "ON"}  # CMake's definition for "as the compiler finds it"
# What armv8.2-a means beside armv8-a: atomics and rounding doubling multiplies, in cpuinfo's words.
_V8_2 = {"atomics", "asimdrdm"}
_TAGS = {"asimddp": "dotprod", "asimdhp": "fp16", "i8mm": "i8mm"}


def features(root: Path = Path("/")) -> set[str]:
    """The keys of NAMES that every core of this machine has; empty where the system does not tell. `root`: where proc is."""
    return _words(root) & set(NAMES)


def _words(root: Path) -> set[str]:
    """What /proc/cpuinfo lists for every core: those of a phone may differ, and a thread may run on any."""
    try:
        text = (root / "proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return set()
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return set.intersection(*map(set, lines)) if lines else set()


def arm_arch(root: Path = Path("/")) -> str:
    """-march for this ARM processor, as armv8.2-a+dotprod+i8mm.

    By what the kernel says that programs may use: clang's -mcpu=native goes by the name of a core, whose SVE phones switch off,
    and a fixed list is either slow (armv8-a) or ends with SIGILL (i8mm). SVE is left out: at 128 bits it is no wider than NEON.
    """
    words = _words(root)
    if not words >= _V8_2:
        return "armv8-a"
    return "+".join(["armv8.2-a", *(tag for word, tag in _TAGS.items() if word in words)])


def native_defines(root: Path = Path("/")) -> dict[str, str]:
    """CMake's definitions for a build of ggml that serves this machine only."""
    if is_android(root) and platform.machine() in ("aarch64", "arm64"):
        return {"GGML_NATIVE": "OFF", "GGML_CPU_ARM_ARCH": arm_arch(root)}
    return NATIVE


def missing(record: dict[str, Any], root: Path = Path("/")) -> list[str]:
    """What an engine may use that this processor lacks: running it would end with SIGILL.

    `record`: as its build wrote it (engine_build.installed_record). Empty for a portable one, which looks first, and where it is
    not known what it was compiled for. `root`: where proc is, for tests.
    """
    built_on = record.get("processor")
    if record.get("portable") or not isinstance(built_on, list) or not built_on:
        return []
    here = features(root)
    return [NAMES.get(str(word), str(word)) for word in built_on if word not in here] if here else []
