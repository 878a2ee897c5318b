"""Gets the engine: llama-cpp-python's own source, patched, compiled once, cached, installed.

Knows nothing of models, routing or how a command line looks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cacheroute.errors import CacherouteError, UsageError, pip_install
from cacheroute.files import cache_dir
from cacheroute.install import compilers, engine_source, machine, processor, variants
from cacheroute.install.engine_source import VERSION
from cacheroute.install.machine import available_memory, cores
from cacheroute.install.tools import (
    PlainProgress,
    Progress,
    ResumableError,
    check_space,
    is_offline,
    last_line,
    no_space,
    pip,
    pip_error,
    run,
    workdir,
)

REVISION = 9  # counts changes that only the patches make
LOCAL_VERSION = f"{VERSION}+cacheroute.{REVISION}"

# Read by upstream's build, scikit-build-core, with any version of pip (`--config-settings` needs a recent one).
# The target `llama` brings ggml and its backends with it; `common` and the tools stay uncompiled.
# What upstream installs beside llama_cpp/ (headers, CMake files, static libraries) is not needed at run time.
_SETTINGS = {
    "SKBUILD_BUILD_TARGETS": "llama",
    "SKBUILD_CMAKE_BUILD_TYPE": "Release",
    "SKBUILD_CMAKE_VERBOSE": "false",
    "SKBUILD_INSTALL_STRIP": "true",
    "SKBUILD_WHEEL_EXCLUDE": "/include/**;/lib/**;/bin/**;/share/**",
}
_DEFINES = {"LLAVA_BUILD": "OFF", "LLAMA_OPENSSL": "OFF"}
# Upstream forces LLAMA_BUILD_COMMON on in CMake's cache, which -D cannot undo; a plain variable set
# before hides it. Without versioned names a wheel, which has no symlinks, holds each library once. Where a build happened is
# nowhere in its bytes.
_CMAKE_INCLUDE = """\
set(LLAMA_BUILD_COMMON OFF)
foreach(part TESTS EXAMPLES TOOLS SERVER APP)
    set(LLAMA_BUILD_${part} OFF)
endforeach()
set(CMAKE_PLATFORM_NO_VERSIONED_SONAME ON)
include(CheckCCompilerFlag)
check_c_compiler_flag(-ffile-prefix-map=a=b CACHEROUTE_HAS_PREFIX_MAP)
if(CACHEROUTE_HAS_PREFIX_MAP)
    add_compile_options("-ffile-prefix-map=${CMAKE_SOURCE_DIR}=." "-ffile-prefix-map=${CMAKE_BINARY_DIR}=build")
endif()
"""
# Variables that compilers and CMake obey: they change the result, so they are part of the key.
OBEYED = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")
RECORD = "cacheroute_engine.json"
# Measured (scripts/LOG.md, "Time to build the engine"): processor time of all compilers together, and the largest
# one's memory (447 MB with gcc 12).
_CPU_MINUTES, _JOB_BYTES = 9, 500_000_000
_PHONE_JOB_BYTES = 1_500_000_000  # a phone's system kills what takes the rest, and clang for ARM takes more
_KEY = "key"  # in the folder of a build whose source is ready: what it is the source of


@dataclass(frozen=True)
class BuildOptions:
    """What a person may choose. `jobs`: compilers at a time, None: as many as cores and free memory bear. `replace`: whether a
    llama-cpp-python that is not ours may be replaced."""

    sdist: Path | None = None
    portable: bool = False
    jobs: int | None = None
    replace: bool = False


@dataclass(frozen=True)
class EngineState:
    """What is installed: no engine, an unpatched one, one with other patches than these, or this one."""

    kind: Literal["missing", "stock", "outdated", "patched"]
    version: str | None = None

    @property
    def advice(self) -> str | None:
        """One line with the command to run, or None where nothing is needed."""
        return {
            "missing": "the engine is not installed yet: run `cacheroute setup`",
            "stock": f"llama-cpp-python {self.version} lacks the expert hook: run `cacheroute setup --replace`, "
            "or install cacheroute into an environment of its own",
            "outdated": f"the engine {self.version} is not the {LOCAL_VERSION} that this cacheroute needs: "
            "run `cacheroute setup`",
        }.get(self.kind)


def installed_state() -> EngineState:
    """State of the engine in this environment, from its version alone: no library is loaded."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return EngineState("missing")
    if version == LOCAL_VERSION:
        return EngineState("patched", version)
    return EngineState("outdated" if "+cacheroute." in version else "stock", version)


def uses_openmp() -> bool | None:
    """Whether the installed engine's threads are OpenMP's; None where that cannot be seen."""
    try:
        dist = importlib.metadata.distribution("llama-cpp-python")
        folder = Path(str(dist.locate_file("llama_cpp"))) / "lib"
        found = [path.read_bytes() for path in folder.glob("libggml-cpu[.-]*")]
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return any(b"omp_get_thread_num" in library for library in found) if found else None


def installed_key() -> str | None:
    """Key of the installed engine, or None if there is none or it was not made here."""
    key = installed_record().get("key")
    return None if key is None else str(key)


def installed_record() -> dict[str, Any]:
    """What the installed engine was made of, as its build wrote it; {} if there is none or it was not made by a cacheroute."""
    try:
        dist = importlib.metadata.distribution("llama-cpp-python")
        record = json.loads((Path(str(dist.locate_file("llama_cpp"))) / RECORD).read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# --- what determines a wheel


def recipe(portable: bool = False) -> dict[str, Any]:
    """Everything that determines the wheel, as JSON values. Raises if there is no compiler."""
    one_for_many = [variants.defines(), variants.cmake_include()] if portable else []
    native = [] if portable or processor.native_defines() == processor.NATIVE else [processor.native_defines()]
    return {
        "engine": LOCAL_VERSION,
        "sdist": engine_source.SDIST_SHA256,
        "patches": engine_source.patches(),
        "portable": portable,
        "settings": [_SETTINGS, _DEFINES, _CMAKE_INCLUDE, *one_for_many, *native],
        "environment": {name: os.environ[name] for name in OBEYED if name in os.environ},
        "compilers": {lang: compilers.identity(lang, portable) for lang in ("c", "c++")},
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
    }


def key_of(made_of: Mapping[str, Any]) -> str:
    """Name of the cache folder of a recipe: 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:20]


# --- the whole line


def ensure(options: BuildOptions = BuildOptions(), progress: Progress | None = None) -> EngineState:
    """Make sure that this environment has the engine of this recipe: nothing to do in well under a
    second, seconds from the cache, minutes from source. Every failure is a CacherouteError."""
    if not options.replace:
        check_replaces_nothing()
    if not _serves(options) and installed_key() != key_of(recipe(options.portable)):
        install(build(options, progress), progress)
    return installed_state()


def _serves(options: BuildOptions) -> bool:
    """Whether the engine here came as a wheel of this cacheroute's (`setup --wheel`), and nothing here could compile another."""
    if options.portable or installed_record().get("patches") != engine_source.patches():
        return False
    try:
        compilers.find("c++")
    except CacherouteError:
        return installed_state().kind == "patched"
    return False


def check_replaces_nothing() -> None:
    """Raises UsageError where another llama-cpp-python than ours is installed: other programs here may need that one."""
    state = installed_state()
    if state.kind == "stock":
        raise UsageError(
            f"llama-cpp-python {state.version} is installed here, and the patched one takes its place: allow it with "
            "`cacheroute setup --replace`, or install cacheroute into an environment of its own."
        )
    found = importlib.util.find_spec("llama_cpp") if state.kind == "missing" else None
    if found and found.origin:
        raise UsageError(
            f"{Path(found.origin).parent} is a llama_cpp that no llama-cpp-python has installed: allow "
            "`cacheroute setup --replace` to write over it, or install cacheroute into an environment of its own."
        )


def to_compile(options: BuildOptions = BuildOptions()) -> str | None:
    """What `ensure` will have to compile, and what that takes, as one sentence; None where the cache has the wheel.

    Raises UsageError where `ensure` would replace what is not ours, CacherouteError without a compiler.
    """
    if not options.replace:
        check_replaces_nothing()
    if _serves(options):
        return None
    key = key_of(recipe(options.portable))
    if installed_key() == key or _cached(key):
        return None
    n = _jobs(options)
    return (
        f"llama.cpp will be compiled, once: {_CPU_MINUTES} minutes of a processor, so about {math.ceil(_CPU_MINUTES / n)} with "
        f"{n} compiler{'s' * (n > 1)} at a time (--jobs), each of up to {job_bytes() / 1e9:.1f} GB of memory"
    )


def job_bytes() -> int:
    """Memory of one compiler, at most."""
    return _PHONE_JOB_BYTES if machine.is_android() else _JOB_BYTES


def _jobs(options: BuildOptions) -> int:
    """Compilers at a time: as many as there are cores, and as free memory bears."""
    free = available_memory()
    fitting = cores() if free is None else max(free // job_bytes(), 1)
    return max(1, options.jobs or min(cores(), int(fitting)))


def build(options: BuildOptions = BuildOptions(), progress: Progress | None = None) -> Path:
    """The wheel of this recipe, from the cache or compiled: `<cache>/engine/<key>/*.whl`. A build that was interrupted, or
    killed, goes on where it stopped."""
    say = progress or PlainProgress()
    cached = _cached(key_of(recipe(options.portable)))
    if cached:
        return cached
    with workdir(say, resumable=True) as work:
        made_of = recipe(options.portable)  # anew: waiting for another build may have taken minutes
        key = key_of(made_of)
        cached = _cached(key)
        if cached:
            return cached
        source = _source(options, work, key, made_of, say)
        wheel = _compile(source, options, work, key, say)
        ready = cache_dir() / "engine" / key
        try:
            wheel.parent.rename(ready)  # all of it or nothing
        except OSError:
            if not _cached(key):  # else a process without the lock was first, and its wheel is the same
                raise
        return ready / wheel.name


def _source(options: BuildOptions, work: Path, key: str, made_of: Mapping[str, Any], progress: Progress) -> Path:
    """The patched source in `work`; where a build of this key was interrupted there, that one's, beside what it has compiled."""
    shutil.rmtree(work / "ready", ignore_errors=True)
    marker = work / _KEY
    if marker.is_file() and marker.read_text(encoding="ascii") == key:
        progress.step("resuming the build that was interrupted")
        return next(entry for entry in (work / "source").iterdir() if entry.is_dir())
    for old in work.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    check_space(work)
    source = engine_source.patched(options.sdist, work, progress)
    _sign(source, key, made_of)
    marker.write_text(key, encoding="ascii")
    return source


def _cached(key: str) -> Path | None:
    return next((cache_dir() / "engine" / key).glob("*.whl"), None)


def install(wheel: Path, progress: Progress | None = None) -> None:
    """Install the wheel into the running environment, then what it needs, if anything is missing."""
    (progress or PlainProgress()).step(f"installing {wheel.name}")
    # The same version with another key must replace what is there, which needs --force-reinstall;
    # that would also reinstall numpy and the rest, so they get a second, normal call.
    for what in (["--force-reinstall", "--no-deps", str(wheel)], [f"llama-cpp-python=={LOCAL_VERSION}"]):
        code, output = run([*pip(), "install", *what])
        if code != 0:
            raise pip_error(f"could not install {wheel.name}", output)
    importlib.invalidate_caches()


# --- the steps


def _sign(source: Path, key: str, made_of: Mapping[str, Any]) -> None:
    """Write the local version, and the key by which an installed engine is recognised."""
    init = source / "llama_cpp" / "__init__.py"
    text, changed = re.subn(r'(?m)^__version__ = ".*"$', f'__version__ = "{LOCAL_VERSION}"', init.read_text(encoding="utf-8"))
    if changed != 1:
        raise CacherouteError(f"llama-cpp-python {VERSION} does not have its version in the usual file")
    init.write_text(text, encoding="utf-8")
    built_on = [] if made_of["portable"] else sorted(processor.features())  # a native build needs them, and is no use without
    record = json.dumps({"key": key, **made_of, "processor": built_on}, indent=1)
    (source / "llama_cpp" / RECORD).write_text(record, encoding="utf-8")


def _compile(source: Path, options: BuildOptions, work: Path, key: str, progress: Progress) -> Path:
    """The wheel of `source`, alone in a folder of `work`; a failure leaves the log in the cache."""
    include = work / "include.cmake"
    include.write_text(_CMAKE_INCLUDE + (variants.cmake_include() if options.portable else ""), encoding="utf-8")
    own = variants.defines() if options.portable else processor.native_defines()
    # in upstream's project, which overrides some of it, and again in llama.cpp's
    defines = _DEFINES | own | {f"CMAKE_PROJECT_{name}_INCLUDE": str(include) for name in ("llama_cpp", "llama.cpp")}
    jobs = _jobs(options)
    env = _SETTINGS | {
        "SKBUILD_CMAKE_DEFINE": ";".join(f"{name}={value}" for name, value in defines.items()),
        "SKBUILD_BUILD_DIR": str(work / "build"),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "CC": shlex.join(compilers.find("c")),
        "CXX": shlex.join(compilers.find("c++")),
        "GIT_CEILING_DIRECTORIES": str(source.parent),  # llama.cpp asks git for its own commit
        "TMPDIR": str(work),  # a small /tmp must not end a build for which the cache has room
    }
    progress.step(f"compiling llama.cpp, jobs: {jobs} (minutes, once)")

    def on_line(line: str) -> None:
        ninja = re.match(r"\s*\[(\d+)/(\d+)\]", line)
        make = re.match(r"\s*\[ *(\d+)%\]", line)
        if ninja:
            progress.fraction(int(ninja[1]), int(ninja[2]))
        elif make:
            progress.fraction(int(make[1]), 100)

    call = [*pip(), "wheel", "-v", "--no-deps", "--wheel-dir", str(work / "ready")]
    if (options.sdist or machine.is_android()) and importlib.util.find_spec("scikit_build_core"):
        # who brings the sdist is offline, and brings the tools too; Android's cmake and ninja are packages of Termux
        call.append("--no-build-isolation")
    try:
        code, output = run([*call, str(source)], env=env, on_line=on_line)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; `cacheroute setup` goes on from there.") from None
    wheel = next((work / "ready").glob("*.whl"), None)
    if code == 0 and wheel:
        return wheel
    if code in (-9, 137) or re.search(r"(?m)\bKilled\b|signal 9\b|Error 137\b", output):
        raise ResumableError(
            "the system killed a compiler, as it does where memory is short: close other programs and run "
            "`cacheroute setup --jobs 1`, which goes on from there"
        )
    if "No space left on device" in output:
        raise no_space(cache_dir())
    if is_offline(output):
        raise CacherouteError(
            "the build tools could not be downloaded: go online, or bring them "
            f"({pip_install('scikit-build-core cmake ninja')}) and the source (--sdist PATH)"
        )
    log = cache_dir() / "engine" / f"failed-{key}.log"
    log.write_text(output, encoding="utf-8")
    said = re.search(r"(?m)^.*(?:\berror:|CMake Error).*$", output)
    raise CacherouteError(f"the build failed, log in {log}: {said[0].strip() if said else last_line(output)}")
