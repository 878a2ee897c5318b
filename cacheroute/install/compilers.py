"""The C and C++ compilers of this machine: which they are, and what a build by them depends on."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess

from cacheroute.errors import CacherouteError
from cacheroute.install.tools import last_line


def find(lang: str) -> list[str]:
    """Command of the C or C++ compiler, `lang` as gcc's -x names it. One sentence if there is none."""
    variable, names = ("CC", ("cc", "gcc", "clang")) if lang == "c" else ("CXX", ("c++", "g++", "clang++"))
    chosen = shlex.split(os.environ.get(variable, ""))
    found = next((path for path in map(shutil.which, chosen[:1] or names) if path), None)
    if found:
        return [found, *chosen[1:]]
    if chosen:
        raise CacherouteError(f"{variable} names {chosen[0]}, which is not there: install it or unset {variable}")
    raise CacherouteError(
        f"no {'C' if lang == 'c' else 'C++'} compiler found ({', '.join(names)}): install one "
        "(Debian: apt install g++, macOS: xcode-select --install, Termux: pkg install clang) "
        f"or set {variable}"
    )


def identity(lang: str, portable: bool) -> str:
    """Hash of the macros that the compiler predefines: its make, its version, the target and, for a
    native build, every CPU feature it will use."""
    command = find(lang)
    for native in [[]] if portable else [["-march=native"], ["-mcpu=native"], []]:
        call = [*command, *native, "-dM", "-E", "-x", lang, os.devnull]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return hashlib.sha256((shlex.join(native) + done.stdout).encode()).hexdigest()
    raise CacherouteError(f"the compiler {shlex.join(command)} does not run: {last_line(done.stderr)}")
