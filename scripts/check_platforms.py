"""Compiles the core for macOS and Android with zig, which brings headers and libraries of other systems.

macOS: for both processors, against Apple's headers and the list of symbols of its system library, down to a linked library.
Android: no package has the headers of its libc (bionic), so the declarations are those of musl, a small libc without glibc's
extensions, as bionic is; and each function of libc that the core calls must be in bionic from API level 24 on (Android 7), as
its own list of symbols says (libc/libc.map.txt and libm/libm.map.txt in the sources of Android). What that cannot see: a
declaration of bionic's that differs from musl's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from cacheroute.errors import CacherouteError  # noqa: E402
from cacheroute.files import cache_dir  # noqa: E402
from cacheroute.install.machine import cores  # noqa: E402
from cacheroute.install.tools import last_line  # noqa: E402

ZIG = "ziglang==0.17.0"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
MACOS = ("aarch64-macos.11.0", "x86_64-macos.11.0")
MUSL = "aarch64-linux-musl"
ANDROID_API = 24
_ALWAYS = """
__errno close exp expf free fstat fsync geteuid log log2 madvise memcmp memcpy memmove memset mincore mmap munmap open
posix_fadvise posix_memalign pread pthread_create pthread_self pthread_setspecific sched_yield sigaction sigemptyset signal
snprintf strerror strlen sysconf wmemchr
"""
# The API level from which bionic has a function; 21 is the first for 64-bit processors. Only what the core calls.
BIONIC = {**dict.fromkeys(_ALWAYS.split(), 21), "posix_madvise": 23}
# What is called otherwise for Android: errno, and what clang takes for memcmp where libc has it.
OTHER_NAMES = {"__errno_location": "__errno", "bcmp": "memcmp"}
CPP = ("_Z", "__cxa_", "__gxx_", "_Unwind_", "__dso_handle", "__dynamic_cast")  # of the C++ library and the compiler


def zig() -> list[str]:
    """Command of zig, from an environment of its own in the cache."""
    folder = cache_dir() / ZIG.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        print(f"installing {ZIG}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ZIG])
        done.touch()
    return [str(python), "-m", "ziglang"]


def run(call: list[str]) -> str:
    """Output of a command. Raises CacherouteError with what it said when it fails."""
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if "error:" in line) or last_line(done.stderr)
        raise CacherouteError(f"{said}\n({call[-1]})")
    return done.stdout


def objects(target: str, folder: Path, *flags: str) -> list[Path]:
    """The core, compiled for a target."""

    def compiled(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        run([*zig(), "c++", "-target", target, *FLAGS, *flags, "-c", "-o", str(out), str(source)])
        return out

    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(compiled, sorted((ROOT / "cacheroute/native").glob("*.cpp"))))


def macos(folder: Path) -> str:
    for target in MACOS:
        own = folder / target
        own.mkdir()
        library = own / "libcacheroute.dylib"
        run([*zig(), "c++", "-target", target, "-shared", *map(str, objects(target, own)), "-o", str(library)])
    return f"compiles and links for {', '.join(MACOS)}"


def undefined(files: list[Path]) -> set[str]:
    """Functions of C that these objects call and do not have."""
    lines = [line.split() for line in run(["nm", "-P", *map(str, files)]).splitlines()]
    symbols = [(words[0], words[1]) for words in lines if len(words) > 1]
    own = {name for name, kind in symbols if kind not in "Uw"}
    return {name for name, kind in symbols if kind in "Uw" and name not in own and not name.startswith(CPP)}


def android(folder: Path) -> str:
    own = folder / "android"
    own.mkdir()
    calls = {OTHER_NAMES.get(name, name) for name in undefined(objects(MUSL, own, f"-D__ANDROID_API__={ANDROID_API}"))}
    late = sorted(name for name in calls if BIONIC.get(name, 10**6) > ANDROID_API)
    if late:
        raise CacherouteError(f"Android's libc has not at API level {ANDROID_API}: {', '.join(late)}")
    first = max(BIONIC[name] for name in calls)
    return f"compiles against musl; the {len(calls)} functions of libc that it calls are in Android's from API level {first} on"


def main() -> int:
    checks = {"macos": macos, "android": android}
    wanted = sys.argv[1:] or list(checks)
    if unknown := [name for name in wanted if name not in checks]:
        print(f"scripts/check_platforms: there is no {unknown[0]}; there are {' and '.join(checks)}.", file=sys.stderr)
        return 2
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            try:
                print(f"{name}: {checks[name](Path(folder))}")
            except CacherouteError as e:
                print(f"{name}: {e}", file=sys.stderr)
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
