"""Cross-builds for aarch64 and runs tests there, emulated (qemu-user). Everything lies in <cache>/aarch64, each part under a key
of what it is made of, so that a run that was broken off goes on where it stopped.

The userland is made of Debian's packages for arm64, unpacked, never installed: none of their code runs while it is made, and
this machine's own apt stays as it is. Commands are shell scripts that start the emulator: the kernel here need not know how.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import aarch64_tests  # noqa: E402
import cross  # noqa: E402

from cacheroute.errors import CacherouteError  # noqa: E402
from cacheroute.files import cache_dir, sha256  # noqa: E402
from cacheroute.install import compilers, engine_build  # noqa: E402
from cacheroute.install.machine import cores  # noqa: E402
from cacheroute.install.tools import last_line, pip  # noqa: E402

EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
USERLAND = ("python3", "libpython3-stdlib", "libstdc++6", "libgomp1", "ca-certificates")
# Of the engine, of cacheroute, and of the tests that are run; no others, so that all have wheels for aarch64.
PYTHON_PACKAGES = (
    *("diskcache", "gguf", "jinja2", "numpy", "platformdirs", "prompt_toolkit", "rich", "tomli", "typer", "typing-extensions"),
    *("hypothesis", "pytest", "pytest-xdist"),
)
# Emulated processors, oldest first, and the kernels that a portable engine must take on each.
PROCESSORS = {
    "cortex-a53": {"NEON"},
    "cortex-a76": {"NEON", "DOTPROD", "FP16_VA"},
    "max": {"NEON", "DOTPROD", "FP16_VA", "MATMUL_INT8"},
}


def say(text: str) -> None:
    print(f"aarch64: {text}", file=sys.stderr, flush=True)


def key_of(made_of: object) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def run(call: list[str], env: dict[str, str] | None = None) -> str:
    """Output of a command. Raises CacherouteError with the reason when it fails."""
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CacherouteError(f"{shlex.join(call[:3])} ... failed: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The folder <cache>/aarch64/NAME, made by `make` in another one and renamed, all of it or nothing."""
    top = cache_dir() / "aarch64"
    ready = top / name
    if ready.exists():
        return ready
    top.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=top))
    try:
        made = work / "made"
        made.mkdir()
        make(made)
        made.rename(ready)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ready


def emulator() -> str:
    found = next((path for path in map(shutil.which, EMULATORS) if path), None)
    if not found:
        raise CacherouteError("the emulator is missing: apt-get install qemu-user")
    return found


def userland() -> Path:
    """The root of an arm64 Debian: Python, libc, libstdc++, libgomp."""
    release = Path("/etc/debian_version")
    if not release.exists() or not shutil.which("apt-get"):
        raise CacherouteError("this needs Debian's apt-get, for packages of arm64")

    def make(root: Path) -> None:
        say("fetching Debian's packages of arm64")
        apt = root.parent / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True)
        (apt / "status").touch()
        own = apt / "apt.conf"  # -c is read last; the machine's own sources, keys and credentials stay in force
        own.write_text(
            f'APT::Architecture "arm64";\n#clear APT::Architectures;\nAPT::Architectures {{ "arm64"; }};\n'
            f'Dir::State "{apt}/state";\nDir::State::status "{apt}/status";\nDir::Cache "{apt}/cache";\n'
            'APT::Sandbox::User "root";\n#clear APT::Update::Post-Invoke;\n#clear DPkg::Post-Invoke;\n'
        )
        # a source without arm64 makes this fail, and does no harm
        subprocess.run(["apt-get", "-qq", "-c", str(own), "update"], stderr=subprocess.DEVNULL, check=False)
        run(["apt-get", "-qq", "-y", "-c", str(own), "install", "--download-only", "--no-install-recommends", *USERLAND])
        for package in sorted((apt / "cache/archives").glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(root)])
        for name in ("bin", "lib"):  # where /lib is a part of /usr
            if not (root / name).exists():
                (root / name).symlink_to(f"usr/{name}")

    return kept(f"root-{key_of([USERLAND, release.read_text()])}", make)


def interpreter(root: Path) -> Path:
    """The userland's own Python, as python3.11."""
    return next(path for path in sorted((root / "usr/bin").glob("python3.*")) if path.name[8:].isdigit())


def packages(python: str) -> Path:
    """A folder of PYTHON_PACKAGES and what they need, for `python` ("3.11")."""

    def make(folder: Path) -> None:
        say("fetching Python packages of aarch64")
        tags = [f"--platform=manylinux_2_{n}_aarch64" for n in (34, 28, 27, 17)] + ["--platform=manylinux2014_aarch64"]
        abis = [f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none"]
        wanted = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *abis, *tags]
        run([*pip(), "install", "--quiet", "--no-compile", *wanted, "--target", str(folder), *PYTHON_PACKAGES])

    return kept(f"packages-{key_of([PYTHON_PACKAGES, python])}", make)


def wheel_of_cacheroute() -> Path:
    """The folder with this checkout's wheel, whose library is for aarch64. Its key is of what is compiled."""
    native = sorted(path for path in (ROOT / "cacheroute/native").iterdir() if path.suffix in (".cpp", ".h", ".txt"))
    sources = {path.name: sha256(path) for path in (ROOT / "pyproject.toml", *native)}
    made_of = [sources, compilers.identity("c++", portable=True)]

    def make(folder: Path) -> None:
        say("compiling the core")
        run([*pip(), "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])

    return kept(f"core-{key_of(made_of)}", make)


def environment(root: Path, parts: list[Path], wheels: list[Path]) -> Path:
    """A virtual environment with these folders of packages and these wheels, whose `bin/python` is emulated."""
    python, qemu = interpreter(root), emulator()
    name = f"venv-{key_of([str(path) for path in (python, qemu, *parts, *wheels)])}"
    ready = cache_dir() / "aarch64" / name

    def make(folder: Path) -> None:
        site = folder / "lib" / python.name / "site-packages"
        site.mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "pyvenv.cfg").write_text(f"home = {root}/usr/bin\ninclude-system-site-packages = false\n")
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        (site / "parts.pth").write_text("".join(f"{part}\n" for part in parts))
        # -L: where the libraries are. -0: what Python takes for its own name, to find pyvenv.cfg. The processor is in QEMU_CPU.
        start = "exec " + shlex.join([qemu, "-L", str(root), "-0", str(ready / "bin/python"), str(python)])
        for command, arguments in (("python", ""), ("python3", ""), ("cacheroute", "-m cacheroute ")):
            script = folder / "bin" / command
            script.write_text(f'#!/bin/sh\n{start} {arguments}"$@"\n')
            script.chmod(0o755)

    return kept(name, make)


def own_cache() -> Path:
    """The cache of the emulated commands, with this machine's models: no speed measured there may be taken for one of here."""
    folder = cache_dir() / "aarch64" / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    models = folder / "models"
    if not models.exists():
        models.symlink_to(cache_dir() / "models")
    return folder


def check_processors(venv: Path, env: dict[str, str]) -> None:
    """On each emulated processor the engine must take the kernels that use all of it."""
    for cpu, wanted in PROCESSORS.items():
        said = run([str(venv / "bin/cacheroute"), "--version"], {**env, "QEMU_CPU": cpu})
        line = next((line for line in said.splitlines() if line.startswith("processor:")), "")
        _, _, features = line.partition("compiled for ")
        if {*features.split(", ")} != wanted:
            raise CacherouteError(f"on {cpu} the engine says {line!r}, and {', '.join(sorted(wanted))} were expected")
        say(f"{cpu}: {features}")


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/aarch64", formatter_class=plain)
    cpus = ",".join(PROCESSORS)
    parser.usage = f"{parser.prog} [-h] [--install] [--build-only] [--cpu {{{cpus}}}] [options and tests for pytest]"
    parser.add_argument("--install", action="store_true", help="install the Debian packages that are missing (root)")
    parser.add_argument("--build-only", action="store_true", help="build, look at the kernels, and run no test")
    parser.add_argument("--cpu", action="append", choices=PROCESSORS, help="emulate this processor alone (may be repeated)")
    options, rest = parser.parse_known_args()
    needed = cross.missing(cross.PACKAGES) + ([] if any(map(shutil.which, EMULATORS)) else ["qemu-user"])
    if needed and options.install:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "-qq", "update"], quiet)
        run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", *needed], quiet)
    elif needed:
        raise CacherouteError(f"packages are missing: apt-get install {' '.join(needed)} (--install does it)")

    root = userland()
    before = dict(os.environ)
    os.environ.update(cross.environment())
    try:
        engine = engine_build.build(engine_build.BuildOptions(portable=True))
        core = wheel_of_cacheroute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    parts = [packages(interpreter(root).name.removeprefix("python"))]
    venv = environment(root, parts, [engine, next(core.glob("*.whl"))])
    env = {**os.environ, "CACHEROUTE_CACHE": str(own_cache()), "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    check_processors(venv, env)
    if options.build_only:
        return 0
    for cpu in options.cpu or PROCESSORS:
        # the last runs all of them, the others what depends on the kernels
        tests = aarch64_tests.ALL if cpu == [*PROCESSORS][-1] else aarch64_tests.KERNELS
        left_out = [f"--deselect={test}" for test in aarch64_tests.DESELECT]
        say(f"tests on {cpu}")
        call = [str(venv / "bin/python"), "-m", "pytest", "-p", "no:cacheprovider", "-n", str(cores()), "--dist=loadscope"]
        named = any(word.startswith("tests") for word in rest)
        call += ["--basetemp", str(ROOT / ".pytest-tmp"), *left_out, *rest, *([] if named else tests)]
        code = subprocess.run(call, env={**env, "QEMU_CPU": cpu}, cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CacherouteError as e:
        print(f"scripts/aarch64: {e}.".replace("..", "."), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("scripts/aarch64: Stopped; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
