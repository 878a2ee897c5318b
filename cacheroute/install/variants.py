"""For which processors a portable engine is compiled. Its CPU kernels are there several times, each time for other instructions,
and llama.cpp takes those that score best where it is loaded (patches/0008).

Native engines have none of this: their kernels are for the one processor on which they were compiled.
"""

from __future__ import annotations

import sysconfig

_AVX2 = "SSE42+AVX+F16C+FMA+AVX2+BMI2"
# Names and features are those of ggml/src/CMakeLists.txt, which has more of them: 14 for x86-64, 8 for ARM, each of a minute of a
# processor and a megabyte. Left out are those that differ little from one of these; for ARM also SVE, which phones have at NEON's
# width, and SME, which GCC knows only since version 14.
_X86 = (
    "x64",
    f"haswell={_AVX2}",
    f"alderlake={_AVX2}+AVX_VNNI",
    f"cascadelake={_AVX2}+AVX512+AVX512_VNNI",
    f"sapphirerapids={_AVX2}+AVX512+AVX512_VBMI+AVX512_VNNI+AVX512_BF16+AMX_TILE+AMX_INT8",
)
_ARM = (
    "armv8.0",  # NEON
    "armv8.2=DOTPROD+FP16_VECTOR_ARITHMETIC",
    "armv8.6=DOTPROD+FP16_VECTOR_ARITHMETIC+MATMUL_INT8",
)


def of(platform: str | None = None) -> tuple[str, ...]:
    """The variants for a platform, as sysconfig.get_platform() names it (default: this one); none: it has just one kind."""
    system, _, machine = (platform or sysconfig.get_platform()).partition("-")
    if system not in ("linux", "android"):
        return ()
    if machine.endswith(("x86_64", "amd64")):
        return _X86
    return _ARM if machine.endswith(("aarch64", "arm64_v8a")) else ()


def defines(platform: str | None = None) -> dict[str, str]:
    """CMake's definitions for a portable engine."""
    several = {"GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON"} if of(platform) else {}
    return {"GGML_NATIVE": "OFF", **several}


def cmake_include(platform: str | None = None) -> str:
    """What the build of a portable engine sets before upstream does: its libraries lie in one folder and find each other.

    They are linked with the path that they keep: the room for a longer one, of the build's folder, would stay in the bytes.
    """
    names = of(platform)
    if not names:
        return ""
    return f"""\
set(GGML_CPU_VARIANTS "{";".join(names)}")
set(CMAKE_INSTALL_BINDIR llama_cpp/lib)
set(CMAKE_INSTALL_RPATH "$ORIGIN")
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH FALSE)
set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)
"""
