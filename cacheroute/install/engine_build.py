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
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.files import cache_dir, packaged, sha256
from cacheroute.install import compilers, variants
from cacheroute.install.machine import available_memory, cores
from cacheroute.install.tools import (
    PlainProgress,
    Progress,
    check_space,
    is_offline,
    last_line,
    no_space,
    pip,
    pip_error,
    run,
    unpack,
    workdir,
)

# What is built. REVISION counts changes that only the patches make; the four change nowhere else.
VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP = "0c1e57098"  # the commit in that sdist, as its CHANGELOG has it
REVISION = 7

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
_RECORD = "cacheroute_engine.json"
# Measured (scripts/LOG.md, "Time to build the engine"): processor time of all compilers together, and the largest
# one's memory (447 MB with gcc 12).
_CPU_MINUTES, _JOB_BYTES = 9, 500_000_000


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


@dataclass(frozen=True)
class PatchResult:
    """Whether one patch applies; `where` is the file (and line) of the first hunk that does not."""

    patch: str
    applies: bool
    where: str | None = None

    def __str__(self) -> str:
        return f"{self.patch}: {'applies' if self.applies else f'does not apply at {self.where}'}"


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
    try:
        dist = importlib.metadata.distribution("llama-cpp-python")
        record = Path(str(dist.locate_file("llama_cpp"))) / _RECORD
        return str(json.loads(record.read_text(encoding="utf-8"))["key"])
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError):
        return None


def patch_files() -> list[Path]:
    """The patches in the order in which they apply."""
    folder = packaged("patches")
    if folder is None:
        raise CacherouteError("the patches are missing: this copy of cacheroute is incomplete")
    return sorted(folder.glob("*.patch"))


# --- what determines a wheel


def recipe(portable: bool = False) -> dict[str, Any]:
    """Everything that determines the wheel, as JSON values. Raises if there is no compiler."""
    one_for_many = [variants.defines(), variants.cmake_include()] if portable else []
    return {
        "engine": LOCAL_VERSION,
        "sdist": SDIST_SHA256,
        "patches": {p.name: hashlib.sha256(_diff(p).encode()).hexdigest() for p in patch_files()},
        "portable": portable,
        "settings": [_SETTINGS, _DEFINES, _CMAKE_INCLUDE, *one_for_many],
        "environment": {name: os.environ[name] for name in OBEYED if name in os.environ},
        "compilers": {lang: compilers.identity(lang, portable) for lang in ("c", "c++")},
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
    }


def _diff(patch: Path) -> str:
    """A patch without its header, which explains and changes nothing: editing it needs no rebuild."""
    head, start, diff = patch.read_text(encoding="utf-8").partition("\n--- ")
    return start + diff if start else head


def key_of(made_of: Mapping[str, Any]) -> str:
    """Name of the cache folder of a recipe: 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:20]


# --- the whole line


def ensure(options: BuildOptions = BuildOptions(), progress: Progress | None = None) -> EngineState:
    """Make sure that this environment has the engine of this recipe: nothing to do in well under a
    second, seconds from the cache, minutes from source. Every failure is a CacherouteError."""
    if not options.replace:
        _check_replaces_nothing()
    key = key_of(recipe(options.portable))
    if installed_key() != key:
        install(build(options, progress), progress)
    return installed_state()


def _check_replaces_nothing() -> None:
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
        _check_replaces_nothing()
    key = key_of(recipe(options.portable))
    if installed_key() == key or _cached(key):
        return None
    n = _jobs(options)
    return (
        f"llama.cpp will be compiled, once: {_CPU_MINUTES} minutes of a processor, so about {math.ceil(_CPU_MINUTES / n)} with "
        f"{n} compiler{'s' * (n > 1)} at a time (--jobs), each of up to {_JOB_BYTES / 1e9:.1f} GB of memory"
    )


def _jobs(options: BuildOptions) -> int:
    """Compilers at a time: as many as there are cores, and as free memory bears."""
    free = available_memory()
    fitting = cores() if free is None else max(free // _JOB_BYTES, 1)
    return max(1, options.jobs or min(cores(), int(fitting)))


def build(options: BuildOptions = BuildOptions(), progress: Progress | None = None) -> Path:
    """The wheel of this recipe, from the cache or compiled: `<cache>/engine/<key>/*.whl`."""
    say = progress or PlainProgress()
    cached = _cached(key_of(recipe(options.portable)))
    if cached:
        return cached
    with workdir(say) as work:
        made_of = recipe(options.portable)  # anew: waiting for another build may have taken minutes
        key = key_of(made_of)
        cached = _cached(key)
        if cached:
            return cached
        check_space(work)
        if options.sdist:
            _check_sha256(options.sdist)
        sdist = options.sdist or fetch(VERSION, work, say)
        say.step("unpacking and patching")
        source = unpack(sdist, work / "source")
        for patch in patch_files():
            result = _apply(patch, source)
            if not result.applies:
                raise CacherouteError(
                    f"{patch.name} does not apply to {result.where} of llama-cpp-python {VERSION}: "
                    "the patch and the pinned version do not belong together"
                )
        _sign(source, key, made_of)
        wheel = _compile(source, options, work, key, say)
        ready = cache_dir() / "engine" / key
        try:
            wheel.parent.rename(ready)  # all of it or nothing
        except OSError:
            if not _cached(key):  # else a process without the lock was first, and its wheel is the same
                raise
        return ready / wheel.name


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


def check(version: str, sdist: Path | None = None, progress: Progress | None = None) -> list[PatchResult]:
    """Whether each patch applies to that version, in their order, building nothing."""
    say = progress or PlainProgress()
    patches = patch_files()
    with workdir(say) as work:
        sdist = sdist or fetch(version, work, say)
        say.step(f"trying the patches on {version}")
        source = unpack(sdist, work / "source", only=_touched(patches))
        return [_apply(patch, source) for patch in patches]


# --- the steps


def fetch(version: str, work: Path, progress: Progress) -> Path:
    """The sdist of a version, from the cache or from the package index; the pinned one is verified."""
    kept = cache_dir() / "sdist" / f"llama_cpp_python-{version}.tar.gz"
    if kept.exists():
        if version != VERSION or sha256(kept) == SDIST_SHA256:
            return kept
        kept.unlink()  # damaged on disk: get it again
    progress.step(f"downloading llama-cpp-python {version} (about 80 MB)")
    into = work / "download"
    # Only this one package from source: with `:all:` pip would compile CMake itself.
    name = "llama-cpp-python"
    call = [*pip(), "download", "--no-deps", "--no-binary", name, "--dest", str(into), f"{name}=={version}"]
    code, output = run(call, env={"TMPDIR": str(work)})
    found = next(into.glob("*.tar.gz"), None)
    if code != 0 or found is None:
        raise pip_error(f"could not download llama-cpp-python {version}", output)
    if version == VERSION:
        _check_sha256(found)
    kept.parent.mkdir(parents=True, exist_ok=True)
    return found.replace(kept)


def _touched(patches: list[Path]) -> set[str]:
    return {name for p in patches for name in re.findall(r"(?m)^--- a/(.+)$", p.read_text(encoding="utf-8"))}


def _apply(patch: Path, source: Path) -> PatchResult:
    """Apply one patch, all of it or nothing. `source` must be free of symlinks."""
    git = shutil.which("git")
    if git is None:
        raise CacherouteError("git is missing, which applies the patches: install it (Debian: apt install git)")
    # Inside another repository `git apply` takes paths as that repository's and skips them in
    # silence, so git must find no repository, neither in a folder above nor in its environment (as in a commit hook).
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(source.parent), "LC_ALL": "C"}
    call = [git, "apply", "--whitespace=nowarn", str(patch)]
    done = subprocess.run(call, cwd=source, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return PatchResult(patch.name, True)
    hunk = re.search(r"patch failed: (.+):(\d+)", done.stderr)
    where = f"{hunk[1]} (line {hunk[2]})" if hunk else last_line(done.stderr).removeprefix("error: ")
    return PatchResult(patch.name, False, where)


def _sign(source: Path, key: str, made_of: Mapping[str, Any]) -> None:
    """Write the local version, and the key by which an installed engine is recognised."""
    init = source / "llama_cpp" / "__init__.py"
    text, changed = re.subn(r'(?m)^__version__ = ".*"$', f'__version__ = "{LOCAL_VERSION}"', init.read_text(encoding="utf-8"))
    if changed != 1:
        raise CacherouteError(f"llama-cpp-python {VERSION} does not have its version in the usual file")
    init.write_text(text, encoding="utf-8")
    record = json.dumps({"key": key, **made_of}, indent=1)
    (source / "llama_cpp" / _RECORD).write_text(record, encoding="utf-8")


def _compile(source: Path, options: BuildOptions, work: Path, key: str, progress: Progress) -> Path:
    """The wheel of `source`, alone in a folder of `work`; a failure leaves the log in the cache."""
    include = work / "include.cmake"
    include.write_text(_CMAKE_INCLUDE + (variants.cmake_include() if options.portable else ""), encoding="utf-8")
    own = variants.defines() if options.portable else {"GGML_NATIVE": "ON"}
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
    if options.sdist and importlib.util.find_spec("scikit_build_core"):
        call.append("--no-build-isolation")  # who brings the sdist is offline, and brings the tools too
    code, output = run([*call, str(source)], env=env, on_line=on_line)
    wheel = next((work / "ready").glob("*.whl"), None)
    if code == 0 and wheel:
        return wheel
    if "No space left on device" in output:
        raise no_space(cache_dir())
    if is_offline(output):
        raise CacherouteError(
            "the build tools could not be downloaded: go online, or bring them "
            "(`python -m pip install scikit-build-core cmake ninja`) and the source (--sdist PATH)"
        )
    log = cache_dir() / "engine" / f"failed-{key}.log"
    log.write_text(output, encoding="utf-8")
    said = re.search(r"(?m)^.*(?:\berror:|CMake Error).*$", output)
    raise CacherouteError(f"the build failed, log in {log}: {said[0].strip() if said else last_line(output)}")


def _check_sha256(sdist: Path) -> None:
    try:
        found = sha256(sdist)
    except OSError as error:
        raise CacherouteError(f"cannot read the sdist {sdist}: {error.strerror}") from error
    if found != SDIST_SHA256:
        raise CacherouteError(f"{sdist} is not llama-cpp-python {VERSION}: its sha256 is {found}, expected {SDIST_SHA256}")
