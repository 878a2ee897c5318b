"""Builds for aarch64 on Debian's x86-64: what the environment says is all that engine_build and pip need to know.

Of `pip wheel` and engine_build.build(). The compilers are Debian's; the wheels' tag comes from _PYTHON_HOST_PLATFORM.
"""

from __future__ import annotations

import shutil

from cacheroute.errors import CacherouteError

TRIPLE = "aarch64-linux-gnu"
PLATFORM = "linux-aarch64"
# By the command that is looked for. cmake and ninja are the system's own: pip would bring those of the other platform.
PACKAGES = {
    f"{TRIPLE}-gcc": f"gcc-{TRIPLE}",
    f"{TRIPLE}-g++": f"g++-{TRIPLE}",
    "cmake": "cmake",
    "ninja": "ninja-build",
    "git": "git",
}


def missing(needed: dict[str, str]) -> list[str]:
    """Debian's names of the packages whose commands are not here."""
    return sorted({package for command, package in needed.items() if not shutil.which(command)})


def environment() -> dict[str, str]:
    """Variables for a build. Raises CacherouteError with the packages to install."""
    if packages := missing(PACKAGES):
        raise CacherouteError(f"cross-building needs packages: apt-get install {' '.join(packages)}")
    return {
        "CC": f"{TRIPLE}-gcc",
        "CXX": f"{TRIPLE}-g++",
        "CMAKE_ARGS": "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "_PYTHON_HOST_PLATFORM": PLATFORM,
    }
